"""The README's first command, interrupted once and run again, and what its folder must hold afterwards."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_elastic.report.checks import check_report
from tests.end_to_end.wandb_records import offline_runs

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 60 * 60
"""Seconds after which a run is taken for hung: no measure of speed."""


def quickstart(out: Path) -> subprocess.Popen[str]:
    """Starts the job in a process group of its own."""
    return subprocess.Popen(
        ["bash", str(ROOT / "launch" / "quickstart.sh"), "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # Where the tests run in the background the shell has turned Ctrl-C off, and a child inherits that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def lines_of(process: subprocess.Popen[str]) -> Iterator[str]:
    """Output as it comes; the process group is killed when it takes too long."""
    limit = time.monotonic() + PATIENCE
    assert process.stdout is not None
    for line in process.stdout:
        if time.monotonic() > limit:
            os.killpg(process.pid, signal.SIGKILL)
            pytest.fail(f"no end after {PATIENCE} s; last line: {line}")
        yield line


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], int]:
    """Folder of a finished run that was interrupted inside the elastic training, the second run's output and the
    first one's exit status."""
    out = tmp_path_factory.mktemp("quickstart") / "out"
    first = quickstart(out)
    for line in lines_of(first):
        if "elastic | stage 1 | iteration 30" in line:
            os.killpg(first.pid, signal.SIGINT)
    status = first.wait(timeout=600)
    second = quickstart(out)
    printed = list(lines_of(second))
    assert second.wait(timeout=600) == 0, "".join(printed[-40:])
    return out, printed, status


@pytest.fixture(scope="module")
def report(done: tuple[Path, list[str], int]) -> dict[str, Any]:
    """The finished run's report.json."""
    found: dict[str, Any] = json.loads((done[0] / "report.json").read_text())
    return found


def elastic(*words: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Runs the installed command line."""
    command = [str(ROOT / "launch" / "bin" / "megatron-elastic"), *map(str, words)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=900, check=False)


def test_an_interrupt_ends_it_and_loses_nothing(done: tuple[Path, list[str], int]) -> None:
    _, printed, status = done
    assert status == 130
    text = "".join(printed)
    assert "a parent, " in text  # the steps are listed
    assert "iteration 1/" not in text.split("[5/10]")[0], "the parent was trained again"


def test_report_has_the_contract_s_keys(report: dict[str, Any]) -> None:
    assert report["schema"] == 1
    assert set(report["parent"]) == {"parameters", "validation_loss"}
    assert report["validation_tokens"] >= 50_000
    names = [budget["name"] for budget in report["budgets"]]
    assert names == ["p100", "p75", "p50"]
    for budget in report["budgets"]:
        assert set(budget) == {
            "name", "fraction", "parameters", "selection", "validation_loss_family", "validation_loss_extracted",
            "validation_loss_untrained", "validation_loss_random_cut", "validation_loss_from_scratch", "checkpoint",
        }  # fmt: skip


def test_every_expectation_holds(report: dict[str, Any]) -> None:
    checks = check_report(report)
    assert len(checks) >= 7
    assert not [check for check in checks if not check.passed], checks


def test_plots_and_page_are_there(done: tuple[Path, list[str], int]) -> None:
    out = done[0]
    assert (out / "report.md").read_text().count(".png") >= 3
    assert len(list(out.glob("**/*.png"))) >= 3


def test_wandb_has_one_run_of_the_family_with_the_report_and_every_budget(
    done: tuple[Path, list[str], int], report: dict[str, Any]
) -> None:
    """Interrupted, resumed, next stage, report: four parts of one run. The parent and the baseline have their own."""
    out = done[0]
    known = json.loads((out / "family" / "wandb_run.json").read_text())["id"]
    runs = offline_runs(out / "wandb")
    parts = [run for run in runs if run["id"] == known]
    assert len(parts) >= 4
    assert len({run["id"] for run in runs}) == 3
    assert parts[-1]["artifacts"] == {
        "quickstart-report": "report",
        **{f"quickstart-{budget['name']}": "model" for budget in report["budgets"]},
    }
    smallest = report["budgets"][-1]
    assert parts[-1]["summary"][f"report/{smallest['name']}/parameters"] == smallest["parameters"]


def test_the_page_names_every_budget(done: tuple[Path, list[str], int], report: dict[str, Any]) -> None:
    page = (done[0] / "report.md").read_text()
    assert all(budget["name"] in page for budget in report["budgets"])


def test_evaluate_prints_one_object_with_the_report_s_loss(
    done: tuple[Path, list[str], int], report: dict[str, Any]
) -> None:
    out, smallest = done[0], report["budgets"][-1]
    family = elastic(
        "evaluate", "--checkpoint", "family", "--budget", smallest["name"], "--data", "corpus/validation",
        "--tokens", 20000, "--json", cwd=out,
    )  # fmt: skip
    alone = elastic(
        "evaluate", "--checkpoint", smallest["checkpoint"], "--data", "corpus/validation", "--tokens", 20000, "--json",
        cwd=out,
    )  # fmt: skip
    assert family.returncode == alone.returncode == 0, family.stderr + alone.stderr
    one, other = json.loads(family.stdout), json.loads(alone.stdout)
    assert one["tokens"] == other["tokens"] == 20000
    assert one["parameters"] == other["parameters"] == smallest["parameters"]
    assert abs(one["loss"] - other["loss"]) < 1e-5  # fp32 sums in another order
    largest = elastic(
        "evaluate", "--checkpoint", "family", "--budget", "p100", "--data", "corpus/validation", "--tokens", 20000,
        "--json", cwd=out,
    )  # fmt: skip
    assert abs(json.loads(largest.stdout)["loss"] - one["loss"]) > 1e-3


def test_a_second_run_does_nothing(done: tuple[Path, list[str], int]) -> None:
    before = {path: path.stat().st_mtime_ns for path in done[0].glob("**/*.distcp")}
    again = quickstart(done[0])
    text = "".join(lines_of(again))
    assert again.wait(timeout=600) == 0, text
    assert "iteration 1/" not in text
    assert before == {path: path.stat().st_mtime_ns for path in done[0].glob("**/*.distcp")}


def test_one_more_data_set(done: tuple[Path, list[str], int], tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("A text of my own. " * 200)
    made = elastic(
        "corpus", "--text", tmp_path / "text", "--tokenizer", done[0] / "corpus" / "tokenizer",
        "--out", tmp_path / "mine", cwd=tmp_path,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    assert (tmp_path / "mine.bin").stat().st_size > 0
    assert (tmp_path / "mine.idx").exists()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("extract", "--checkpoint", "nowhere", "--budget", "p50", "--out", "x"), "nowhere"),
        (("extract", "--checkpoint", "parent", "--budget", "p50", "--out", "x"), "family"),
        (("extract", "--checkpoint", "family", "--budget", "p51", "--out", "x"), "p51"),
        (("evaluate", "--checkpoint", "budgets/p50", "--budget", "p50", "--data", "corpus/validation"), "family"),
        (("evaluate", "--checkpoint", "family", "--data", "corpus/nothing"), "corpus/nothing"),
    ],
)
def test_bad_input_is_one_message(done: tuple[Path, list[str], int], words: tuple[str, ...], reason: str) -> None:
    result = elastic(*words, cwd=done[0])
    assert result.returncode == 1
    errors = [line for line in result.stderr.splitlines() if line.startswith("megatron-elastic: error:")]
    assert len(errors) == 1
    assert reason in errors[0]
    assert "Traceback" not in result.stderr
    assert not (done[0] / "x").exists()
