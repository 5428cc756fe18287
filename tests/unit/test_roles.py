"""Roles: index -> (base sample, role), with Megatron's own sampler arithmetic around it."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from megatron_elastic.distillation.roles import TEACHER, JointRoles, RoleDataset, SampledRoles
from megatron_elastic.parallel import ranks_of

BUDGETS = 3
ROLES = BUDGETS + 1


class Text(torch.utils.data.Dataset[dict[str, Any]]):
    """Sample `i` says `i`."""

    index_split = "the training split"

    def __init__(self, size: int = 1000) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"tokens": torch.tensor([index])}


def roles(group: int, samples: int = 24, **other: Any) -> RoleDataset:
    return RoleDataset(Text(), **{"roles": JointRoles(BUDGETS), "group": group, "samples": samples, **other})


def sampler(dataset: RoleDataset, micro: int, rank: int, world: int, consumed: int = 0) -> Iterator[list[int]]:
    """`MegatronPretrainingSampler.__iter__`, written again."""
    batch = []
    for index in range(consumed, len(dataset)):
        batch.append(index)
        if len(batch) == micro * world:
            yield batch[rank * micro : (rank + 1) * micro]
            batch = []


def test_runs_of_a_group_share_a_role() -> None:
    dataset = roles(4)
    found = [dataset.at(index) for index in range(2 * ROLES * 4)]
    assert [role for _, role in found[::4]] == [0, 1, 2, 3, 0, 1, 2, 3]
    for run in range(2 * ROLES):
        inside = found[run * 4 : (run + 1) * 4]
        assert len({role for _, role in inside}) == 1
        assert [sample for sample, _ in inside] == [run // ROLES * 4 + i for i in range(4)]


def test_every_base_sample_comes_once_a_role() -> None:
    dataset = roles(4)
    assert len(dataset) == 24 * ROLES
    seen = Counter(dataset.at(index) for index in range(len(dataset)))
    assert set(seen) == {(sample, role) for sample in range(24) for role in range(ROLES)}
    assert set(seen.values()) == {1}


def test_items_carry_their_budget_beside_the_text() -> None:
    dataset = roles(4)
    item = dataset[4 * 5 + 2]  # sixth run: the second group's first student
    assert item["tokens"].tolist() == [6]
    assert item["budget"] == BUDGETS - 1
    assert dataset[4 * 4 + 2]["budget"] == TEACHER  # the run before: the teacher, on the same text
    assert dataset[4 * 4 + 2]["tokens"].tolist() == [6]
    assert "budget" not in dataset.base[6]


def test_a_part_of_a_group_is_filled_up() -> None:
    assert len(roles(4, samples=9)) == 12 * ROLES
    assert len(roles(1, samples=9)) == 9 * ROLES


def test_the_text_repeats_after_a_period() -> None:
    dataset = roles(2, samples=12, period=6)
    found = [dataset.at(index)[0] for index in range(len(dataset))]
    half = len(found) // 2
    assert found[:half] == found[half:]
    assert set(found) == set(range(6))
    assert {roles(2, samples=12).at(index)[0] for index in range(len(dataset))} == set(range(12))


def test_a_later_stage_starts_where_its_counter_stands() -> None:
    start = 40 * ROLES
    dataset, first = roles(4, start=start), roles(4)
    assert len(dataset) == start + 24 * ROLES
    for index in range(24 * ROLES):
        assert dataset.at(start + index) == first.at(index)
    with pytest.raises(IndexError, match=f"index {start - 1} lies before"):
        dataset[start - 1]


def test_the_split_is_the_base_datasets() -> None:
    assert roles(4).index_split == "the training split"


@pytest.mark.parametrize(("micro", "world"), [(1, 1), (2, 2), (1, 4), (3, 2)])
def test_a_microbatch_has_one_role_on_every_rank(micro: int, world: int) -> None:
    dataset = roles(micro * world)
    streams = [list(sampler(dataset, micro, rank, world)) for rank in range(world)]
    for step, microbatches in enumerate(zip(*streams, strict=True)):
        found = {dataset.at(index)[1] for microbatch in microbatches for index in microbatch}
        assert found == {step % ROLES}
    # A rank's students run the very samples that its teacher ran.
    for stream in streams:
        samples = [[dataset.at(index)[0] for index in microbatch] for microbatch in stream]
        for first in range(0, len(samples), ROLES):
            assert all(samples[first] == samples[first + role] for role in range(ROLES))


def test_a_group_of_another_size_would_mix_roles() -> None:
    dataset = roles(2)  # made for one rank, sampled on two
    mixed = [{dataset.at(index)[1] for index in microbatch} for microbatch in sampler(dataset, 4, 0, 1)]
    assert any(len(found) > 1 for found in mixed)


def step_samples(micro: int, world: int, consumed: int, steps: int, start: int = 0) -> list[set[int]]:
    """Base samples of each optimizer step, over all ranks; the global batch has 8 base samples."""
    dataset = roles(micro * world, start=start)
    streams = [sampler(dataset, micro, rank, world, consumed) for rank in range(world)]
    microbatches = 8 // (micro * world) * ROLES
    found = []
    for _ in range(steps):
        taken = [next(stream) for _ in range(microbatches) for stream in streams]
        found.append({dataset.at(index)[0] for microbatch in taken for index in microbatch})
    return found


def test_other_ranks_read_the_same_base_samples() -> None:
    expected = [set(range(0, 8)), set(range(8, 16)), set(range(16, 24))]
    for micro, world in [(8, 1), (2, 1), (2, 2), (1, 8), (4, 2)]:
        assert step_samples(micro, world, 0, 3) == expected


def test_a_resume_on_other_ranks_goes_on_with_the_next_samples() -> None:
    before = step_samples(2, 2, 0, 1)
    after = step_samples(2, 1, 8 * ROLES, 2)  # consumed counts every role
    assert before + after == [set(range(0, 8)), set(range(8, 16)), set(range(16, 24))]
    start = 16 * ROLES  # the same inside a later stage
    assert step_samples(1, 4, start + 8 * ROLES, 1, start=start) == [set(range(8, 16))]


def test_students_go_from_narrow_to_full() -> None:
    assert [JointRoles(BUDGETS).budget(role, 0) for role in range(ROLES)] == [TEACHER, 2, 1, 0]
    assert JointRoles(1).budget(1, 5) == 0  # the last microbatch reaches every parameter
    assert JointRoles(0).count == 1


def drawn(micro: int, world: int, *, consumed: int = 0, seed: int = 3, steps: int = 6) -> list[dict[int, int]]:
    """Base sample -> budget of each optimizer step, over all ranks; the global batch has 8 base samples."""
    kind = SampledRoles((0.5, 0.3, 0.2), seed=seed, together=micro)
    dataset = roles(micro * world, samples=64, roles=kind)
    streams = [sampler(dataset, micro, rank, world, consumed) for rank in range(world)]
    found = []
    for _ in range(steps):
        step: dict[int, int] = {}
        for _ in range(8 // (micro * world)):
            for stream in streams:
                teacher, student = next(stream), next(stream)
                assert {dataset[index]["budget"] for index in teacher} == {TEACHER}
                budgets = {dataset[index]["budget"] for index in student}
                assert len(budgets) == 1, "one microbatch is run by one budget"
                assert [dataset.at(i)[0] for i in teacher] == [dataset.at(i)[0] for i in student]
                step.update({dataset.at(index)[0]: budgets.copy().pop() for index in student})
        found.append(step)
    return found


@pytest.mark.parametrize("micro", [1, 2])
def test_draws_do_not_depend_on_the_data_parallel_size(micro: int) -> None:
    assert drawn(micro, 1) == drawn(micro, 2) == drawn(micro, 4)
    assert drawn(micro, 2, consumed=8 * 2, steps=5) == drawn(micro, 1)[1:]  # a resume: consumed counts both roles
    assert drawn(micro, 1) != drawn(micro, 1, seed=4)
    assert drawn(1, 1) != drawn(2, 1)


def test_budgets_come_as_often_as_they_weigh() -> None:
    kind = SampledRoles((0.5, 0.3, 0.2), seed=9, together=1)
    count = 20_000
    found = Counter(kind.budget(1, sample) for sample in range(count))
    for budget, share in enumerate((0.5, 0.3, 0.2)):
        # Four standard deviations of a share of 20,000 draws.
        assert abs(found[budget] / count - share) < 4 * (share * (1 - share) / count) ** 0.5
    assert {SampledRoles((0.0, 1.0), seed=1, together=1).budget(1, i) for i in range(100)} == {1}
    assert {SampledRoles((1.0, 0.0), seed=1, together=1).budget(1, i) for i in range(100)} == {0}


@pytest.mark.parametrize(
    ("flags", "ranks"),
    [
        ({}, 1),
        ({"expert-model-parallel-size": 4}, 4),
        # Experts are split over context- and tensor-parallel ranks first: those run one budget anyway.
        ({"expert-model-parallel-size": 4, "context-parallel-size": 2}, 2),
        ({"expert-model-parallel-size": 4, "tensor-model-parallel-size": 2, "expert-tensor-parallel-size": 1}, 2),
        ({"expert-model-parallel-size": 4, "tensor-model-parallel-size": 2}, 4),
        ({"expert-model-parallel-size": 2, "tensor-model-parallel-size": 4, "expert-tensor-parallel-size": 1}, 1),
    ],
)
def test_ranks_that_share_experts_draw_together(flags: dict[str, int], ranks: int) -> None:
    assert ranks_of(flags, []).sharing_experts == ranks
    kind = SampledRoles((0.5, 0.3, 0.2), seed=9, together=2 * ranks)
    draws = [kind.budget(1, sample) for sample in range(96 * ranks)]
    groups = [draws[start : start + 2 * ranks] for start in range(0, len(draws), 2 * ranks)]
    assert all(len(set(group)) == 1 for group in groups)
    assert len({group[0] for group in groups}) == 3
