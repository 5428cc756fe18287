"""Export: a checkpoint, or one budget of a family, becomes a `nemotron_h` folder, tensor by tensor."""

import json
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_elastic.asked import asked_selection
from megatron_elastic.checkpoint import (
    LazyTensor,
    carried_files,
    copy_files,
    find_verified,
    model_flags,
    read_common,
    read_family,
    read_metadata,
    read_parameter,
    require_free,
    stored_names,
    whole_or_nothing,
    write_faults_are_told,
)
from megatron_elastic.checkpoint import parameters as stored_infos
from megatron_elastic.errors import CheckpointError, HFError
from megatron_elastic.extraction import check_selection, cut_tensors, submodel_flags
from megatron_elastic.flags import model_shape
from megatron_elastic.hf.config import (
    CONFIG,
    PUZZLE,
    SHORTEST_TIME_STEP,
    UNIFORM,
    export_warnings,
    load_json,
    make_config,
)
from megatron_elastic.hf.importing import carried_along
from megatron_elastic.hf.names import Parameter, parameters
from megatron_elastic.hf.nested import describe, write_slicer
from megatron_elastic.hf.tensors import write_folder
from megatron_elastic.layout import BUFFERS, ModelShape
from megatron_elastic.metadata import Metadata

SHARD_BYTES = 5 * 10**9
"""The most that one file holds, where nothing else is asked for."""


@dataclass(frozen=True)
class _Model:
    """What is exported.

    Attributes:
        shape, flags: of the model.
        tensors: stock name -> the parameter, made when asked for.
    """

    shape: ModelShape
    flags: Mapping[str, Any]
    tensors: Mapping[str, LazyTensor]


def _whole(path: Path, described: Metadata | None) -> _Model:
    """A checkpoint as it is: a parent, an extracted model, or a family's weights."""
    flags = model_flags(path) if described is None else described.flags
    if described is None:
        faults: list[str] = []
        shape = model_shape(flags, faults)
        if shape is None:
            raise CheckpointError(f"{path}: {'; '.join(faults)}")
    else:
        shape = described.shape

    def lazy(name: str) -> Callable[[], Tensor]:
        return lambda: read_parameter(path, name)

    infos = {name: info for name, info in stored_infos(path).items() if not name.startswith("elastic.")}
    tensors = {name: LazyTensor(info.shape, info.dtype, lazy(name)) for name, info in infos.items()}
    return _Model(shape, submodel_flags(shape, flags), tensors)


def _budget(path: Path, family: Metadata, budget: str) -> _Model:
    """One budget of a family, cut as it is read."""
    selection, layout = asked_selection(path, family, budget), family.family.layout
    check_selection(layout, selection)
    parts = cut_tensors(path, layout, selection, None)
    shape = selection.submodel(family.shape)

    def joined(names: tuple[str, ...]) -> LazyTensor:
        first = parts[names[0]]
        if len(names) == 1:
            return first
        rows = sum(parts[name].shape[0] for name in names)
        return LazyTensor(
            (rows, *first.shape[1:]), first.dtype, lambda: torch.cat([parts[name].read() for name in names])
        )

    stocks = [parameter.stock for parameter in parameters(shape)]
    return _Model(shape, submodel_flags(shape, family.flags), {stock: joined(stored_names(stock)) for stock in stocks})


def _pieces(model: _Model, place: Path) -> dict[str, LazyTensor]:
    """Every Hugging Face tensor; those of one parameter follow each other, and it is read once for all of them."""
    wanted = list(parameters(replace(model.shape, expert_bias=True)))
    tensors = dict(model.tensors)
    for parameter in wanted:
        if parameter.stock.endswith(BUFFERS) and not model.shape.expert_bias:
            # The format has a bias for every expert: without one it is 0.
            tensors[parameter.stock] = LazyTensor(parameter.shape, torch.float32, _zeros(parameter.shape))
    faults = [f"{p.stock} is missing" for p in wanted if p.stock not in tensors]
    faults += [f"{name} has no place in the format" for name in sorted(set(tensors) - {p.stock for p in wanted})]
    faults += [
        f"{p.stock} is {tensors[p.stock].shape}, the shape says {p.shape}"
        for p in wanted
        if p.stock in tensors and tensors[p.stock].shape != p.shape
    ]
    if faults:
        raise HFError(faults, str(place))
    latest = _Latest(tensors)
    return {
        piece.name: LazyTensor(piece.shape, tensors[parameter.stock].dtype, _piece(latest, parameter, number))
        for parameter in wanted
        for number, piece in enumerate(parameter.pieces)
    }


class _Latest:
    """Reads parameters and keeps the last one."""

    def __init__(self, tensors: Mapping[str, LazyTensor]) -> None:
        self.tensors = tensors
        self.name = ""
        self.value: Tensor | None = None

    def __call__(self, name: str) -> Tensor:
        if self.value is None or self.name != name:
            self.value = None  # before the next one is read
            self.value, self.name = self.tensors[name].read(), name
        return self.value


def _piece(latest: _Latest, parameter: Parameter, number: int) -> Callable[[], Tensor]:
    return lambda: parameter.piece(latest(parameter.stock), number)


def _zeros(shape: tuple[int, ...]) -> Callable[[], Tensor]:
    return lambda: torch.zeros(shape)


