"""What `pip install .` asks for is what the scripts install, at the versions that are tested."""

import ast
import importlib.metadata
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from email.parser import Parser
from pathlib import Path

import pytest

import megatron_elastic

ROOT = Path(__file__).resolve().parents[2]
LINES = [line.strip() for line in (ROOT / "docker" / "versions.txt").read_text("utf-8").splitlines()]
INSTALLED = [line for line in LINES if line and not line.startswith("#")]
"""What launch/environment.sh installs: pip reads the file as it is."""
PINS = dict(line.split("==") for line in INSTALLED)
SECTIONS: dict[str, dict[str, str]] = runpy.run_path(str(ROOT / "docker" / "pins.py"))["read"]()


@pytest.fixture(scope="module")
def requirements(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """`Requires-Dist` of the metadata that pip reads, as the build backend writes it; offline."""
    # The backend leaves its own files in the source folder: a copy.
    folder = tmp_path_factory.mktemp("metadata")
    source, out = folder / "source", folder / "out"
    for name in ("docker", "megatron_elastic", "recipes"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("MANIFEST.in", "README.md", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, source)
    out.mkdir()
    program = f"from setuptools.build_meta import prepare_metadata_for_build_wheel as make; make({str(out)!r})"
    subprocess.run([sys.executable, "-c", program], cwd=source, capture_output=True, check=True, timeout=300)
    (path,) = out.glob("*.dist-info/METADATA")
    found = Parser().parsestr(path.read_text("utf-8"))
    assert found["Version"] == megatron_elastic.__version__
    return list(found.get_all("Requires-Dist", []))


def of_extra(requirements: list[str], extra: str | None) -> list[str]:
    """Requirements of an extra, or those without one."""
    parts = [requirement.partition(";") for requirement in requirements]
    if extra is None:
        return [name.strip() for name, _, marker in parts if not marker]
    return [name.strip() for name, _, marker in parts if f'extra == "{extra}"' in marker]


def faults_of_gpu_requirements(requirements: list[str]) -> list[str]:
    """What must not be asked for by any name, with or without an extra."""
    found = []
    for requirement in requirements:
        name, extras = re.match(r"([A-Za-z0-9_.-]+)\s*(?:\[([^]]*)\])?", requirement).groups()  # type: ignore[union-attr]
        kinds = {extra.strip().replace("_", "-") for extra in (extras or "").split(",")}
        if re.sub(r"[-_.]+", "-", name).lower() == "apex":
            found.append(f"{requirement}: the registry's package of that name is another project")
        if re.sub(r"[-_.]+", "-", name).lower() == "transformer-engine":
            if not kinds & {"core-cu12", "core-cu13"}:
                found.append(f"{requirement}: without its CUDA core")
            if "pytorch" not in kinds:
                found.append(f"{requirement}: without its binding to torch")
    return found


def test_every_pin_is_one_exact_version_in_a_section() -> None:
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9]+(\.[0-9]+)+", line) for line in INSTALLED)
    assert list(SECTIONS) == ["runtime", "dev", "gpu"]
    assert {**SECTIONS["runtime"], **SECTIONS["dev"]} == {line.split("==")[0]: line for line in INSTALLED}
    assert len(PINS) == len(INSTALLED)
    assert set(SECTIONS["gpu"]) == {"transformer-engine", "causal-conv1d", "mamba-ssm"}


def test_the_package_asks_for_what_is_pinned(requirements: list[str]) -> None:
    runtime = of_extra(requirements, None)
    assert {re.split("[=<>~!]", one)[0] for one in runtime} == set(SECTIONS["runtime"])
    assert f"megatron-core=={PINS['megatron-core']}" in runtime
    assert set(of_extra(requirements, "dev")) == set(SECTIONS["dev"].values())
    pinned = {re.sub(r"\[.*\]", "", one) for one in of_extra(requirements, "gpu")}
    assert pinned == set(SECTIONS["gpu"].values())


def test_gpu_packages_are_asked_for_as_they_must_be(requirements: list[str]) -> None:
    gpu = of_extra(requirements, "gpu")
    version = SECTIONS["gpu"]["transformer-engine"].split("==")[1]
    assert f"transformer-engine[core_cu13,pytorch]=={version}" in [one.replace("core-cu13", "core_cu13") for one in gpu]
    assert faults_of_gpu_requirements(requirements) == []


@pytest.mark.parametrize(
    ("requirement", "count"),
    [
        ("transformer-engine==2.20.2; extra == 'gpu'", 2),
        ("transformer_engine", 2),
        ("transformer-engine[pytorch]", 1),
        ("Transformer.Engine[core_cu13]", 1),
        ("transformer-engine[pytorch, core-cu12]>=2", 0),
        ("apex", 1),
        ("Apex>=0.1; extra == 'dev'", 1),
    ],
)
def test_a_bare_requirement_shows(requirement: str, count: int) -> None:
    assert len(faults_of_gpu_requirements([requirement])) == count


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
