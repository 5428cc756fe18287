"""Import and export: what goes in comes out, bit for bit; what cannot is refused with every reason; nothing is left."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from megatron_elastic import checkpoint
from megatron_elastic.budget import Selection
from megatron_elastic.checkpoint import find_checkpoint
from megatron_elastic.errors import CheckpointError, HFError
from megatron_elastic.extraction import extract_budget
from megatron_elastic.flags import model_shape
from megatron_elastic.hf import tensors as hf_tensors
from megatron_elastic.hf.config import read_config
from megatron_elastic.hf.exporting import export_model
from megatron_elastic.hf.importing import import_model
from megatron_elastic.layout import Layout
from tests.unit.hf import families, folders

pytestmark = pytest.mark.parametrize("config", folders.CONFIGS.values(), ids=folders.CONFIGS)
Config = dict[str, Any]


def digest(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Content and time of every file."""
    return {str(p): (p.read_bytes(), p.stat().st_mtime_ns) for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_round_trip_changes_no_bit(config: Config, tmp_path: Path) -> None:
    source = folders.write(tmp_path / "hf", config)
    before = digest(source)
    imported = import_model(source, tmp_path / "checkpoint")
    exported = export_model(tmp_path / "checkpoint", tmp_path / "out", shard_bytes=4000)
    assert digest(source) == before
    assert folders.same(folders.read(tmp_path / "out"), folders.read(source))
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > len(list(source.glob("*.safetensors"))) > 1
    for name, content in folders.FILES.items():
        assert (tmp_path / "out" / name).read_bytes() == content
    assert not list((tmp_path / "out").glob("*.py"))
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert read_config(written).shape == read_config(config).shape
    assert {k: written[k] for k in config if k != "auto_map"} == {k: v for k, v in config.items() if k != "auto_map"}
    assert exported["parameters"] == imported["parameters"]
    assert exported["warnings"] == []


def test_what_was_written_is_compared_with_what_should_be(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import_model(folders.write(tmp_path / "hf", config), tmp_path / "checkpoint")
    read = hf_tensors.file_digests

    def damaged(folder: Path, names: list[str], label: str | None) -> dict[str, str]:
        content = bytearray((folder / names[0]).read_bytes())
        content[-1] ^= 1
        (folder / names[0]).write_bytes(content)
        return read(folder, names, label)

    monkeypatch.setattr(hf_tensors, "file_digests", damaged)
    with pytest.raises(HFError, match="is not what was written"):
        export_model(tmp_path / "checkpoint", tmp_path / "out", shard_bytes=4000)
    assert not (tmp_path / "out").exists()
    export_model(tmp_path / "checkpoint", tmp_path / "out", verify=False)
    assert folders.same(folders.read(tmp_path / "out"), folders.read(tmp_path / "hf"))


def test_another_weight_is_another_model(config: Config, tmp_path: Path) -> None:
    tensors = folders.weights(config)
    import_model(folders.write(tmp_path / "hf", config, tensors), tmp_path / "checkpoint")
    export_model(tmp_path / "checkpoint", tmp_path / "out")
    name = next(name for name in tensors if name.endswith("q_proj.weight"))
    assert folders.same(folders.read(tmp_path / "out"), tensors)
    tensors[name][3, 1] += 1e-6
    assert not folders.same(folders.read(tmp_path / "out"), tensors)


def test_bf16_with_a_bias_in_fp32_keeps_its_types(config: Config, tmp_path: Path) -> None:
    tensors = folders.weights(config, dtype=torch.bfloat16)
    import_model(folders.write(tmp_path / "hf", config, tensors), tmp_path / "checkpoint")
    export_model(tmp_path / "checkpoint", tmp_path / "out")
    assert folders.same(folders.read(tmp_path / "out"), tensors)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_names_of_transformers_modules_are_read(config: Config, tmp_path: Path) -> None:
    released = folders.weights(config)
    modules = {name.replace("backbone.", "model."): tensor for name, tensor in released.items()}
    for layer, kind in enumerate(config["hybrid_override_pattern"]):
        for part in ("up_proj", "down_proj") if kind == "E" else ():
            names = [f"model.layers.{layer}.mixer.experts.{e}.{part}.weight" for e in range(config["n_routed_experts"])]
            modules[f"model.layers.{layer}.mixer.experts.{part}"] = torch.stack([modules.pop(name) for name in names])
    import_model(folders.write(tmp_path / "hf", config, modules), tmp_path / "checkpoint")
    export_model(tmp_path / "checkpoint", tmp_path / "out")
    assert folders.same(folders.read(tmp_path / "out"), released)


def test_the_parent_says_what_it_is(config: Config, tmp_path: Path) -> None:
    import_model(folders.write(tmp_path / "hf", config), tmp_path / "checkpoint")
    path, shape = find_checkpoint(tmp_path / "checkpoint"), read_config(config).shape
    flags, faults = checkpoint.model_flags(path), list[str]()
    assert model_shape(flags, faults) == shape
    assert checkpoint.read_metadata(path) is None
    wanted = {n: tuple(d.size for d in dims) for n, dims in Layout(shape, 1).parameters().items()}
    assert {name: info.shape for name, info in checkpoint.parameters(path).items()} == wanted
    assert flags["tokenizer-model"] == str(tmp_path / "checkpoint" / "huggingface")
    assert (Path(flags["tokenizer-model"]) / "tokenizer.json").read_bytes() == folders.FILES["tokenizer.json"]


def family(config: Config, folder: Path, *selections: Selection) -> Path:
    return families.write(folders.write(folder / "hf", config), folder, *selections)


def test_a_budget_is_what_is_extracted_and_exported(config: Config, tmp_path: Path) -> None:
    trained = family(config, tmp_path, families.half(config))
    extract_budget(trained, "b1", tmp_path / "extracted")
    export_model(tmp_path / "extracted", tmp_path / "from extracted")
    export_model(trained, tmp_path / "from family", budget="b1")
    a, b = folders.read(tmp_path / "from extracted"), folders.read(tmp_path / "from family")
    assert folders.same(a, b)
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("from extracted", "from family")]
    assert configs[0] == configs[1]
    assert (configs[0]["eos_token_id"], configs[0]["hidden_size"]) == (11, 6)
    assert (tmp_path / "from family" / "tokenizer.json").read_bytes() == folders.FILES["tokenizer.json"]
    export_model(trained, tmp_path / "whole", budget="b0")
    assert not folders.same(folders.read(tmp_path / "whole"), a)


def test_a_family_asks_for_one_of_its_budgets(config: Config, tmp_path: Path) -> None:
    trained = family(config, tmp_path)
    with pytest.raises(CheckpointError, match=r"--budget with one of \['b0'\], or --nested"):
        export_model(trained, tmp_path / "out")
    with pytest.raises(CheckpointError, match="this is a model of its own"):
        export_model(tmp_path / "sorted", tmp_path / "out", budget="b0")
    assert not (tmp_path / "out").exists()


def test_layers_that_differ_come_back(config: Config, tmp_path: Path) -> None:
    kept = {"hidden": 12, "ffn": 16, "mamba_heads": 8, "mamba_head_dim": 4, "attention_heads": 8}
    if config is folders.MOE:
        kept.update(experts=(8, 4), expert_ffn=(4, 8), shared_expert_ffn=6)
    else:
        kept.update(mamba_heads=(8, 4))
    chosen = Selection(**kept)
    trained = family(config, tmp_path, chosen)
    made = export_model(trained, tmp_path / "out", budget="b1")
    assert made["model_type"] == "nemotron_h_puzzle"
    assert ("no engine" in made["warnings"][0]) == (config is folders.DENSE)
    import_model(tmp_path / "out", tmp_path / "again")
    described = checkpoint.read_metadata(find_checkpoint(tmp_path / "again"))
    assert described is not None
    assert described.shape == chosen.submodel(read_config(config).shape)
    extract_budget(trained, "b1", tmp_path / "extracted")
    paths = [find_checkpoint(tmp_path / name) for name in ("again", "extracted")]
    infos = [checkpoint.parameters(path) for path in paths]
    assert infos[0] == infos[1]
    assert all(torch.equal(*(checkpoint.read_parameter(path, name) for path in paths)) for name in infos[0])


def broken(config: Config, folder: Path, what: str) -> tuple[Path, str]:
    """A released model with a fault, and what is to be said of it."""
    tensors = folders.weights(config)
    q, k = (next(name for name in tensors if name.endswith(f"{each}_proj.weight")) for each in "qk")
    source = folder / "hf"
    if what == "missing":
        del tensors[q]
        told = f"{q} is missing"
    elif what == "shape":
        tensors[q] = tensors[q][:-1].clone()
        told = rf"{q} is \[23, 12\], config.json says \[24, 12\]"
    elif what == "unknown":
        tensors["backbone.layers.9.norm.weight"] = torch.ones(3)
        told = "layers.9.norm.weight has no place in this model"
    elif what == "types":
        tensors[k] = tensors[k].bfloat16()
        told = r"they are \['BF16', 'F32'\]"
    else:
        tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.int8)
        folders.write(source, config)
        shutil.rmtree(source)
        source.mkdir()
        save_file(tensors, source / "model.safetensors")
        (source / "config.json").write_text(json.dumps(config))
        return source, "lm_head.weight is I8: weights of .* are read, not quantised ones"
    return folders.write(source, config, tensors), told