def _short_time_steps(model: _Model, config: Mapping[str, Any]) -> list[str]:
    """What to say where transformers computes something else: it raises time steps to `time_step_min`."""
    least = config["time_step_min"]
    biases = [each.read() for name, each in model.tensors.items() if name.endswith(".dt_bias")]
    heads = sum(len(bias) for bias in biases)
    short = sum(int((torch.nn.functional.softplus(bias.double()) < least).sum()) for bias in biases)
    if not short:
        return []
    return [
        f"{short} of {heads} Mamba heads have time steps below time_step_min {least}: transformers 5 raises them to "
        f"it, Megatron and other engines do not; with {SHORTEST_TIME_STEP} in config.json it computes what was trained"
    ]


def _main_dtype(tensors: Mapping[str, LazyTensor]) -> str:
    """The dtype of most of the numbers, as `config.json` names it."""
    counts: dict[torch.dtype, int] = {}
    for tensor in tensors.values():
        counts[tensor.dtype] = counts.get(tensor.dtype, 0) + prod(tensor.shape)
    return str(max(counts, key=lambda dtype: counts[dtype])).removeprefix("torch.")


def _files(path: Path, flags: Mapping[str, Any], like: Path | None) -> dict[str, Path]:
    """What goes with the model: from where the user says, else what is carried, else the tokenizer's own folder."""
    if like is not None:
        if not like.is_dir():
            raise HFError(["no such folder: give the model that the parent was imported from"], str(like))
        return carried_along(like)
    carried = carried_files(path)
    tokenizer = Path(str(flags.get("tokenizer-model", "")))
    if carried or not flags.get("tokenizer-model") or not tokenizer.is_dir():
        return carried
    return carried_along(tokenizer)


def _raw_config(files: Mapping[str, Path]) -> dict[str, Any]:
    """The configuration that the model came with; empty where there is none of this format."""
    raw = load_json(files[CONFIG]) if CONFIG in files else {}
    return raw if raw.get("model_type") in (UNIFORM, PUZZLE) else {}


def _max_positions(path: Path) -> int:
    """The longest sequence that the checkpoint's run was told of."""
    args = read_common(path).get("args")
    given = getattr(args, "max_position_embeddings", None) if isinstance(args, Namespace) else None
    return given if isinstance(given, int) and given > 1 else 4096


def export_model(
    checkpoint: str | Path,
    out: str | Path,
    *,
    budget: str | None = None,
    nested: bool = False,
    shard_bytes: int = SHARD_BYTES,
    like: str | Path | None = None,
    verify: bool = True,
    progress: bool = False,
) -> dict[str, Any]:
    """Writes a model as a `nemotron_h` folder, and reads it back to compare.

    One parameter is in memory at a time, and one tensor of it.

    Args:
        checkpoint: a parent, an extracted model, or a family.
        out: folder to write; must not exist, or be empty. It is there whole and verified, or not at all.
        budget: of a family: the one to write, by name or a size between two (`asked_selection`), cut as it is read.
        nested: of a family: write all of it, with `elastic.json` and `slice.py`, which cuts any budget.
        shard_bytes: the most bytes that one file holds.
        like: folder in Hugging Face's format to take `config.json`'s other fields and the tokenizer from; None for what
            is carried beside the checkpoint.
        verify: whether to compare the checkpoint with its manifest first, and to read back what was written.
        progress: whether to show bars.

    Returns:
        `out`, `model_type`, `parameters`, `bytes`, `warnings` (which engines cannot load it, or compute it otherwise),
        and `budgets` where it is nested.

    Raises:
        HFError: the format cannot hold this model.
        CheckpointError: the checkpoint cannot be used, or `out` is taken.
    """
    target = Path(out)
    require_free(target)
    path = find_verified(checkpoint, progress=progress, digests=verify)
    described = read_metadata(path)
    if described is None or described.kind != "family":
        if budget is not None or nested:
            raise CheckpointError(f"{path}: --budget and --nested are for a family; this is a model of its own")
        model = _whole(path, described)
    else:
        family = read_family(path)
        names = [each.name for each in family.budgets]
        if (budget is None) != nested:
            raise CheckpointError(f"{path} is a family: give --budget with one of {names}, or --nested for all of it")
        model = _whole(path, family) if budget is None else _budget(path, family, budget)
    files = _files(path, model.flags, None if like is None else Path(like))
    raw = _raw_config(files)
    positions = _max_positions(path)
    tensors = _pieces(model, path)
    dtype = _main_dtype(tensors)
    config = make_config(model.shape, model.flags, raw, dtype, positions)
    result: dict[str, Any] = {
        "out": str(target),
        "model_type": config["model_type"],
        "parameters": sum(prod(t.shape) for name, t in model.tensors.items() if not name.endswith(BUFFERS)),
    }
    with write_faults_are_told(target), whole_or_nothing(target) as folder:
        result["bytes"] = write_folder(folder, tensors, shard_bytes, verify=verify, progress=progress)
        copy_files({name: file for name, file in files.items() if name != CONFIG}, folder)
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        result["warnings"] = export_warnings(model.shape) + _short_time_steps(model, config)
        if nested and described is not None:
            written = describe(described, lambda shape: make_config(shape, model.flags, raw, dtype, positions))
            write_slicer(folder, written)
            result["budgets"] = [each.name for each in described.budgets]
            for each, selection in zip(described.budgets, described.selections, strict=True):
                told = export_warnings(selection.submodel(model.shape))
                result["warnings"] += [f"{each.name}: {warning}" for warning in told]
    return result
