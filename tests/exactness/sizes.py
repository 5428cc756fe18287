"""Sizes of the small family of the table of exactness; needs torch alone."""

from megatron_elastic.budget import Budget
from megatron_elastic.curriculum import Stage
from megatron_elastic.family import Family
from megatron_elastic.layout import ModelShape
from megatron_elastic.router import RouterConfig

SHAPE = ModelShape(
    pattern="M-*M-", vocab=64, hidden=32, ffn=64, attention_heads=8, query_groups=2, head_dim=4,
    mamba_heads=8, mamba_head_dim=4, mamba_groups=2, mamba_state=6,
)  # fmt: skip
FAMILY = Family(
    shape=SHAPE,
    ffn_blocks=8,
    choices={
        "hidden": (32, 28, 24, 20),
        "ffn": (64, 48, 32),
        "mamba_heads": (8, 4),
        "mamba_head_dim": (4, 3),
        "attention_heads": (8, 6, 4),
        "depth": (5, 4),
    },
    heterogeneous=("ffn", "mamba_heads"),
    depth_ranking=(1,),
    budgets=(Budget("whole", 1.0), Budget("half", 0.7)),
)
SELECTIONS = (
    FAMILY.full,
    # Layer 1 is left out: with virtual stages the only layer of its chunk.
    FAMILY.select(
        {"hidden": 24, "ffn": (64, 32), "mamba_heads": (4, 8), "mamba_head_dim": 3, "attention_heads": 6, "depth": 4}
    ),
)
SEPARATORS = {(1, 1): "M-*M-", (2, 1): "M-|*M-", (2, 2): "M|-|*|M-"}
WEIGHTS = (0.6, 0.4)
SAMPLES, LENGTH = 4, 16
"""Base samples a step, and tokens of each."""
STAGE = Stage(iterations=40, sequence_length=LENGTH, global_batch_size=SAMPLES, micro_batch_size=1, weights=WEIGHTS)
FIRST, STEPS = 4, 5
"""Optimizer step that comes first (inside the router's schedules), and how many are made."""
ROUTER = RouterConfig(iterations=40, width=16, std=0.5, clip=1.0, warmup=6, penalty=0.7, seed=3, check_interval=2)
SEED = 7
# A large epsilon: Adam would turn roundings of tiny gradients into steps of full size.
ADAM = {"lr": 0.02, "betas": (0.9, 0.95), "eps": 0.1, "weight_decay": 0.0}
