"""`tests/run.sh` ends with a status that tells whether everything passed; linters and pytest are stubs here."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# $FAILS names the call that fails: "ruff", "mypy", "unit" (the tests beside the others) or "rest".
STUB = """#!/usr/bin/env bash
call="$(basename "$0") $*"
case "$call" in
  python*" -n 2 "*tests/unit*) part=unit ;;
  python*) part=rest ;;
  *) part="$(basename "$0")" ;;
esac
echo "$part: $call"
[[ $part != "${FAILS:-}" ]]
"""


def run(folder: Path, fails: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The script in a clone whose set-up does nothing but put the stubs on PATH."""
    for made in ("bin", "launch", "tests", "temporary"):
        (folder / made).mkdir()
    (folder / "launch" / "environment.sh").write_text(f'PATH="{folder}/bin:$PATH"\n')
    for name in ("ruff", "mypy", "python"):
        (folder / "bin" / name).write_text(STUB)
        (folder / "bin" / name).chmod(0o755)
    script = folder / "tests" / "run.sh"
    script.write_text((ROOT / "tests" / "run.sh").read_text())
    environment = {"PATH": "/usr/bin:/bin", "TMPDIR": str(folder / "temporary"), "FAILS": fails}
    return subprocess.run(
        ["bash", str(script), *arguments], env=environment, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize("fails", ["", "ruff", "mypy", "unit", "rest"])
def test_the_status_is_that_of_every_part(tmp_path: Path, fails: str) -> None:
    ended = run(tmp_path, fails, "--maxfail", "1")
    assert (ended.returncode == 0) == (not fails), (ended.stdout, ended.stderr)
    if fails in ("", "unit", "rest"):  # Both parts have run to their end, with the user's arguments.
        assert [line.split(":")[0] for line in ended.stdout.splitlines()] == ["ruff", "mypy", "rest", "unit"]
        assert ended.stdout.count("--maxfail 1") == 2
    assert not list((tmp_path / "temporary").iterdir())


@pytest.mark.parametrize("fails", ["", "rest"])
def test_named_files_run_alone(tmp_path: Path, fails: str) -> None:
    (tmp_path / "one.py").write_text("")
    ended = run(tmp_path, fails, "one.py", "-x")
    assert (ended.returncode == 0) == (not fails)
    assert ended.stdout.splitlines()[2:] == ["rest: python -m pytest -q one.py -x"]
