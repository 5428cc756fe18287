"""Reads what wandb wrote offline: a log of blocks, as LevelDB's, with a record of wandb's protocol in each entry."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

BLOCK = 32768
FILE_HEADER, ENTRY_HEADER = 7, struct.Struct("<IHB")
FULL, FIRST, LAST = 1, 2, 4


def _entries(content: bytes) -> Iterator[bytes]:
    position, parts = FILE_HEADER, list[bytes]()
    while position + ENTRY_HEADER.size <= len(content):
        if BLOCK - position % BLOCK < ENTRY_HEADER.size:
            position += BLOCK - position % BLOCK  # the rest of a block is padding
            continue
        _, size, kind = ENTRY_HEADER.unpack_from(content, position)
        position += ENTRY_HEADER.size
        if kind in (FULL, FIRST):
            parts = []
        parts.append(content[position : position + size])
        position += size
        if kind in (FULL, LAST):
            yield b"".join(parts)


def offline_runs(folder: Path) -> list[dict[str, Any]]:
    """Every offline run below a folder, oldest first: `id`, `group`, `job_type`, `config`, `history`, artifacts."""
    found = []
    for path in sorted(folder.glob("**/offline-run-*/run-*.wandb")):
        run: dict[str, Any] = {"config": {}, "history": {}, "artifacts": {}, "summary": {}}
        for entry in _entries(path.read_bytes()):
            record = wandb_internal_pb2.Record.FromString(entry)
            for update in (*record.run.config.update, *record.config.update):
                run["config"]["/".join([update.key, *update.nested_key]).strip("/")] = json.loads(update.value_json)
            if record.run.run_id:
                run |= {"id": record.run.run_id, "group": record.run.run_group, "job_type": record.run.job_type}
            for item in record.history.item:
                key = item.key or "/".join(item.nested_key)
                run["history"].setdefault(key, []).append(json.loads(item.value_json))
            for update in record.summary.update:
                run["summary"][update.key or "/".join(update.nested_key)] = json.loads(update.value_json)
            artifact = record.artifact if record.artifact.name else record.request.log_artifact.artifact
            if artifact.name:
                run["artifacts"][artifact.name] = artifact.type
        found.append(run)
    return found
