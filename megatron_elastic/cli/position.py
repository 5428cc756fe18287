"""How far a run has come, from the files it left, without starting Megatron where that can be told without."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

from megatron_elastic.checkpoint import TRACKER, find_checkpoint, parameters, read_metadata
from megatron_elastic.cli.launch import gpu_count
from megatron_elastic.config import Recipe
from megatron_elastic.errors import CheckpointError, CorpusError


def tracked(folder: str | Path) -> int:
    """Iteration of the newest checkpoint that Megatron wrote to a folder; 0 where there is none.

    Raises:
        CheckpointError: the folder's tracker file does not hold an iteration.
    """
    path = Path(folder) / TRACKER
    if not path.exists():
        return 0
    text = path.read_text("utf-8").strip()
    if not text.isdecimal():
        raise CheckpointError(f"{path} says {text!r}, where an iteration must stand: choose another folder")
    return int(text)


def family_position(recipe: Recipe) -> int:
    """Optimizer steps that the saved family has made; Megatron is imported only where there is a checkpoint."""
    if tracked(recipe.save) == 0:
        return 0
    prepare()
    from megatron_elastic.training import family_position

    return family_position(recipe)


def prepare() -> None:
    """Makes Megatron's training usable in this process: the CPU adaptation where there is no GPU, and the mends."""
    from megatron_elastic import megatron_compat

    if not gpu_count():
        from megatron_elastic.cpu import adaptation

        adaptation.install_training()
    megatron_compat.install()


def default_ranks(flags: Mapping[str, Any]) -> int:
    """All GPUs, or, without a GPU, as many ranks as one copy of the model takes."""
    split = ("tensor-model-parallel-size", "pipeline-model-parallel-size", "context-parallel-size")
    return gpu_count() or prod(int(flags.get(size, 1)) for size in split)


@contextmanager
def stops(save: str | Path, begin: int, end: int, total: int) -> Iterator[None]:
    """Around ranks that train from iteration `begin` to `end`, of `total`: says where they were stopped.

    Megatron saves and ends with status 0 when a rank gets SIGTERM (or at `exit-interval`, `exit-duration-in-mins`).

    Raises:
        KeyboardInterrupt: interrupted here, or the ranks have ended before their last iteration with a checkpoint.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"stopped at iteration {tracked(save)} of {total}") from None
    if begin < tracked(save) < end:
        raise KeyboardInterrupt(f"stopped at iteration {tracked(save)} of {total}")


def logs(save: str | Path) -> Path:
    """Folder of the logs of a run that saves to `save`: beside it."""
    return Path(save).parent / "logs"


def check_data(recipe: Recipe) -> None:
    """Refuses a recipe whose token data is not there.

    Raises:
        CorpusError: a file is missing.
    """
    for prefix in (recipe.train_data, recipe.validation_data):
        for suffix in ("idx", "bin"):
            if not Path(f"{prefix}.{suffix}").is_file():
                raise CorpusError(
                    f"{prefix}.{suffix} does not exist: make it with `megatron-elastic corpus`, or mend the recipe "
                    "(paths are relative to the working directory)"
                )


def check_parent(recipe: Recipe) -> None:
    """Refuses a recipe whose parent is not there, or is another model than the recipe describes.

    Raises:
        CheckpointError: no checkpoint where the recipe says, other parameters, or another block order.
    """
    path = find_checkpoint(recipe.parent)
    dimensions = recipe.family.layout.parameters()
    wanted = {name: tuple(dimension.size for dimension in sizes) for name, sizes in dimensions.items()}
    found = {name: info.shape for name, info in parameters(path).items() if not name.startswith("elastic.")}
    faults = [f"{name} missing" for name in sorted(set(wanted) - set(found))]
    faults += [f"{name} is no part of it" for name in sorted(set(found) - set(wanted))]
    faults += [
        f"{name} is {found[name]}, the recipe's {wanted[name]}"
        for name in sorted(set(wanted) & set(found))
        if found[name] != wanted[name]
    ]
    described = read_metadata(path)
    if described is not None and described.ffn_blocks != recipe.family.ffn_blocks:
        blocks = f"{described.ffn_blocks} ffn blocks, the recipe has {recipe.family.ffn_blocks}"
        faults.append(f"it is sorted into {blocks}: sort the parent again")
    if faults:
        more = f" and {len(faults) - 4} more" if len(faults) > 4 else ""
        raise CheckpointError(f"{path}: not the parent that the recipe describes: {'; '.join(faults[:4])}{more}")
