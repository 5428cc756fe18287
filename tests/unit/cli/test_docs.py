"""What `docs/costs.md` shows is what its commands print."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from megatron_elastic.cli.main import main
from megatron_elastic.latency import LatencyTable

ROOT = Path(__file__).resolve().parents[3]
TEXT = (ROOT / "docs" / "costs.md").read_text()
BLOCKS = re.findall(r"```\n\$ (.+)\n((?:.+\n)+)```", TEXT)


def test_every_block_is_found() -> None:
    assert len(BLOCKS) == TEXT.count("\n$ ") > 10


@pytest.mark.parametrize(("command", "shown"), BLOCKS, ids=[command for command, _ in BLOCKS])
def test_commands_print_what_is_shown(
    command: str, shown: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    program, *words = shlex.split(command)
    assert program == "megatron-elastic"
    assert main(words) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line for line in shown.splitlines() if line not in printed] == []


def test_the_latency_table_is_one() -> None:
    (block,) = re.findall(r"```yaml\n((?:.+\n)+)```", TEXT)
    table = LatencyTable.from_dict(yaml.safe_load(block))
    assert table.layer("-", {"hidden": 4096, "ffn": 15360}) == pytest.approx((0.42 + 0.22 + 0.26 + 0.14) / 4)
