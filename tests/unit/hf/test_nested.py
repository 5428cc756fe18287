"""One folder for a family: what its script cuts is what `export` writes."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_elastic.errors import CheckpointError
from megatron_elastic.hf.exporting import export_model
from megatron_elastic.hf.importing import import_model
from tests.unit.hf import families, folders

SIZES = {"hidden": 9, "ffn": 12, "attention_heads": 2}
"""Of a second budget: ranges that do not begin where those of the first do."""


def slice_(folder: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, str(folder / "slice.py"), *words], capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module", params=folders.CONFIGS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """A nested folder, a family, and every budget as `export` writes it."""
    config, root = folders.CONFIGS[request.param], tmp_path_factory.mktemp("nested")
    second = replace(families.full(config), **SIZES)
    if request.param == "moe":
        second = replace(second, experts=(4, 8), expert_ffn=(6, 4))
    family = families.write(folders.write(root / "hf", config), root, families.half(config), second)
    export_model(family, root / "nested", nested=True, shard_bytes=5000)
    for budget in ("b0", "b1", "b2"):
        export_model(family, root / budget, budget=budget)
    return config, root


@pytest.mark.parametrize("budget", ["b1", "b2"])
def test_the_script_cuts_what_export_writes(made: tuple[dict[str, Any], Path], budget: str) -> None:
    _, root = made
    done = slice_(root / "nested", "--budget", budget, "--out", str(root / f"cut {budget}"), "--shard-gb", "2e-6")
    assert done.returncode == 0, done.stderr
    cut, exported = root / f"cut {budget}", root / budget
    assert len(list(cut.glob("*.safetensors"))) > 1
    assert folders.same(folders.read(cut), folders.read(exported))
    assert json.loads((cut / "config.json").read_text()) == json.loads((exported / "config.json").read_text())
    kept = [{p.name for p in folder.iterdir() if "model" not in p.name} for folder in (cut, exported)]
    assert kept[0] == kept[1]
    assert (cut / "tokenizer.json").read_bytes() == folders.FILES["tokenizer.json"]
    other = "b1" if budget == "b2" else "b2"
    assert not folders.same(folders.read(cut), folders.read(root / other))
    import_model(cut, root / f"again {budget}")


def test_the_folder_is_the_largest_model(made: tuple[dict[str, Any], Path]) -> None:
    _, root = made
    assert folders.same(folders.read(root / "nested"), folders.read(root / "b0"))
    description = json.loads((root / "nested" / "elastic.json").read_text())
    assert list(description["budgets"]) == ["b0", "b1", "b2"]
    assert description["budgets"]["b1"]["selection"]["hidden"] == 6


def test_the_script_refuses_what_it_cannot_do(made: tuple[dict[str, Any], Path]) -> None:
    _, root = made
    before = sorted(root.iterdir())
    unknown = slice_(root / "nested", "--budget", "b9", "--out", str(root / "new"))
    assert (unknown.returncode, "invalid choice: 'b9'" in unknown.stderr) == (2, True)
    taken = slice_(root / "nested", "--budget", "b1", "--out", str(root / "hf"))
    assert (taken.returncode, "exists already" in taken.stderr) == (1, True)
    assert sorted(root.iterdir()) == before


def test_a_nested_export_needs_a_family(made: tuple[dict[str, Any], Path]) -> None:
    _, root = made
    with pytest.raises(CheckpointError, match="are for a family"):
        export_model(root / "sorted", root / "new", nested=True)


def test_routers_without_a_bias_have_a_bias_of_zero(tmp_path: Path) -> None:
    source = folders.write(tmp_path / "hf", folders.MOE)
    family = families.write(source, tmp_path, families.half(folders.MOE), biased=False)
    export_model(family, tmp_path / "nested", nested=True)
    export_model(family, tmp_path / "b1", budget="b1")
    assert slice_(tmp_path / "nested", "--budget", "b1", "--out", str(tmp_path / "cut")).returncode == 0
    cut = folders.read(tmp_path / "cut")
    assert folders.same(cut, folders.read(tmp_path / "b1"))
    biases = [tensor for name, tensor in cut.items() if name.endswith("e_score_correction_bias")]
    assert biases
    assert not any(bias.any() for bias in biases)
