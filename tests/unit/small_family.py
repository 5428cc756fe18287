"""A small family with several groups and blocks on every axis, and what hypothesis draws from it."""

from hypothesis import strategies as st

from megatron_elastic.axes import AXES
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
        "attention_heads": (8, 4),
    },
    budgets=(Budget("p100", 1.0), Budget("p75", 0.75), Budget("p50", 0.5)),
)


def selections() -> st.SearchStrategy[Selection]:
    """Any selection that the family's choices allow."""
    return st.builds(Selection, **{axis: st.sampled_from(FAMILY.choices[axis]) for axis in AXES})
