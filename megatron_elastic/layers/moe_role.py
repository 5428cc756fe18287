"""What a MoE layer must know of the microbatch beside its data."""

from dataclasses import dataclass


@dataclass(frozen=True)
class MoeRole:
    """The part that a microbatch plays for the balance of experts.

    Attributes:
        count_tokens: whether its tokens move the experts' biases: only the full budget's do, or cut experts would look
            starved.
        loss_weight: factor on its auxiliary losses, so that their sum over budgets is weighted as the KD loss is.
    """

    count_tokens: bool
    loss_weight: float
