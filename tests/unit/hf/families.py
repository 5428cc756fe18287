"""A family without training: an import, sorted at random, with its selections decided."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_elastic import checkpoint
from megatron_elastic.budget import Budget, Selection
from megatron_elastic.family import Family
from megatron_elastic.hf.config import read_config
from megatron_elastic.hf.importing import import_model
from megatron_elastic.layout import Layout
from megatron_elastic.metadata import Metadata
from megatron_elastic.sorting import random_orders, sort_checkpoint

FFN_BLOCKS, EXPERT_BLOCKS = 2, 4


def full(config: dict[str, Any]) -> Selection:
    """All of the parent."""
    sizes = read_config(config).shape.full
    return Selection.from_dict({axis: size for axis, size in sizes.items() if axis != "depth"})


def half(config: dict[str, Any]) -> Selection:
    """About half of every axis, and one layer left out."""
    kept = {"hidden": 6, "ffn": 8, "mamba_heads": 4, "mamba_head_dim": 2, "attention_heads": 4}
    if "E" in config["hybrid_override_pattern"]:
        kept.update(experts=4, expert_ffn=4, shared_expert_ffn=4)
    return Selection(**kept, skipped=(3,))


def write(source: Path, folder: Path, *selections: Selection, biased: bool = True) -> Path:
    """A family of an imported model: budgets `b0` (all of it), `b1`, and so on.

    Args:
        source: the model in Hugging Face's format.
        folder: for `imported`, `sorted` and `family`.
        selections: of the budgets from `b1` on.
        biased: whether the routers of the family keep the experts' biases.
    """
    model = read_config(source)
    blocks = {"ffn_blocks": FFN_BLOCKS, "expert_blocks": EXPERT_BLOCKS}
    import_model(source, folder / "imported")
    orders = random_orders(Layout(model.shape, **blocks), 3)
    sort_checkpoint(
        folder / "imported", folder / "sorted", shape=model.shape, flags=model.flags, orders=orders, **blocks
    )
    path = checkpoint.find_checkpoint(folder / "sorted")
    kept = (full(model.raw), *selections)
    budgets = tuple(Budget(f"b{number}", 1 / (number + 1)) for number in range(len(kept)))
    shape = model.shape if biased else replace(model.shape, expert_bias=False)
    described = Family(shape=shape, choices={}, budgets=budgets, **blocks)
    infos = {
        name: info for name, info in checkpoint.model_tensor_names(path).items() if not name.startswith("elastic.")
    }
    if not biased:
        infos = {name: info for name, info in infos.items() if not name.endswith("expert_bias")}

    def lazy(name: str) -> checkpoint.LazyTensor:
        info = infos[name]
        return checkpoint.LazyTensor(info.shape, info.dtype, lambda: checkpoint.read_tensor(path, name))

    checkpoint.write_checkpoint(
        folder / "family",
        {name: lazy(name) for name in infos},
        common=checkpoint.read_common(path),
        metadata=Metadata.of_family(described, model.flags, selections=kept),
        files=checkpoint.carried_files(path),
    )
    return folder / "family"
