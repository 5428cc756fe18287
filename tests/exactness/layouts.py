"""What the table of exactness compares: layouts, modes, quantities, and the tolerance of each with its reason."""

from dataclasses import dataclass, field
from typing import Any

FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
SELECTIVE = {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]}
NORMS = {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp", "layernorm"]}
"""With norms: core compiles a C++ extension for it at first use."""


@dataclass(frozen=True)
class Layout:
    """One way to spread a step over ranks; what is left of the ranks is data parallel.

    Attributes:
        ranks: processes.
        tp, pp, vp, cp: tensor, pipeline, virtual pipeline and context parallel sizes.
        micro: base samples a microbatch; the step's other samples are accumulated.
        distributed_optimizer: core's, which is fp32 only; else plain DDP in fp64.
        overlap: of the gradients' reduction and of the parameters' gathering with compute.
        config: further settings of the transformer config.
    """

    ranks: int
    tp: int = 1
    pp: int = 1
    vp: int = 1
    cp: int = 1
    micro: int = 1
    distributed_optimizer: bool = False
    overlap: bool = False
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def dp(self) -> int:
        """Data-parallel size."""
        return self.ranks // (self.tp * self.pp * self.cp)

    @property
    def same_order(self) -> bool:
        """Whether every sum over tokens, samples and channels is made in one process's order: then it is bitwise."""
        return self.tp == self.cp == self.dp == 1 and "recompute_granularity" not in self.config


SP = {"sequence_parallel": True}
P2P = {"overlap_p2p_comm": True, "overlap_p2p_comm_warmup_flush": True}
LAYOUTS: dict[str, Layout] = {
    "DP1, gradients accumulated": Layout(1),
    "DP1, one microbatch a step": Layout(1, micro=4),
    "full recompute": Layout(1, config=FULL),
    "selective recompute": Layout(1, config=SELECTIVE),
    "selective recompute, norms too": Layout(1, config=NORMS),
    "TP2": Layout(2, tp=2),
    "TP2 SP": Layout(2, tp=2, config=SP),
    "TP2 SP, full recompute": Layout(2, tp=2, config={**SP, **FULL}),
    "TP2 SP, selective recompute": Layout(2, tp=2, config={**SP, **SELECTIVE}),
    "PP2": Layout(2, pp=2),
    "PP2, full recompute": Layout(2, pp=2, config=FULL),
    "PP2 VPP2": Layout(2, pp=2, vp=2),
    "PP2 VPP2, overlapped P2P": Layout(2, pp=2, vp=2, config=P2P),
    "CP2": Layout(2, cp=2),
    "DP2": Layout(2),
    "DP2, one microbatch a step": Layout(2, micro=2),
    "DP2, overlapped reduction": Layout(2, overlap=True),
    "DP2, distributed optimizer": Layout(2, distributed_optimizer=True),
    "DP2, distributed optimizer, both overlaps": Layout(2, distributed_optimizer=True, overlap=True),
    "DP2, distributed optimizer, both overlaps, full recompute": Layout(
        2, distributed_optimizer=True, overlap=True, config=FULL
    ),
    "TP2 PP2 SP": Layout(4, tp=2, pp=2, config=SP),
    "TP2 PP2 VPP2 SP": Layout(4, tp=2, pp=2, vp=2, config=SP),
    "TP2 CP2 SP": Layout(4, tp=2, cp=2, config=SP),
    "PP2 VPP2 DP2, distributed optimizer, both overlaps": Layout(
        4, pp=2, vp=2, distributed_optimizer=True, overlap=True
    ),
    "TP2 SP DP2, distributed optimizer, both overlaps": Layout(
        4, tp=2, distributed_optimizer=True, overlap=True, config=SP
    ),
    "CP2 DP2, distributed optimizer": Layout(4, cp=2, distributed_optimizer=True),
}

MODES = ("joint soft", "joint sliced", "sampled soft", "sampled sliced")
GRADIENTS = "router gradients"
QUANTITIES = (
    *("losses", "weight gradients", "losses after 5 steps", "weights after 5 steps", GRADIENTS, "penalty"),
    *("selections", "router after 5 steps", "selections after 5 steps"),
)

REASONS = {
    "same order": "the same sums in the same order",
    "fp64": "fp64 sums in another order, or another GEMM (torch chooses it by whether gradients are recorded, and "
    "recompute's first forward records none): some hundred roundings of 1e-16",
    "fp32": "core's distributed optimizer is fp32 only; weights move by the gradient's leading digits",
    "fp32 gradients": "fp32 only; terms of A_log's gradient nearly cancel: one process is 2.4e-4 from itself in fp64",
    "fp32 router": "fp32 only; gradients of probabilities nearly cancel: one process is 1.3e-4 from itself in fp64",
    "fp32 losses": "fp32 only; reported losses are means over some dozen tokens",
    "reported": "reported losses are summed in fp32",
    "discrete": "choices are whole numbers",
    "no ranks": "computed by each rank alone, from the same router",
}


def quantities(mode: str) -> tuple[str, ...]:
    """What exists in a mode: all, but no gradient of a router that has decided and is frozen."""
    return QUANTITIES if mode.endswith("soft") else tuple(q for q in QUANTITIES if q != GRADIENTS)


def tolerance(layout: Layout, quantity: str) -> tuple[float, str]:
    """Largest accepted error, and the key of its reason."""
    if quantity.startswith("selections"):
        return 0.0, "discrete"
    if quantity == "penalty":
        return 0.0, "no ranks"
    if layout.distributed_optimizer and quantity.startswith("losses"):
        return 1e-5, "fp32 losses"
    if layout.distributed_optimizer:
        if quantity == "weight gradients":
            return 1e-3, "fp32 gradients"
        return (1e-3, "fp32 router") if quantity.startswith("router") else (2e-4, "fp32")
    if quantity.startswith("losses"):
        return 1e-6, "reported"
    if layout.same_order and quantity == "weight gradients":
        return 0.0, "same order"
    return 1e-11, "fp64"
