"""Names of routed experts: a module each in the model, one tensor in a checkpoint."""

import pytest

from megatron_elastic.checkpoint.names import expert_of, extra_states

LAYER = "decoder.layers.3.mlp"


@pytest.mark.parametrize(
    ("module", "stock", "expert"),
    [
        (f"{LAYER}.experts.local_experts.12.linear_fc1.weight", f"{LAYER}.experts.experts.linear_fc1.weight", 12),
        (f"{LAYER}.shared_experts.linear_fc1.weight", f"{LAYER}.shared_experts.linear_fc1.weight", None),
        (f"{LAYER}.router.weight", f"{LAYER}.router.weight", None),
    ],
)
def test_a_module_is_an_entry_of_a_stored_tensor(module: str, stock: str, expert: int | None) -> None:
    assert expert_of(module) == (stock, expert)


def test_every_expert_has_an_extra_state() -> None:
    assert extra_states(f"{LAYER}.experts.experts.linear_fc2.weight", (3, 8, 4)) == tuple(
        f"{LAYER}.experts.experts.linear_fc2._extra_state/shard_{number}_3" for number in range(3)
    )
    shared = extra_states(f"{LAYER}.shared_experts.linear_fc2.weight", (8, 4))
    assert shared == (f"{LAYER}.shared_experts.linear_fc2._extra_state/shard_0_1",)
    assert extra_states(f"{LAYER}.router.weight", (3, 8)) == ()
