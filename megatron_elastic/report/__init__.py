"""The report of a run: `report.json`, `report.md` and its plots, from the files that the run left."""

from megatron_elastic.report.checks import Check, check_report
from megatron_elastic.report.facts import build_report, write_json, write_text
from megatron_elastic.report.page import write_report

__all__ = ["Check", "build_report", "check_report", "write_json", "write_report", "write_text"]
