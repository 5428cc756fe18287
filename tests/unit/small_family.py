"""A small family with several groups and blocks on every axis, and what hypothesis draws from it."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from hypothesis import strategies as st

from megatron_elastic.budget import Budget, Selection
from megatron_elastic.family import Family
from megatron_elastic.layout import ModelShape

SHAPE = ModelShape(
    pattern="M-*M-", vocab=32, hidden=12, ffn=32, attention_heads=8, query_groups=4, head_dim=3,
    mamba_heads=12, mamba_head_dim=2, mamba_groups=4, mamba_state=3,
)  # fmt: skip
FAMILY = Family(
    shape=SHAPE,
    ffn_blocks=8,
    choices={
        "hidden": (12, 10, 8, 7, 6),
        "ffn": (32, 24, 16, 8),
        "mamba_heads": (12, 8, 4),
        "mamba_head_dim": (2, 1),
        "attention_heads": (8, 4),
        "depth": (5, 4, 3),
    },
    depth_ranking=(3, 1, 2),
    budgets=(Budget("p100", 1.0), Budget("p75", 0.75), Budget("p50", 0.5)),
)
AXES = FAMILY.axes
VARIED = replace(FAMILY, heterogeneous=("ffn", "mamba_heads", "attention_heads"))
"""The same, with choices that may differ from layer to layer."""
LAYERS = len(SHAPE.pattern)


def narrow(*, skipped: tuple[int, ...] = (), **sizes: int | tuple[int, ...]) -> Selection:
    """The whole parent but for some sizes; `depth` leaves out the least important layers, `skipped` those named."""
    selection = FAMILY.select({**SHAPE.full, **sizes})
    return replace(selection, skipped=skipped or selection.skipped)


def every_selection(family: Family = FAMILY) -> Iterator[Selection]:
    """All selections of a homogeneous family."""
    for combination in product(*(family.choices[axis] for axis in family.axes)):
        yield family.select(dict(zip(family.axes, combination, strict=True)))


def selections() -> st.SearchStrategy[Selection]:
    """Any selection that the family's choices allow."""
    made = st.fixed_dictionaries({axis: st.sampled_from(FAMILY.choices[axis]) for axis in AXES})
    return made.map(FAMILY.select)


def varied_selections() -> st.SearchStrategy[Selection]:
    """Any selection that the heterogeneous family's choices allow, whatever layers it skips."""
    sizes = {axis: st.tuples(*[st.sampled_from(VARIED.choices[axis])] * VARIED.uses(axis)) for axis in SHAPE.full}
    skipped = st.sets(st.sampled_from(range(LAYERS)), max_size=LAYERS - 1).map(lambda found: tuple(sorted(found)))
    return st.fixed_dictionaries({**sizes, "skipped": skipped}).map(Selection.from_dict)
