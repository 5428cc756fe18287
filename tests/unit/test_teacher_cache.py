"""A teacher cache's identity, keys and completeness, and one rank's writing and reading."""

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_elastic.config import Recipe, Stage, load_recipe
from megatron_elastic.curriculum import TeacherCache
from megatron_elastic.distillation.teacher_cache import (
    TRAINING,
    VALIDATION,
    StagePlan,
    check_cache,
    identity_of,
    sample_key,
    text_of,
)
from megatron_elastic.errors import CacheError
from tests.unit import small_parent

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "quickstart.yaml"
LENGTH, TOP_K, SAMPLES = 6, 3, 4
STAGE = Stage(iterations=2, sequence_length=LENGTH, global_batch_size=2, micro_batch_size=2, weights=(0.4, 0.3, 0.3))


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    for name in ("train", "validation"):
        (tmp_path / f"{name}.idx").write_bytes(name.encode())
        (tmp_path / f"{name}.bin").write_bytes(bytes(100))
    small_parent.write(tmp_path / "teacher", small_parent.weights())
    read = load_recipe(RECIPE)
    return dataclasses.replace(
        read,
        teacher=str(tmp_path / "teacher"),
        train_data=str(tmp_path / "train"),
        validation_data=str(tmp_path / "validation"),
        stages=(STAGE, dataclasses.replace(STAGE, sequence_length=2 * LENGTH)),
        evaluation=dataclasses.replace(read.evaluation, iterations=1),
        teacher_cache=TeacherCache(folder=str(tmp_path / "cache"), top_k=TOP_K),
    )


def with_cache(recipe: Recipe, **changes: Any) -> Recipe:
    assert recipe.teacher_cache is not None
    return dataclasses.replace(recipe, teacher_cache=dataclasses.replace(recipe.teacher_cache, **changes))


def plan(recipe: Recipe, number: int = 1) -> StagePlan:
    assert recipe.teacher_cache is not None
    return StagePlan(recipe, number, recipe.teacher_cache)


