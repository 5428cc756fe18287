"""Files that travel with a model from step to step beside its tensors: tokenizer, `config.json`, licence."""

import shutil
from collections.abc import Mapping
from pathlib import Path

from megatron_elastic.checkpoint.folders import whole_or_nothing
from megatron_elastic.errors import CheckpointError

CARRIED = "huggingface"
"""Folder in a checkpoint's root, beside the iterations; a `tokenizer-model` may name it."""


def carried_files(path: str | Path) -> dict[str, Path]:
    """What is carried beside a checkpoint, by relative name.

    Args:
        path: root of the checkpoint, or an iteration's folder in it.
    """
    for root in (Path(path), Path(path).parent):
        folder = root / CARRIED
        if folder.is_dir():
            return {str(file.relative_to(folder)): file for file in sorted(folder.rglob("*")) if file.is_file()}
    return {}


def copy_files(files: Mapping[str, Path], target: Path) -> None:
    """Copies files under a folder, and compares them with what they were copied from.

    Args:
        files: relative name -> source.
        target: folder; made where there is something to copy.

    Raises:
        CheckpointError: the disk does not give back what was written.
    """
    for name, source in files.items():
        place = target / name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, place)
        if place.read_bytes() != source.read_bytes():
            raise CheckpointError(f"{place} is not what was written: check the disk, and write it again")


def carry(source: str | Path, target: str | Path) -> None:
    """Puts beside the checkpoints in `target` what is carried beside `source`, where nothing is there yet.

    Args:
        source: root of a checkpoint, or an iteration's folder in it.
        target: root of another one; made where it does not exist.
    """
    files = carried_files(source)
    if files and not (Path(target) / CARRIED).exists():
        with whole_or_nothing(Path(target) / CARRIED) as folder:
            copy_files(files, folder)
