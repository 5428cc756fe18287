"""The command line from outside: exit statuses, one message, nothing heavy before it is needed."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from megatron_elastic.cli import launch
from megatron_elastic.cli.main import COMMANDS, build_parser, main
from megatron_elastic.errors import CheckpointError, ElasticError, RecipeError

ROOT = Path(__file__).resolve().parents[3]
RECIPE = ROOT / "recipes" / "quickstart.yaml"


def run(*words: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("RANK", None)
    command = [sys.executable, "-m", "megatron_elastic", *map(str, words)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600, check=False)


def test_help_imports_nothing_heavy() -> None:
    done = run("--help")
    assert done.returncode == 0
    assert all(name in done.stdout for name in COMMANDS)
    assert "_stage" not in done.stdout
    parser = "import sys; from megatron_elastic.cli.main import build_parser; build_parser(); print(*sys.modules)"
    shown = subprocess.run([sys.executable, "-c", parser], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    imported = set(shown.split())
    assert "megatron_elastic.cli.train" in imported
    assert not imported & {"torch", "megatron", "megatron.core", "numpy", "yaml", "transformers", "matplotlib"}


def test_the_package_imports_neither_torch_nor_the_engine() -> None:
    program = "import sys, megatron_elastic; print(*sys.modules)"
    shown = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "megatron_elastic" in shown.split()
    assert not set(shown.split()) & {"torch", "megatron", "megatron.core", "transformers"}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) > 6
    choices = next(a for a in build_parser()._actions if hasattr(a, "choices") and a.choices).choices
    assert choices is not None
    for action in choices[name]._actions:
        assert action.help, f"{name} {action.dest} has no help"


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["nonsense"],
        ["train"],
        ["train", "recipe.yaml", "--ranks", "0"],
        ["train", "recipe.yaml", "--ranks", "two"],
        ["extract", "--checkpoint", "family"],
        ["evaluate", "--checkpoint", "family", "--data", "corpus/train", "--tokens", "0"],
        ["_nothing"],
    ],
)
def test_bad_usage_is_status_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    assert "usage: megatron-elastic" in capsys.readouterr().err


def test_a_bad_recipe_is_status_2_with_every_fault(tmp_path: Path) -> None:
    recipe = yaml.safe_load(RECIPE.read_text("utf-8"))
    recipe["megatron"]["fp16"] = True
    recipe["elastic"]["colour"] = "blue"
    recipe["elastic"]["axes"]["ffn"] = [384, 300]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    done = run("train", "recipe.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    for text in ("megatron-elastic: error:", "3 fault(s)", "megatron.fp16", "elastic.colour", "choice 300"):
        assert text in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


@pytest.mark.parametrize(
    "words",
    [
        ["evaluate", "--checkpoint", "none", "--data", "corpus/train", "--json"],
        ["extract", "--checkpoint", "none", "--budget", "p50", "--out", "out", "--json"],
        ["report", "--dir", "none"],
        ["rank", RECIPE, "--checkpoint", "none", "--out", "scores.pt"],
        ["train", RECIPE],
    ],
)
def test_what_is_missing_is_status_1_and_one_message(words: list[object], tmp_path: Path) -> None:
    done = run(*words, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    assert done.stderr.count("megatron-elastic: error:") == 1
    assert "does not exist" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "status"),
    [(CheckpointError("gone"), 1), (ElasticError("no"), 1), (RecipeError(["a", "b"]), 2), (KeyboardInterrupt(), 130)],
)
def test_exit_statuses(
    error: BaseException, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from megatron_elastic.cli import report

    def fail(arguments: object) -> int:
        raise error

    monkeypatch.setattr(report, "run", fail)
    assert main(["report", "--dir", "x"]) == status
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("megatron-elastic: ")
    if isinstance(error, RecipeError):
        assert "  - a\n  - b" in shown.err


def test_a_failure_that_is_not_the_users_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_elastic.cli import report

    monkeypatch.setattr(report, "run", lambda arguments: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        main(["report", "--dir", "x"])


# Children: their output, their failure, their end.


def child(text: str) -> list[str]:
    return [sys.executable, "-c", text]


def test_output_goes_to_the_log_and_progress_to_the_console(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    lines = [
        "elastic | stage 1 | iteration 10",
        "loading something",
        " [2030-01-01 00:00:00.000000] iteration       10/     120 | consumed samples:  320 | lm loss: 5.2E+00 |",
        " validation loss at iteration 10 | kd p50 value: 1.0E+00 | kd p50 PPL: 2.7E+00 | ",
    ]
    launch.run_children([child(f"print({chr(10).join(lines)!r})")], what="a child", log=tmp_path / "logs" / "a.log")
    assert (tmp_path / "logs" / "a.log").read_text().splitlines() == lines
    assert capfd.readouterr().out.splitlines() == [
        "  elastic | stage 1 | iteration 10",
        "  iteration 10/120 | lm loss: 5.2E+00",
        "  validation loss at iteration 10 | kd p50 value: 1.0E+00",
    ]


def test_a_failed_child_shows_its_status_and_the_end_of_its_output(tmp_path: Path) -> None:
    command = child("import sys\nfor i in range(99): print('line', i)\nsys.exit(3)")
    with pytest.raises(ElasticError, match=r"a child ended with status 3") as failure:
        launch.run_children([command], what="a child", log=tmp_path / "a.log")
    assert "line 98" in str(failure.value)
    assert "line 50" not in str(failure.value)
    assert str(tmp_path / "a.log") in str(failure.value)


def test_a_childs_own_message_is_shown_alone(tmp_path: Path) -> None:
    command = child("print('noise\\nmegatron-elastic: error: no parent\\n  - this\\nmore noise'); raise SystemExit(1)")
    with pytest.raises(ElasticError, match=r"^no parent\n  - this\n") as failure:
        launch.run_children([command], what="a child", log=tmp_path / "a.log")
    assert "noise" not in str(failure.value)


def test_one_failure_ends_the_others_and_is_the_one_that_is_told(tmp_path: Path) -> None:
    slow, bad = child("import time; time.sleep(600)"), child("raise SystemExit(4)")
    start = time.monotonic()
    with pytest.raises(ElasticError, match="status 4"):
        launch.run_children([slow, bad], what="children", log=tmp_path / "a.log")
    assert time.monotonic() - start < 300  # the slow one would have taken twice that


def test_json_stands_alone_on_stdout() -> None:
    text = """
import os
from megatron_elastic.cli.output import show, stdout_to_stderr
with stdout_to_stderr():
    print("from python")
    os.system("echo from a child")
show({"loss": 1.5}, as_json=True)
"""
    done = subprocess.run([sys.executable, "-c", text], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == '{"loss": 1.5}\n'
    assert "from python" in done.stderr
    assert "from a child" in done.stderr
