"""`megatron-elastic import` and `export` from the command line."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_elastic.checkpoint import carry
from megatron_elastic.cli.main import main
from tests.unit.hf import families, folders


def test_in_and_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, checkpoint, out = folders.write(tmp_path / "hf", folders.MOE), tmp_path / "checkpoint", tmp_path / "out"
    assert main(["import", "--hf", str(source), "--out", str(checkpoint), "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["layers"] == "ME*E-"
    assert made["active_parameters"] < made["parameters"]
    assert "tokenizer.json" in made["carried"]
    assert main(["export", "--checkpoint", str(checkpoint), "--out", str(out), "--shard-size", "4KB", "--json"]) == 0
    exported = json.loads(capsys.readouterr().out)
    assert exported["parameters"] == made["parameters"]
    assert exported["warnings"] == []
    assert folders.same(folders.read(out), folders.read(source))
    assert all(file.stat().st_size < 16_000 for file in out.glob("*.safetensors"))


def test_what_no_engine_loads_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = replace(families.full(folders.DENSE), mamba_heads=(8, 4))
    family = families.write(folders.write(tmp_path / "hf", folders.DENSE), tmp_path, chosen)
    assert main(["export", "--checkpoint", str(family), "--budget", "b1", "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr()
    assert "warning: mamba_heads differ between layers: no engine loads that" in shown.err
    assert "nemotron_h_puzzle" in shown.out
    assert main(["export", "--checkpoint", str(family), "--nested", "--out", str(tmp_path / "nested")]) == 0
    assert "warning: b1: mamba_heads differ" in capsys.readouterr().err


def test_every_fault_in_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = folders.write(tmp_path / "hf", folders.DENSE)
    config = {**folders.DENSE, "use_bias": True, "tie_word_embeddings": True, "vocab_size": None}
    (source / "config.json").write_text(json.dumps(config))
    assert main(["import", "--hf", str(source), "--out", str(tmp_path / "out")]) == 1
    shown = capsys.readouterr().err
    assert f"{source / 'config.json'}: 3 fault(s)" in shown
    assert all(field in shown for field in ("use_bias", "tie_word_embeddings", "vocab_size"))
    assert main(["import", "--hf", str(tmp_path / "nothing"), "--out", str(tmp_path / "out")]) == 1
    assert "cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("size", ["0", "5 bytes", "GB", "-1"])
def test_a_size_that_is_none_is_bad_usage(size: str, tmp_path: Path) -> None:
    words = ["export", "--checkpoint", str(tmp_path), "--out", str(tmp_path / "out"), f"--shard-size={size}"]
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2


def test_a_training_run_carries_what_its_parent_has(tmp_path: Path) -> None:
    folders.write(tmp_path / "hf", folders.DENSE)
    assert main(["import", "--hf", str(tmp_path / "hf"), "--out", str(tmp_path / "parent")]) == 0
    carry(tmp_path / "parent", tmp_path / "family")
    carried = tmp_path / "family" / "huggingface"
    assert (carried / "tokenizer.json").read_bytes() == folders.FILES["tokenizer.json"]
    # A second run leaves what is there.
    (carried / "tokenizer.json").write_text("the user's own")
    carry(tmp_path / "parent", tmp_path / "family")
    assert (carried / "tokenizer.json").read_text() == "the user's own"
    carry(tmp_path / "hf", tmp_path / "nothing to carry")
    assert not (tmp_path / "nothing to carry").exists()
