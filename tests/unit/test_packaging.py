"""What `pip install .` asks for is what the scripts install, at the versions that are tested."""

import ast
import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest

import megatron_elastic

ROOT = Path(__file__).resolve().parents[2]
LINES = [line.strip() for line in (ROOT / "docker" / "versions.txt").read_text("utf-8").splitlines()]
PINS = dict(line.split("==") for line in LINES if line and not line.startswith("#"))


def setup_arguments(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    import setuptools

    caught: dict[str, object] = {}
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: caught.update(arguments))
    source = (ROOT / "setup.py").read_text("utf-8")
    exec(compile(source, str(ROOT / "setup.py"), "exec"), {"__file__": str(ROOT / "setup.py"), "__name__": "__main__"})
    return caught


def test_every_pin_is_one_exact_version() -> None:
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9]+(\.[0-9]+)+", line) for line in LINES if line and line[0] != "#")
    assert len(PINS) == sum(bool(line) and line[0] != "#" for line in LINES)


def test_the_package_asks_for_nothing_that_is_not_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = setup_arguments(monkeypatch)
    extras = arguments["extras_require"]
    runtime = arguments["install_requires"]
    assert isinstance(extras, dict)
    assert isinstance(runtime, list)
    asked = [*runtime, *extras["dev"]]
    assert {re.split("[=<>~!]", one)[0] for one in asked} == set(PINS)
    assert f"megatron-core=={PINS['megatron-core']}" in runtime
    assert arguments["version"] == megatron_elastic.__version__


def test_gpu_packages_are_asked_for_as_they_must_be(monkeypatch: pytest.MonkeyPatch) -> None:
    extras = setup_arguments(monkeypatch)["extras_require"]
    assert isinstance(extras, dict)
    assert "transformer-engine[pytorch]" in extras["gpu"]
    assert "transformer-engine" not in extras["gpu"]
    assert not any(re.split(r"[\[=<>]", one)[0] == "apex" for group in extras.values() for one in group)


def test_the_engines_training_extra_is_covered() -> None:
    needed = [
        re.split("[;<>=~! ]", requirement)[0].lower()
        for requirement in importlib.metadata.requires("megatron-core") or []
        if 'extra == "training"' in requirement
    ]
    assert needed
    assert set(needed) <= set(PINS)


def test_the_tests_run_with_the_pinned_versions() -> None:
    installed = {name: importlib.metadata.version(name) for name in PINS}
    # A build of torch for one machine carries its own suffix.
    assert {name: version.split("+")[0] for name, version in installed.items()} == PINS


def test_the_strict_list_names_modules_that_are_there() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["mypy"]["overrides"][0]
    modules = [name.removesuffix(".*").removeprefix("megatron_elastic.") for name in settings["module"]]
    names = [name.replace(".", "/") for name in modules]
    package = ROOT / "megatron_elastic"
    missing = [name for name in names if not (package / f"{name}.py").exists() and not (package / name).is_dir()]
    assert missing == []
    assert settings["disallow_untyped_defs"] is True


def test_the_init_holds_a_docstring_and_a_version_only() -> None:
    tree = ast.parse((ROOT / "megatron_elastic" / "__init__.py").read_text("utf-8"))
    assert [type(node) for node in tree.body] == [ast.Expr, ast.Assign]


def test_the_readme_counts_the_gpu_tests_that_never_ran() -> None:
    files = sorted((ROOT / "tests" / "gpu").glob("test_*.py"))
    count = sum(len(re.findall(r"^def test_", path.read_text("utf-8"), flags=re.MULTILINE)) for path in files)
    assert f"{count} of them, and none has ever run" in (ROOT / "README.md").read_text("utf-8")
