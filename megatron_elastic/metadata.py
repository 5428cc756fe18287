"""What a checkpoint says about itself: the family's (or the submodel's) description, stored inside it as one tensor."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron_elastic.budget import Budget, Selection
from megatron_elastic.cost_model import Deployment
from megatron_elastic.errors import CheckpointError
from megatron_elastic.family import Family
from megatron_elastic.layout import ModelShape
from megatron_elastic.router import RouterConfig

KEY = "elastic.metadata"
"""Name of the metadata tensor in a checkpoint."""
ROUTER_PREFIX = "elastic.router."
"""Beginning of the router's names in a checkpoint."""
SCHEMA = 3
"""Written; 1 (without `budget_mode`) and 2 (four axes, alike in all layers) are read too."""
CAPACITY = 1 << 17
"""Bytes reserved: a fixed size, so that the tensor's shape does not depend on what it says."""


@dataclass(frozen=True, kw_only=True)
class Metadata:
    """Description of a sorted parent, a family or an extracted submodel.

    Attributes:
        kind: `sorted`, `family` or `extracted`.
        shape: of the weights in this checkpoint.
        ffn_blocks, expert_blocks: see `ModelShape.orders`; the other axes' blocks follow from the shape.
        depth_ranking: layer numbers, least important first, where the layers were ranked.
        flags: Megatron's own model flags (without dashes), enough to build the model.
        choices: axis -> descending choices (families only).
        heterogeneous: axes whose choice may differ between layers (families only).
        budgets: largest first (families only).
        selections: one per budget when decided, else empty.
        deployment: where the budgets' memory and FLOPs are counted (families only).
        router: its settings, where there is one (families only).
        budget_mode: `joint` or `sampled` (families only): decides how many samples Megatron counts for a base sample.
        stage: curriculum stage that wrote the checkpoint, from 1 (families only).
        iteration: optimizer steps made over all stages.
        budget: name of the extracted budget (extracted only).
    """

    kind: str
    shape: ModelShape
    ffn_blocks: int
    expert_blocks: int = 1
    depth_ranking: tuple[int, ...] = ()
    flags: Mapping[str, Any]
    choices: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    heterogeneous: tuple[str, ...] = ()
    budgets: tuple[Budget, ...] = ()
    selections: tuple[Selection, ...] = ()
    deployment: Mapping[str, Any] = field(default_factory=dict)
    router: Mapping[str, Any] = field(default_factory=dict)
    budget_mode: str = "joint"
    stage: int = 0
    iteration: int = 0
    budget: str = ""

    @classmethod
    def of_family(
        cls,
        family: Family,
        flags: Mapping[str, Any],
        *,
        selections: tuple[Selection, ...] = (),
        stage: int = 0,
        budget_mode: str = "joint",
        router: RouterConfig | None = None,
    ) -> "Metadata":
        """The description of a family as declared, before any training."""
        return cls(
            kind="family",
            shape=family.shape,
            ffn_blocks=family.ffn_blocks,
            expert_blocks=family.expert_blocks,
            depth_ranking=family.depth_ranking,
            flags=flags,
            choices=dict(family.choices),
            heterogeneous=family.heterogeneous,
            budgets=family.budgets,
            selections=selections,
            deployment=asdict(family.deployment),
            router={} if router is None else asdict(router),
            stage=stage,
            budget_mode=budget_mode,
        )

    @property
    def family(self) -> Family:
        """The family that a checkpoint of kind `family` describes."""
        return Family(
            shape=self.shape,
            ffn_blocks=self.ffn_blocks,
            expert_blocks=self.expert_blocks,
            choices=self.choices,
            heterogeneous=self.heterogeneous,
            depth_ranking=self.depth_ranking,
            budgets=self.budgets,
            deployment=Deployment(**self.deployment),
        )

    def to_json(self) -> str:
        """One JSON object, schema version inside."""
        values = asdict(self)
        values["schema"] = SCHEMA
        return json.dumps(values, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "Metadata":
        """Reads what `to_json` wrote.

        Raises:
            CheckpointError: not such JSON, or a schema that this version does not know.
        """
        try:
            values = json.loads(text)
            schema = values.pop("schema")
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{KEY}: not a description of an elastic checkpoint ({error})") from error
        if schema not in range(1, SCHEMA + 1):
            raise CheckpointError(f"{KEY}: schema {schema}, this version reads up to {SCHEMA}: update megatron_elastic")
        try:
            shape = values["shape"] = ModelShape.from_dict(values["shape"])
            values["choices"] = {axis: tuple(sizes) for axis, sizes in values["choices"].items()}
            if schema < 3:
                if values["kind"] == "family":  # axes that it did not know were whole
                    values["choices"] = {**shape.choices, **values["choices"]}
                    values["deployment"] = asdict(Deployment())
                values["selections"] = [{**shape.full, **kept} for kept in values["selections"]]
            for name in ("heterogeneous", "depth_ranking"):
                values[name] = tuple(values.get(name, ()))
            values["budgets"] = tuple(Budget(**budget) for budget in values["budgets"])
            values["selections"] = tuple(Selection.from_dict(kept) for kept in values["selections"])
            return cls(**values)
        except (KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{KEY}: a damaged description of an elastic checkpoint ({error!r})") from error

    def to_tensor(self) -> Tensor:
        """The JSON, padded with spaces, `[CAPACITY]` uint8."""
        raw = self.to_json().encode()
        if len(raw) > CAPACITY:
            raise CheckpointError(f"{KEY}: {len(raw)} bytes, {CAPACITY} are reserved: use fewer choices or budgets")
        return torch.frombuffer(bytearray(raw.ljust(CAPACITY)), dtype=torch.uint8).clone()

    @classmethod
    def from_tensor(cls, tensor: Tensor) -> "Metadata":
        """Reads what `to_tensor` wrote."""
        return cls.from_json(bytes(tensor.cpu().numpy().tobytes()).decode(errors="replace"))

    def selection_of(self, name: str) -> Selection:
        """The decided selection of a budget.

        Raises:
            CheckpointError: no such budget, or its selection is not decided yet.
        """
        names = [budget.name for budget in self.budgets]
        if name not in names:
            raise CheckpointError(f"budget {name!r}: the family has {names}")
        if not self.selections:
            raise CheckpointError(f"budget {name!r}: not decided yet, the router learns: train the family further")
        return self.selections[names.index(name)]

    def same_family(self, other: "Metadata") -> list[str]:
        """What makes a checkpoint another family than this one (empty when it is the same)."""
        found = []
        for name in (
            *("kind", "shape", "ffn_blocks", "expert_blocks", "choices", "heterogeneous", "depth_ranking"),
            *("budgets", "budget_mode", "deployment"),
        ):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                found.append(f"{name}: the recipe has {mine}, the checkpoint {theirs}")
        return found
