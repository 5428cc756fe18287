"""From which iteration a run goes on after a stop at any moment.

Megatron writes, in this order: tensors, index, format, manifest, tracker. A stop leaves a folder without the last of
them, or an empty tracker, which Megatron opens before it writes.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from megatron_elastic.checkpoint.integrity import verify, write_atomically
from megatron_elastic.checkpoint.names import CONFIG, INDEX, MANIFEST, TRACKER
from megatron_elastic.checkpoint.reading import find_checkpoint, iteration_folder
from megatron_elastic.errors import CheckpointError

_FOLDER = re.compile(r"iter_(\d{7,})")
_LEFT_BY_A_SAVE = re.compile(r".*\.distcp|\.metadata(\.tmp)?|metadata\.json|integrity\.json(\.tmp)?|common\.pt")


def tracked(folder: str | Path) -> int:
    """Iteration that the tracker names; 0 where there is no tracker, or an empty one.

    Raises:
        CheckpointError: the tracker holds something else.
    """
    path = Path(folder) / TRACKER
    text = path.read_text("utf-8").strip() if path.exists() else ""
    if text and not text.isdecimal():
        raise CheckpointError(f"{path} says {text!r}, where an iteration must stand: choose another folder")
    return int(text or 0)


def _iterations(save: Path) -> list[int]:
    """Iterations that have a folder of their own, newest first."""
    if not save.is_dir():
        return []
    found = [_FOLDER.fullmatch(each.name) for each in save.iterdir() if each.is_dir() and not each.is_symlink()]
    return sorted((int(match[1]) for match in found if match), reverse=True)


def _unfinished(path: Path, *, manifest: bool) -> str | None:
    """What a stopped save left undone in a folder; None where it was finished."""
    for name in (INDEX, CONFIG, *([MANIFEST] if manifest else [])):
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if name != INDEX:  # Megatron writes these in place
            try:
                json.loads(file.read_bytes())
            except ValueError:
                return f"{name} is cut off"
    return None


def _remove(path: Path) -> None:
    """Removes what a stopped save left, and nothing else."""
    foreign = sorted(each.name for each in path.iterdir() if not _LEFT_BY_A_SAVE.fullmatch(each.name))
    if foreign:
        raise CheckpointError(
            f"{path} is newer than {TRACKER} says, and no unfinished torch_dist checkpoint ({foreign[0]} is in it): "
            "move it away, or choose another `save`"
        )
    shutil.rmtree(path)


def recover(save: str | Path, *, manifest: bool, progress: bool = False, tell: Callable[[str], None] = print) -> int:
    """Makes the newest whole iteration the one that Megatron loads, and removes what a stopped save left after it.

    A folder that is newer than the tracker's iteration is either finished, then the tracker is rewritten, or it is
    removed: a save of the same iteration would go into it, and stale files would become part of a checkpoint. Older
    folders, and the tracker's own iteration, are left as they are. Call it from one process, while nothing saves there.

    Args:
        save: the folder that Megatron saves to.
        manifest: whether the run saves with a manifest: without one a folder is not finished then.
        progress: whether to show a bar.
        tell: is given one line for everything that is changed.

    Returns:
        The iteration to go on from; 0 where there is none.

    Raises:
        CheckpointError: the tracker holds something that is no iteration, or a newer folder is finished and damaged, or
            something else than Megatron's saving left it.
    """
    root = Path(save)
    before = now = tracked(root)
    for iteration in _iterations(root):
        if iteration <= now:
            break
        path = iteration_folder(root, iteration)
        undone = _unfinished(path, manifest=manifest)
        if undone is None:
            find_checkpoint(path)
            verify(path, digests=manifest, progress=progress)
            now = iteration
        else:
            _remove(path)
            tell(f"{path}: removed, a save was stopped there ({undone})")
    if now > before:
        write_atomically(root / TRACKER, str(now))
        tell(f"{root / TRACKER}: set to {now}, the newest whole iteration (it said {before or 'nothing'})")
    elif not now:
        (root / TRACKER).unlink(missing_ok=True)
    return now
