"""How far a run has come, from the files it left, without starting Megatron where that can be told without."""

import contextlib
import datetime
import errno
import fcntl
from collections.abc import Callable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

from megatron_elastic.checkpoint import (
    add_manifest,
    find_checkpoint,
    find_verified,
    has_manifest,
    has_router,
    parameters,
    read_family,
    read_metadata,
    recover,
    tracked,
    verify,
)
from megatron_elastic.cli import options
from megatron_elastic.cli.launch import gpu_count
from megatron_elastic.config import Recipe
from megatron_elastic.distillation.teacher_cache import check_cache
from megatron_elastic.errors import CheckpointError, CorpusError
from megatron_elastic.metadata import Metadata
from megatron_elastic.parents import with_ranked_layers
from megatron_elastic.schedule import VERIFY_FLAG

__all__ = [
    "agreed",
    "check_data",
    "check_parent",
    "default_ranks",
    "family_position",
    "logs",
    "only_run",
    "prepare",
    "settled",
    "tracked",
    "wants_manifest",
]

_PATIENCE = datetime.timedelta(hours=2)
"""How long the other ranks wait while rank 0 reads a checkpoint."""
_FAILED = "failed"
_kept: list[Any] = []


def wants_manifest(flags: Mapping[str, Any]) -> bool:
    """Whether a run saves with Megatron's integrity manifest: unless its recipe says `verify-integrity: false`."""
    return bool(flags.get(VERIFY_FLAG, True))


def settled(save: str | Path, flags: Mapping[str, Any], check: Callable[[Path], None] | None = None) -> int:
    """Iteration that a run goes on from, 0 where there is none, after what a stop left is put in order.

    The number is Megatron's own, of the folder: an iteration that Megatron skips makes no optimizer step. Call it from
    one process, before the ranks start.

    Args:
        save: where the run saves to.
        flags: Megatron's, of the run.
        check: refuses the checkpoint that would be loaded.

    Raises:
        CheckpointError: what is saved there is damaged.
    """
    manifest, progress = wants_manifest(flags), options.bars()
    iteration = recover(save, manifest=manifest, progress=progress)
    if not iteration:
        return 0
    path = find_checkpoint(save)
    verify(path, digests=manifest, progress=progress)
    if check is not None:
        check(path)
    if manifest and not has_manifest(path):
        # Saved with the flag off. Megatron would refuse to load it now that it is on.
        add_manifest(path, progress=progress)
        print(f"{path}: saved without a manifest, so only sizes could be checked; it has one now", flush=True)
    return iteration


def family_position(recipe: Recipe) -> int:
    """Iteration that the saved family goes on from, 0 where there is none; see `settled`.

    Raises:
        CheckpointError: what is saved there is damaged, or not this recipe's family.
    """

    def check(path: Path) -> None:
        family = with_ranked_layers(recipe).family
        declared = Metadata.of_family(family, recipe.megatron, budget_mode=recipe.budget_mode)
        different = declared.same_family(read_family(path))
        if different:
            raise CheckpointError(
                f"{path}: another family is saved there: {'; '.join(different)}; choose another `save`"
            )
        if recipe.router is not None and not has_router(path):
            raise CheckpointError(
                f"{path}: the router is missing, which the recipe goes on training: it was saved by a run with "
                "`selections`. Choose another `save`, or give the recipe `selections` instead of `router`"
            )

    return settled(recipe.save, recipe.megatron, check)


@contextlib.contextmanager
def only_run(save: str | Path) -> Iterator[None]:
    """Keeps a second run from saving to the same folder.

    Raises:
        CheckpointError: another run saves there.
    """
    folder = Path(save)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(f"another run saves to {folder}: wait for it, or choose another `save`") from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            # A file system without locks: the user is on their own.
        yield


def agreed(find: Callable[[], int]) -> int | None:
    """What rank 0 of a launcher's processes finds, on every rank; None on the others where rank 0 fails.

    Only rank 0 reads, repairs and complains. The others wait for it, so that none goes on to a rendezvous that rank 0
    will not join.
    """
    import torch

    store, rank, _ = next(torch.distributed.rendezvous("env://", timeout=_PATIENCE))
    _kept.append(store)  # Megatron's process group meets at the same address: this server must outlive the question
    answers = torch.distributed.PrefixStore("megatron_elastic.position", store)
    if rank:
        text = answers.get("found").decode()
        return int(text) if text != _FAILED else None
    try:
        found = find()
    except BaseException:
        answers.set("found", _FAILED)
        raise
    answers.set("found", str(found))
    return found


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


@contextlib.contextmanager
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
    """Refuses a recipe whose parent or teacher is not there, or is another model than the recipe describes.

    Raises:
        CheckpointError: no checkpoint where the recipe says, a damaged one, other parameters, or another block order.
        CacheError: the teacher cache is another teacher's, or of other settings.
    """
    for role, place in {"parent": recipe.parent, "teacher": recipe.teacher}.items():
        if role == "parent" or place != recipe.parent:
            _check_model(recipe, role, place)
    with_ranked_layers(recipe)
    check_cache(recipe)


def _check_model(recipe: Recipe, role: str, place: str) -> None:
    path = find_verified(place, progress=options.bars())
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
    described = read_metadata(path) if role == "parent" else None  # a teacher runs whole, in whatever order
    for kind in ("ffn_blocks", "expert_blocks"):
        mine, theirs = getattr(recipe.family, kind), getattr(described, kind, None)
        if described is not None and theirs != mine:
            blocks = f"{theirs} {kind.replace('_', ' ')}, the recipe has {mine}"
            faults.append(f"it is sorted into {blocks}: sort the parent again")
    if faults:
        more = f" and {len(faults) - 4} more" if len(faults) > 4 else ""
        raise CheckpointError(f"{path}: not the {role} that the recipe describes: {'; '.join(faults[:4])}{more}")
