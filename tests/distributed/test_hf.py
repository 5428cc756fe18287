"""transformers, Megatron's plain model, the elastic model and what is exported compute the same logits (fp32).

Random models of transformers' own making go in, are sorted, cut and written, and transformers loads what comes out.
"""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_elastic.budget import Selection
from megatron_elastic.checkpoint import find_checkpoint, model_flags, read_metadata
from megatron_elastic.extraction import extract_budget
from megatron_elastic.hf.config import SHORTEST_TIME_STEP, read_config
from megatron_elastic.hf.exporting import export_model
from megatron_elastic.hf.importing import import_model
from megatron_elastic.layout import Layout
from megatron_elastic.sorting import orders_from_scores, sort_checkpoint
from tests.distributed.standalone_parent import logits
from tests.unit.hf import families, folders

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(torch.cuda.is_available(), reason="compares on the CPU adaptation, which refuses CUDA"),
]
TOLERANCE = 1e-5
"""Of the largest logit: fp32, the same sums in another order (scan in other chunks, heads and experts together)."""
KINDS = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}


@pytest.fixture(scope="module")
def process():
    from megatron_elastic import standalone

    with standalone.single_process():
        yield standalone


def drawn(seed: int, kinds: str) -> dict[str, Any]:
    """Fields of a random small configuration with layers of these kinds."""
    draw = random.Random(seed)
    groups, kv = draw.choice((1, 2, 4)), draw.choice((1, 2))
    layers = [*kinds, *draw.choices(kinds, k=2)]
    draw.shuffle(layers)
    return {
        "layers_block_type": [KINDS[kind] for kind in layers],
        "vocab_size": draw.choice((50, 96)),
        "hidden_size": draw.choice((24, 40)),
        "intermediate_size": draw.choice((16, 32)),
        "num_attention_heads": kv * draw.choice((2, 4)),
        "num_key_value_heads": kv,
        "head_dim": draw.choice((6, 8)),
        "mamba_num_heads": groups * draw.choice((2, 4)),
        "mamba_head_dim": draw.choice((4, 8)),
        "n_groups": groups,
        "ssm_state_size": draw.choice((5, 16)),
        "chunk_size": 16,
        "n_routed_experts": draw.choice((4, 8)),
        "num_experts_per_tok": draw.choice((2, 3)),
        "moe_intermediate_size": draw.choice((12, 16)),
        "moe_shared_expert_intermediate_size": draw.choice((8, 20)),
        "routed_scaling_factor": draw.choice((1.0, 2.5)),
    }


def save(folder: Path, fields: dict[str, Any]) -> Path:
    """A model of transformers' own, every weight away from its initial value."""
    from transformers.models.nemotron_h import NemotronHConfig, NemotronHForCausalLM

    torch.manual_seed(1)
    model = NemotronHForCausalLM(NemotronHConfig(**fields))
    with torch.no_grad():
        for name, state in model.state_dict(keep_vars=True).items():
            if name.endswith("dt_bias"):
                # Transformers raises time steps to `time_step_min`, Megatron and the engines do not: all are longer.
                state.uniform_(-3, 1)
            elif state.dim() == 1:
                state.add_(torch.randn_like(state), alpha=0.2)
            else:
                state.normal_(std=0.2)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(folders.FILES["tokenizer.json"])
    return folder


