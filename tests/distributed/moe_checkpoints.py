"""Checkpoints of MoE models between layouts, by core's saving and loading and this package's reading and cutting."""

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import elastic_kit as kit
import moe_cases as cases
import moe_kit
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.validation import StrictHandling
from torch import Tensor

from megatron_elastic import checkpoint, standalone
from megatron_elastic.extraction import cut
from megatron_elastic.flags import model_shape, shape_flags
from megatron_elastic.layout import Layout


def _load(folder: Path, model: Any) -> None:
    """Core's own loading: all that the model asks for is there, and nothing else but the description."""
    state, strict = {"model": model.sharded_state_dict()}, StrictHandling.RETURN_ALL
    found, missing, unexpected = dist_checkpointing.load(state, str(folder), strict=strict)
    assert set(missing) <= {"elastic.metadata"}, missing
    assert not unexpected, unexpected
    model.load_state_dict(found["model"])


def _wrong(model: Any, layout: Layout, weights: Mapping[str, Tensor]) -> float:
    """How many of this rank's tensors are not, bit for bit, their part of the whole weights."""
    got = {name: state.detach().clone() for name, state in moe_kit.states(model).items()}
    moe_kit.set_weights(model, layout, weights)
    return float(sum(not torch.equal(got[name], state) for name, state in moe_kit.states(model).items()))


def _forget_attention_backend() -> None:
    """Core keeps the choice of the models before in the environment."""
    for name in ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN"):
        os.environ.pop(name, None)


def checkpoints() -> dict[str, float]:
    """Saved by core on EP 2, read and cut by the package, loaded on every layout: wrong tensors of each step."""
    family, settings = moe_kit.family(moe_kit.shape(gated=True, expert_bias=True)), moe_kit.SIGMOID
    layout, weights = family.layout, moe_kit.full_weights(family.layout)
    names: list[Any] = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(names)
    root = Path(names[0])
    saved, selection = root / "family" / "iter_0000001", cases.chosen(family)["mixture"]
    moe_kit.layout_of_ranks(1, 2, 1)
    model = moe_kit.elastic_model(family, **settings)
    moe_kit.set_weights(model, layout, weights)
    if dist.get_rank() == 0:
        saved.mkdir(parents=True)
    dist.barrier()
    state = {"model": model.sharded_state_dict(), "args": {"hidden_size": 32}, "iteration": 1}
    dist_checkpointing.save(state, str(saved), async_strategy="mcore", verify_integrity=True)
    small_weights = kit.cut(weights, layout, selection)
    errors = {}
    if dist.get_rank() == 0:
        stored = checkpoint.parameters(saved)
        errors["read"] = float(
            len(set(stored) ^ set(weights))
            + sum(not torch.equal(checkpoint.read_parameter(saved, name), weights[name]) for name in stored)
        )
        arguments = {"shape": family.shape, "ffn_blocks": family.ffn_blocks, "expert_blocks": moe_kit.EXPERT_BLOCKS}
        cut(saved, root / "small", selection=selection, flags={}, **arguments)  # type: ignore[arg-type]
    dist.barrier()
    small, shape = checkpoint.find_checkpoint(root / "small"), selection.submodel(family.shape)
    small_layout = Layout(shape, family.ffn_blocks, moe_kit.EXPERT_BLOCKS)
    for name, sizes in {"alone": (1, 1, 1, 1), **cases.LAYOUTS}.items():
        if sizes[-1] > 1:  # weights do not lie otherwise on context-parallel ranks
            continue
        moe_kit.layout_of_ranks(*sizes)
        whole = moe_kit.elastic_model(family, **settings)
        _load(saved, whole)
        errors[f"{name}/parent"] = _wrong(whole, layout, weights)
        cut_out = moe_kit.stock_model(shape, **settings)
        _load(small, cut_out)
        errors[f"{name}/extracted"] = _wrong(cut_out, small_layout, small_weights)
    moe_kit.layout_of_ranks()
    _forget_attention_backend()
    assert model_shape(moe_kit.FLAGS, []) == family.shape
    for folder, model, own, values in (
        (saved, standalone.build_elastic_model(moe_kit.FLAGS, family, torch.float64), layout, weights),
        (
            small,
            standalone.build_plain_model(shape_flags(shape, moe_kit.FLAGS), torch.float64),
            small_layout,
            small_weights,
        ),
    ):
        standalone.load_weights(model, folder)
        errors[f"{folder.parent.name}/standalone"] = _wrong(model, own, values)
    _forget_attention_backend()
    alike = moe_kit.stock_model(shape, **settings)
    moe_kit.set_weights(alike, small_layout, small_weights)
    errors["flags"] = cases.error(cases.outcome(model, small_layout), cases.outcome(alike, small_layout))
    # The negative: another parent's weights are not these.
    errors["differs"] = _wrong(model, small_layout, kit.cut(kit.full_weights(layout, 0.1), layout, selection))
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(root)
    return errors
