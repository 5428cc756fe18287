"""A rank's part in a teacher cache during one stage: targets that are read from it, or made and written to it."""

from collections.abc import Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_batch_on_this_cp_rank
from torch import Tensor

from megatron_elastic.config import Recipe
from megatron_elastic.curriculum import TeacherCache
from megatron_elastic.distillation.cache_files import CacheIndex, CacheWriter
from megatron_elastic.distillation.teacher_cache import TRAINING, VALIDATION, StagePlan, sample_key
from megatron_elastic.errors import CacheError, ElasticError
from megatron_elastic.layers.linear import TopKTarget


class StageCache:
    """The cache of a stage. Every rank has one; those of the last pipeline stage use it.

    In a stage that writes, students learn from what is written, as a stage that reads it does: their losses are the
    same.
    """

    def __init__(self, recipe: Recipe, number: int, settings: TeacherCache) -> None:
        """Args:
        recipe: checked.
        number: of the stage, from 1.
        settings: of the cache.
        """
        self.recipe, self.number, self.settings = recipe, number, settings
        self._plan: StagePlan | None = None
        self._index: CacheIndex | None = None
        self._writer: CacheWriter | None = None
        self._groups: ProcessGroupCollection | None = None
        self._exit = ExitStack()

    def __enter__(self) -> "StageCache":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes what this rank wrote. An orderly exit of the process is no error."""
        orderly = isinstance(error, SystemExit) and not error.code
        self._exit.__exit__(*((None, None, None) if orderly else (kind, error, trace)))

    @property
    def plan(self) -> StagePlan:
        """What rank 0 found.

        Raises:
            RuntimeError: before `open`.
        """
        if self._plan is None:
            raise RuntimeError("the teacher cache was not opened: StageCache.open comes first")
        return self._plan

    @property
    def reads(self) -> bool:
        """Whether the stage reads, and runs no teacher."""
        return self.plan.reads

    def open(self, groups: ProcessGroupCollection) -> None:
        """Decides on rank 0, for all ranks, whether the stage reads or writes.

        A collective of the world; a second call does nothing.

        Raises:
            CacheError: on every rank: the cache cannot serve this stage. On one rank: it does not see the folder.
        """
        if self._plan is not None:
            return
        answer: list[Any] = [None]
        if dist.get_rank() == 0:
            try:
                plan = StagePlan(self.recipe, self.number, self.settings)
                if not plan.reads:
                    plan.begin()
                print(f"elastic | {plan.describe()}", flush=True)
                answer = [plan]
            except ElasticError as error:
                answer = [str(error)]
        dist.broadcast_object_list(answer, src=0)
        if isinstance(answer[0], str):
            raise CacheError(answer[0])
        self._plan, self._groups = answer[0], groups
        last = groups.pp.rank() == groups.pp.size() - 1
        writes = not self.reads and groups.tp.rank() == 0 and groups.cp.rank() == 0
        if last and (self.reads or writes):
            self._index = CacheIndex(self.plan.folder, self.plan.layout)
            if len(self._index) < self.plan.entries:
                raise CacheError(
                    f"{self.plan.folder}: rank {dist.get_rank()} sees {len(self._index)} entries, rank 0 "
                    f"{self.plan.entries}: elastic.teacher_cache.folder must be shared by all nodes"
                )
        if last and writes:
            assert self._index is not None
            self._writer = self._exit.enter_context(CacheWriter(self.plan.folder, self._index))

    def _keys(self, batch: Mapping[str, Tensor]) -> list[bytes]:
        ends = batch.get("cu_seqlens")
        return [
            sample_key(self.plan.identity, tokens, None if ends is None else ends[row])
            for row, tokens in enumerate(batch["tokens"])
        ]

    def read(self, batch: Mapping[str, Tensor], device: torch.device, *, training: bool) -> TopKTarget:
        """The target of a batch: this rank's share of every sample.

        Args:
            batch: of the loader, whole sequences on the host.
            device: of the target.
            training: whether it is text of training.

        Raises:
            CacheError: an entry is missing or damaged.
        """
        assert self._index is not None
        assert self._groups is not None
        entries = []
        for row, key in enumerate(self._keys(batch)):
            entry = self._index.read(key)
            if entry is None:
                kind, sample = TRAINING if training else VALIDATION, int(batch["sample"][row])
                raise CacheError(
                    f"{self.plan.root}: {kind} sample {sample} of stage {self.number}, hash {key.hex()}, is missing: "
                    "its tokens are not those that the cache was written from. Run the stage once with `mode: write`, "
                    "or give it the text of that run"
                )
            entries.append(entry)
        whole = {
            "ids": torch.from_numpy(np.stack([entry["ids"] for entry in entries])),
            "log_probs": torch.from_numpy(
                np.stack([np.c_[entry["log_probs"].astype("<f4"), entry["ghost"]] for entry in entries])
            ),
        }
        cut: dict[str, Tensor] = get_batch_on_this_cp_rank(
            whole, is_hybrid_cp=False, cp_group=self._groups.cp, use_per_sequence_balancing=True
        )
        ids, log_probs = (cut[name].to(device).transpose(0, 1).contiguous() for name in ("ids", "log_probs"))
        return TopKTarget(ids, log_probs)

    def write(self, batch: Mapping[str, Tensor], target: TopKTarget, *, training: bool) -> TopKTarget:
        """Adds a batch to the cache, and returns its target as it will be read.

        A sample that is not finite is left out: the check of the loss tells of it.

        Args:
            batch: of the loader, whole sequences on the host.
            target: this rank's share of it.
            training: whether it waits for its step to be made.
        """
        stored = target.rounded(self.plan.layout.precision)
        if self._groups is not None and self._groups.tp.rank() == 0:
            ids, log_probs = self._whole(stored)
            if self._writer is not None:
                text, _ = self.plan.texts[TRAINING if training else VALIDATION]
                for row, key in enumerate(self._keys(batch)):
                    if not np.isfinite(log_probs[row]).all():
                        continue
                    entry = np.empty((), self.plan.layout.dtype)
                    entry["ids"], entry["log_probs"] = ids[row], log_probs[row, :, :-1]
                    entry["ghost"] = log_probs[row, :, -1]
                    self._writer.add(key, text, int(batch["sample"][row]), entry, commit=not training)
        return stored

    def _whole(self, target: TopKTarget) -> tuple[Any, Any]:
        """Ids and log-probabilities of whole sequences, `[b, s, ...]` on the host, from all context-parallel ranks."""
        assert self._groups is not None
        parts, cp = [each.transpose(0, 1) for each in (target.ids, target.log_probs)], self._groups.cp
        if cp.size() > 1:
            length = parts[0].size(1) * cp.size()
            cut: dict[str, Tensor] = get_batch_on_this_cp_rank(
                {"places": torch.arange(length, device=parts[0].device)[None]},
                is_hybrid_cp=False,
                cp_group=cp,
                use_per_sequence_balancing=True,
            )
            for number, part in enumerate(parts):
                parts[number] = part.new_zeros(part.size(0), length, part.size(2))
                parts[number][:, cut["places"][0]] = part
                dist.all_reduce(parts[number], group=cp)
        return parts[0].cpu().numpy(), parts[1].float().cpu().numpy()

    def commit(self) -> None:
        """Called when a step is made: what was written in it stays."""
        if self._writer is not None:
            self._writer.commit()