@torch.no_grad()
def theirs(folder: Path, text: Tensor) -> Tensor:
    """Logits of what transformers loads."""
    from transformers import AutoModelForCausalLM

    # Eager experts: torch's grouped product asks for widths that are multiples of four numbers.
    model, told = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, experts_implementation="eager")
    assert not any(told[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    # Without a cache: transformers' own needs an attention layer, which may have been left out.
    return model.eval()(text, use_cache=False).logits


def plain(process: Any, checkpoint: Path, text: Tensor) -> Tensor:
    """Logits of a checkpoint in core's model."""
    path = find_checkpoint(checkpoint)
    described = read_metadata(path)
    if described is None:
        model = process.build_plain_model(model_flags(path))
    else:
        model = process.build_plain_model(described.flags, shape=described.shape)
    process.load_weights(model, checkpoint)
    return logits(model, text)


def elastic(process: Any, family: Path, text: Tensor, selection: Selection) -> Tensor:
    """Logits of a selection inside its family."""
    described = read_metadata(find_checkpoint(family))
    assert described is not None
    model = process.build_elastic_model(described.flags, described.family)
    process.load_weights(model, family)
    return logits(model, text, selection=selection)


def deviation(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).abs().max() / b.abs().max())


def half(folder: Path, draw: random.Random) -> Selection:
    """A smaller choice on most axes that the model has, and perhaps a layer less."""
    shape = read_config(folder).shape
    blocks = {
        "hidden": 1, "mamba_head_dim": 1, "mamba_heads": shape.mamba_groups, "attention_heads": shape.query_groups,
        "ffn": families.FFN_BLOCKS, "expert_ffn": families.FFN_BLOCKS, "shared_expert_ffn": families.FFN_BLOCKS,
        "experts": families.EXPERT_BLOCKS,
    }  # fmt: skip
    kept: dict[str, Any] = {}
    for axis, size in shape.full.items():
        if axis != "depth":
            choices = range(blocks[axis], size + 1, blocks[axis])
            smaller = [c for c in choices if size / 3 < c < size and not (axis == "experts" and c < shape.top_k)]
            kept[axis] = draw.choice(smaller or [size])
    skipped = draw.sample(range(len(shape.pattern)), draw.choice((0, 1)))
    return Selection(**kept, skipped=tuple(skipped))


CASES = [(seed, kinds) for kinds in ("M*-", "M*E", "M*-E") for seed in range(2)]


@pytest.mark.parametrize(("seed", "kinds"), CASES)
def test_what_goes_in_and_what_comes_out_is_what_transformers_computes(process, tmp_path, seed, kinds):
    source = save(tmp_path / "hf", drawn(seed, kinds))
    text = torch.randint(50, (2, 37), generator=torch.Generator().manual_seed(seed))
    original = theirs(source, text)
    draw = random.Random(seed)
    chosen = half(source, draw)
    family = families.write(source, tmp_path, chosen, replace(chosen, hidden=chosen.hidden - 1))

    assert deviation(plain(process, tmp_path / "imported", text), original) < TOLERANCE
    assert deviation(elastic(process, family, text, families.full(read_config(source).raw)), original) < TOLERANCE

    inside = elastic(process, family, text, chosen)
    assert deviation(inside, original) > 1e-2
    export_model(family, tmp_path / "out", budget="b1")
    assert deviation(theirs(tmp_path / "out", text), inside) < TOLERANCE
    extract_budget(family, "b1", tmp_path / "extracted")
    assert deviation(plain(process, tmp_path / "extracted", text), inside) < TOLERANCE
    export_model(family, tmp_path / "one channel less", budget="b2")
    assert deviation(theirs(tmp_path / "one channel less", text), inside) > 1e-4


@pytest.mark.parametrize("end", ["q_proj.weight", "A_log", "dt_bias", "mixer.D", "conv1d.bias", "mixer.norm.weight",
                                 "e_score_correction_bias", "experts.1.up_proj.weight", "gate.weight"])  # fmt: skip
def test_a_tensor_in_another_place_shows(process, tmp_path, end):
    """Every kind of tensor matters to the logits: with its entries in another order they are others."""
    source = save(tmp_path / "hf", {**drawn(3, "M*E"), "num_experts_per_tok": 2})
    text = torch.randint(50, (2, 37), generator=torch.Generator().manual_seed(3))
    original, tensors = theirs(source, text), folders.read(source)
    name = next(name for name in tensors if name.endswith(end))
    tensors[name] = tensors[name].flip(0)
    for file in source.glob("*.safetensors*"):
        file.unlink()
    folders.save(source, tensors)
    import_model(source, tmp_path / "imported")
    assert deviation(plain(process, tmp_path / "imported", text), original) > 1e-4


def test_a_parent_sorted_by_importance_is_the_same_model(process, tmp_path):
    from megatron_elastic.importance.collect import collect_scores

    source = save(tmp_path / "hf", drawn(5, "M*-E"))
    shape, text = read_config(source).shape, torch.randint(50, (2, 37), generator=torch.Generator().manual_seed(5))
    original = theirs(source, text)
    import_model(source, tmp_path / "imported")
    flags = model_flags(find_checkpoint(tmp_path / "imported"))
    model = process.build_plain_model(flags)
    process.load_weights(model, tmp_path / "imported")
    layout = Layout(shape, families.FFN_BLOCKS, families.EXPERT_BLOCKS)
    sort_checkpoint(
        tmp_path / "imported", tmp_path / "sorted", shape=shape, flags=flags, ffn_blocks=families.FFN_BLOCKS,
        expert_blocks=families.EXPERT_BLOCKS, orders=orders_from_scores(layout, collect_scores(model, [text])),
    )  # fmt: skip
    export_model(tmp_path / "sorted", tmp_path / "out")
    assert deviation(theirs(tmp_path / "out", text), original) < TOLERANCE
    before, after = folders.read(source), folders.read(tmp_path / "out")
    assert not any(torch.equal(before[name], after[name]) for name in before)
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_time_steps_that_transformers_raises_are_told(process, tmp_path):
    source = save(tmp_path / "hf", drawn(6, "M*-"))
    tensors = folders.read(source)
    for name in tensors:
        if name.endswith("dt_bias"):
            tensors[name][0] = -9.0
    folders.save(source, tensors, 10**9)
    (source / "tokenizer.json").unlink()
    import_model(source, tmp_path / "imported")
    warnings = export_model(tmp_path / "imported", tmp_path / "out")["warnings"]
    heads = sum(len(tensor) for name, tensor in tensors.items() if name.endswith("dt_bias"))
    layers = sum(name.endswith("dt_bias") for name in tensors)
    assert any(f"{layers} of {heads} Mamba heads have time steps below time_step_min 0.001" in w for w in warnings)
    text = torch.randint(50, (2, 37), generator=torch.Generator().manual_seed(6))
    trained = plain(process, tmp_path / "imported", text)
    assert deviation(theirs(tmp_path / "out", text), trained) > TOLERANCE
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    (tmp_path / "out" / "config.json").write_text(json.dumps({**config, "time_step_min": SHORTEST_TIME_STEP}))
    assert deviation(theirs(tmp_path / "out", text), trained) < TOLERANCE


@pytest.mark.parametrize("axes", ["experts and neurons", "Mamba heads", "attention heads"])
def test_layers_that_differ_are_read_back_and_compute_the_same(process, tmp_path, axes):
    fields = {
        **drawn(4, "M*-E"), "layers_block_type": [KINDS[kind] for kind in "ME*M-E-*"], "n_groups": 2,
        "mamba_num_heads": 8, "num_attention_heads": 8, "num_key_value_heads": 2, "n_routed_experts": 8,
        "num_experts_per_tok": 2, "intermediate_size": 32, "moe_intermediate_size": 16,
    }  # fmt: skip
    source = save(tmp_path / "hf", fields)
    whole = families.full(read_config(source).raw)
    chosen = {
        "experts and neurons": replace(whole, experts=(4, 8), expert_ffn=(16, 6), ffn=(20, 32)),
        "Mamba heads": replace(whole, mamba_heads=(8, 4)),
        "attention heads": replace(whole, attention_heads=(4, 8)),
    }[axes]
    text = torch.randint(50, (2, 37), generator=torch.Generator().manual_seed(4))
    family = families.write(source, tmp_path, chosen)
    inside = elastic(process, family, text, chosen)
    export_model(family, tmp_path / "out", budget="b1")
    import_model(tmp_path / "out", tmp_path / "again")
    assert deviation(plain(process, tmp_path / "again", text), inside) < TOLERANCE
    assert deviation(elastic(process, family, text, whole), inside) > 1e-2