@pytest.mark.parametrize("what", ["missing", "shape", "unknown", "types", "quantised"])
def test_weights_that_do_not_fit_are_told(config: Config, what: str, tmp_path: Path) -> None:
    source, told = broken(config, tmp_path, what)
    with pytest.raises(HFError, match=told):
        import_model(source, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]


@pytest.mark.parametrize("what", ["truncated", "header", "shard", "index", "none"])
def test_damaged_files_are_told_by_name(config: Config, what: str, tmp_path: Path) -> None:
    source = folders.write(tmp_path / "hf", config)
    shard = sorted(source.glob("*.safetensors"))[1]
    index = source / "model.safetensors.index.json"
    told = shard.name
    if what == "truncated":
        os.truncate(shard, shard.stat().st_size - 4)
    elif what == "header":
        raw = shard.read_bytes()
        shard.write_bytes(raw[:8] + b"\0" + raw[9:])
    elif what == "shard":
        shard.unlink()
    elif what == "index":
        places = json.loads(index.read_text())
        places["weight_map"]["lm_head.weight"] = sorted(source.glob("*.safetensors"))[0].name
        index.write_text(json.dumps(places))
        told = "lm_head.weight: .* disagree"
    else:
        index.unlink()
        told = "neither model.safetensors nor"
    with pytest.raises(HFError, match=told):
        import_model(source, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]


def test_a_full_disk_leaves_nothing(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import_model(folders.write(tmp_path / "hf", config), tmp_path / "checkpoint")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        export_model(tmp_path / "checkpoint", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint", "hf"]


def test_the_safetensors_package_reads_and_writes_the_same(config: Config, tmp_path: Path) -> None:
    tensors = folders.weights(config)
    folders.save(tmp_path / "ours", tensors, 10**9)
    with safe_open(tmp_path / "ours" / "model.safetensors", "pt") as file:
        assert folders.same({name: file.get_tensor(name) for name in file.keys()}, tensors)  # noqa: SIM118
    (tmp_path / "theirs").mkdir()
    save_file(tensors, tmp_path / "theirs" / "model.safetensors")
    assert folders.same(folders.read(tmp_path / "theirs"), tensors)
