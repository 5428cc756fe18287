"""Import: a `nemotron_h` folder becomes a Megatron checkpoint, tensor by tensor, bit for bit."""

import fnmatch
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_elastic import cost_model
from megatron_elastic.checkpoint import (
    CARRIED,
    LazyTensor,
    model_arguments,
    require_free,
    stored_names,
    write_checkpoint,
)
from megatron_elastic.errors import HFError
from megatron_elastic.hf.config import CONFIG, HFModel, read_config
from megatron_elastic.hf.names import MODULES, RELEASED, Parameter, parameters
from megatron_elastic.hf.tensors import DTYPES, Entry, read_folder
from megatron_elastic.metadata import Metadata

_CARRIED = (
    *(CONFIG, "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "*.jinja"),
    *("vocab.*", "merges.txt", "*.tiktoken", "*.model", "chat_template*", "LICENSE*", "NOTICE*"),
)
"""Names of the files that go with a model; its weights are stored otherwise, and code is neither run nor copied."""


def carried_along(folder: Path) -> dict[str, Path]:
    """The files of a model that are no weights and no code, by relative name."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.suffix != ".py"]
    names = {str(file.relative_to(folder)): file for file in files}
    kept = (name for name in names if any(fnmatch.fnmatchcase(Path(name).name, pattern) for pattern in _CARRIED))
    return {name: names[name] for name in kept if not any(part.startswith(".") for part in Path(name).parts)}


class _Source:
    """The tensors of a folder, matched with the parameters of a model."""

    def __init__(self, folder: Path, model: HFModel) -> None:
        self.entries = read_folder(folder)
        first = MODULES if f"{MODULES}.embeddings.weight" in self.entries else RELEASED
        self.parameters = list(parameters(model.shape, first))
        faults = list(self._faults())
        if faults:
            raise HFError(faults, str(folder))

    def _faults(self) -> Iterator[str]:
        used: set[str] = set()
        for parameter in self.parameters:
            wanted = self.sources(parameter)
            used.update(wanted)
            found = {name: self.entries[name] for name in wanted if name in self.entries}
            yield from (f"{name} is missing" for name in wanted if name not in found)
            for name, entry in found.items():
                if entry.shape != wanted[name]:
                    yield f"{name} is {list(entry.shape)}, {CONFIG} says {list(wanted[name])}"
                if entry.dtype not in DTYPES:
                    yield f"{name} is {entry.dtype}: weights of {', '.join(DTYPES)} are read, not quantised ones"
            if len({entry.dtype for entry in found.values()}) > 1:
                dtypes = sorted({entry.dtype for entry in found.values()})
                yield f"{parameter.stock}: Megatron keeps {', '.join(found)} in one tensor, and they are {dtypes}"
        yield from (f"{name} has no place in this model" for name in self.entries if name not in used)

    def sources(self, parameter: Parameter) -> dict[str, tuple[int, ...]]:
        """Name and shape of what a parameter is made of, as this folder has it."""
        if parameter.merged in self.entries:
            return {parameter.merged: parameter.shape}
        return {piece.name: piece.shape for piece in parameter.pieces}

    def stored(self) -> dict[str, LazyTensor]:
        """Every tensor of the checkpoint by stored name, made when its turn comes."""
        found: dict[str, LazyTensor] = {}
        for parameter in self.parameters:
            names = stored_names(parameter.stock)
            entries = [self.entries[name] for name in self.sources(parameter)]
            dtype = DTYPES[entries[0].dtype]
            if len(names) == 1:
                found[names[0]] = LazyTensor(parameter.shape, dtype, _whole(parameter, entries))
                continue
            first = 0
            for name, rows in zip(names, parameter.dimensions[0].part_sizes(), strict=True):
                found[name] = LazyTensor((rows, *parameter.shape[1:]), dtype, _rows(entries[0], first, rows))
                first += rows
        return found


def _whole(parameter: Parameter, entries: list[Entry]) -> Any:
    def read() -> Tensor:
        if entries[0].shape == parameter.shape:
            return entries[0].read()
        out = torch.empty(parameter.shape, dtype=DTYPES[entries[0].dtype])
        for number, entry in enumerate(entries):
            parameter.fill(out, number, entry.read())
        return out

    return read


def _rows(entry: Entry, first: int, rows: int) -> Any:
    return lambda: entry.read(first, rows)


def import_model(source: str | Path, out: str | Path, *, progress: bool = False) -> dict[str, Any]:
    """Writes a `nemotron_h` model as a Megatron checkpoint, and reads it back to compare.

    One tensor is in memory at a time, and what it is made of. Nothing is written into the source, and no code that is
    in it is run.

    Args:
        source: folder with `config.json` and safetensors files.
        out: folder to write; must not exist, or be empty. It is there whole and verified, or not at all.
        progress: whether to show bars.

    Returns:
        `checkpoint` (the folder written), `parameters`, `active_parameters`, `layers` (the pattern) and `carried` (the
        files that go with the model).

    Raises:
        HFError: with every reason why it cannot be imported.
        CheckpointError: `out` is taken, or the disk is full.
    """
    folder, target = Path(source), Path(out)
    require_free(target)
    model = read_config(folder)
    tensors = _Source(folder, model).stored()
    files = carried_along(folder)
    flags: Mapping[str, Any] = model.flags
    if any(name.startswith("tokenizer") for name in files):
        flags = {**flags, "tokenizer-type": "HuggingFaceTokenizer", "tokenizer-model": str(target / CARRIED)}
    # Arguments say all of a model whose layers are alike: it is a parent like Megatron's own. Of others the
    # description does.
    described = None
    if not model.shape.uniform:
        described = Metadata(kind="extracted", shape=model.shape, ffn_blocks=1, flags=flags)
    common = {"args": model_arguments(flags)}
    write_checkpoint(target, tensors, common=common, metadata=described, files=files, progress=progress)
    return {
        "checkpoint": str(target),
        "parameters": cost_model.parameters(model.shape, model.shape.full),
        "active_parameters": cost_model.parameters(model.shape, model.shape.full, active=True),
        "layers": model.shape.pattern,
        "carried": list(files),
    }