@pytest.fixture
def one_rank() -> Iterator[Any]:
    """Process groups of one process."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    world = dist.group.WORLD
    yield SimpleNamespace(pp=world, tp=world, cp=world, dp=world)
    dist.destroy_process_group()


def opened(recipe: Recipe, groups: Any) -> Any:
    from megatron_elastic.distillation.stage_cache import StageCache

    assert recipe.teacher_cache is not None
    cache = StageCache(recipe, 1, recipe.teacher_cache)
    cache.open(groups)
    return cache


def batch_of(*samples: int, kind: int = 0) -> dict[str, torch.Tensor]:
    tokens = torch.stack([torch.arange(LENGTH) + 100 * sample + 1000 * kind for sample in samples])
    return {"tokens": tokens, "sample": torch.tensor(samples)}


def target_of(batch: dict[str, torch.Tensor]) -> Any:
    """Something that depends on every token."""
    from megatron_elastic.layers.linear import TopKTarget

    tokens = batch["tokens"].t()[..., None]
    ids = (tokens * 7 + torch.arange(TOP_K)) % 1000
    return TopKTarget(ids.int(), -(tokens + torch.arange(TOP_K + 1)).float().sqrt())


def write_all(recipe: Recipe, groups: Any) -> dict[tuple[str, int], Any]:
    """Writes a whole stage, two samples at a time; returns the targets of the batches."""
    found = {}
    with opened(recipe, groups) as cache:
        assert not cache.reads
        for first in range(0, SAMPLES, 2):
            batch = batch_of(first, first + 1)
            found[TRAINING, first] = cache.write(batch, target_of(batch), training=True)
            cache.commit()
        batch = batch_of(0, 1, kind=1)
        found[VALIDATION, 0] = cache.write(batch, target_of(batch), training=False)
    return found


CPU = torch.device("cpu")


def test_what_is_written_is_read_sample_by_sample(recipe: Recipe, one_rank: Any) -> None:
    written = write_all(recipe, one_rank)
    cache = opened(recipe, one_rank)
    assert cache.reads
    for (kind, first), target in written.items():
        for row in range(2):
            batch = batch_of(first + row, kind=kind == VALIDATION)
            found = cache.read(batch, CPU, training=kind == TRAINING)
            assert torch.equal(found.ids, target.ids[:, [row]])
            assert torch.equal(found.log_probs, target.log_probs[:, [row]])
            assert not torch.equal(found.ids, target.ids[:, [1 - row]])
    exact = target_of(batch_of(0))
    rounded = cache.read(batch_of(0), CPU, training=True)
    assert torch.equal(rounded.log_probs[..., -1], exact.log_probs[..., -1])  # the ghost's
    # Eleven bits.
    torch.testing.assert_close(rounded.log_probs, exact.log_probs, rtol=2**-11, atol=0.0)
    assert not torch.equal(rounded.log_probs, exact.log_probs)


def test_a_miss_names_sample_hash_and_remedy(recipe: Recipe, one_rank: Any) -> None:
    write_all(recipe, one_rank)
    cache, batch = opened(recipe, one_rank), batch_of(2, 3)
    batch["tokens"][1, 4] += 1
    key = sample_key(cache.plan.identity, batch["tokens"][1], None).hex()
    with pytest.raises(CacheError, match=rf"training sample 3 of stage 1, hash {key}, is missing.*mode: write"):
        cache.read(batch, CPU, training=True)
    with pytest.raises(CacheError, match="validation sample 3"):
        cache.read(batch, CPU, training=False)


def test_a_rank_that_sees_less_than_rank_0_says_so(
    recipe: Recipe, one_rank: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_elastic.distillation import stage_cache

    write_all(recipe, one_rank)
    monkeypatch.setattr(stage_cache, "CacheIndex", lambda *_: [])
    with pytest.raises(CacheError, match=r"rank 0 sees 0 entries, rank 0 6: .* must be shared by all nodes"):
        opened(recipe, one_rank)


def test_values_that_are_not_finite_are_not_kept(recipe: Recipe, one_rank: Any) -> None:
    batch = batch_of(0, 1)
    target = target_of(batch)
    target.log_probs[3, 1, 2] = torch.nan
    with opened(recipe, one_rank) as cache:
        assert cache.write(batch, target, training=True).log_probs.isnan().any()
        cache.commit()
    assert plan(recipe).there == {TRAINING: 1, VALIDATION: 0}


def test_an_orderly_exit_keeps_what_waits_and_an_error_does_not(recipe: Recipe, one_rank: Any) -> None:
    for error, kept in ((SystemExit(1), 0), (SystemExit(0), 1)):
        cache = opened(recipe, one_rank)
        cache.write(batch_of(0), target_of(batch_of(0)), training=True)
        cache.__exit__(SystemExit, error, None)
        assert plan(recipe).there[TRAINING] == kept


def test_modes(recipe: Recipe, one_rank: Any) -> None:
    assert not plan(recipe).reads
    with pytest.raises(CacheError, match=r"is no teacher cache, cache.json is missing: write one with `mode: write`"):
        plan(with_cache(recipe, mode="read"))
    with opened(recipe, one_rank) as cache:
        cache.write(batch_of(0, 1), target_of(batch_of(0, 1)), training=True)
        cache.commit()
    assert not plan(recipe).reads
    with pytest.raises(CacheError, match="2 of 4 training samples, 0 of 2 validation samples of 6 tokens are there"):
        opened(with_cache(recipe, mode="read"), one_rank)
    write_all(recipe, one_rank)
    assert plan(recipe).reads
    assert plan(with_cache(recipe, mode="read")).reads
    assert not plan(with_cache(recipe, mode="write")).reads
    with pytest.raises(CacheError, match=r"stage 2 is not complete: 0 of 4 .* sequences of other lengths: \[6\]"):
        plan(with_cache(recipe, mode="read"), 2)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"temperature": 2.0}, "temperature is 1.0, the recipe's 2.0"),
        ({"top_k": 4}, "top_k is 3, the recipe's 4"),
        ({"precision": "fp32"}, "precision is 'fp16', the recipe's 'fp32'"),
        ({"teacher": "other"}, "teacher is "),
    ],
)
@pytest.mark.parametrize("mode", ["auto", "read", "write"])
def test_another_caches_settings_are_refused(
    recipe: Recipe, tmp_path: Path, mode: str, changes: dict[str, Any], text: str
) -> None:
    plan(recipe).begin()
    check_cache(recipe)
    if "teacher" in changes:
        weights = small_parent.weights()
        weights["output_layer.weight"][0, 0] += 0.5
        small_parent.write(tmp_path / "other", weights)
        other = dataclasses.replace(recipe, teacher=str(tmp_path / "other"))
    elif "temperature" in changes:
        other = dataclasses.replace(recipe, **changes)
    else:
        other = with_cache(recipe, **changes)
    for refused in (check_cache, plan):
        with pytest.raises(CacheError, match="was written with other settings") as told:
            refused(with_cache(other, mode=mode))  # type: ignore[operator]
        assert text in str(told.value)


def test_a_teacher_is_told_by_its_files_wherever_they_are(recipe: Recipe, tmp_path: Path) -> None:
    assert recipe.teacher_cache is not None
    one = identity_of(recipe, recipe.teacher_cache)
    shutil.copytree(recipe.teacher, tmp_path / "copy")
    copied = dataclasses.replace(recipe, teacher=str(tmp_path / "copy"))
    assert identity_of(copied, recipe.teacher_cache) == one
    manifest = next((tmp_path / "copy").rglob("integrity.json"))
    manifest.unlink()
    assert identity_of(copied, recipe.teacher_cache) == one


def test_keys_depend_on_tokens_documents_and_teacher() -> None:
    tokens = torch.arange(8)
    ends = torch.tensor([0, 3, 8])
    one = {"teacher": "a"}
    keys = [
        sample_key(one, tokens, None),
        sample_key({"teacher": "b"}, tokens, None),
        sample_key(one, tokens + (tokens == 5), None),
        sample_key(one, tokens[:7], None),
        sample_key(one, tokens, ends),
        sample_key(one, tokens, torch.tensor([0, 4, 8])),
    ]
    assert len(set(keys)) == len(keys)
    assert {len(key) for key in keys} == {16}
    assert sample_key(one, tokens.int(), None) == keys[0]
    # A batch pads the ends to one length.
    assert sample_key(one, tokens, torch.tensor([0, 3, 8, 8, 8])) == keys[4]


def test_texts_are_told_apart_and_known_where_they_were_moved(recipe: Recipe, tmp_path: Path) -> None:
    one, samples = text_of(recipe, 1, TRAINING)
    assert samples == SAMPLES
    assert text_of(recipe, 1, VALIDATION)[1] == 2
    longer = dataclasses.replace(recipe, stages=(dataclasses.replace(STAGE, iterations=3),))
    others = [
        text_of(recipe, 1, VALIDATION),
        text_of(recipe, 2, TRAINING),
        text_of(longer, 1, TRAINING),
        text_of(dataclasses.replace(recipe, megatron={**recipe.megatron, "seed": 4321}), 1, TRAINING),
        text_of(dataclasses.replace(recipe, train_data=recipe.validation_data), 1, TRAINING),
    ]
    assert len({one, *(text for text, _ in others)}) == 6
    for suffix in ("idx", "bin"):
        shutil.copyfile(f"{recipe.train_data}.{suffix}", tmp_path / f"moved.{suffix}")
    assert text_of(dataclasses.replace(recipe, train_data=str(tmp_path / "moved")), 1, TRAINING)[0] == one
