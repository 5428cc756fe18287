"""What is refused before any process is started."""

import dataclasses
from pathlib import Path

import pytest
import torch

from megatron_elastic.budget import Budget
from megatron_elastic.cli import position
from megatron_elastic.config import Recipe, load_recipe
from megatron_elastic.errors import CheckpointError
from megatron_elastic.family import Family
from megatron_elastic.metadata import Metadata
from tests.unit import small_parent

ROOT = Path(__file__).resolve().parents[3]


def recipe(parent: Path, *, ffn: int = small_parent.SHAPE.ffn, blocks: int = small_parent.BLOCKS) -> Recipe:
    """The quickstart's recipe for the small parent."""
    shape = dataclasses.replace(small_parent.SHAPE, ffn=ffn)
    family = Family(
        shape=shape,
        ffn_blocks=blocks,
        choices={axis: (size,) for axis, size in shape.full.items()},
        budgets=(Budget("p100", 1.0),),
    )
    given = load_recipe(ROOT / "recipes" / "quickstart.yaml")
    return dataclasses.replace(given, parent=str(parent), teacher=str(parent), family=family)


def metadata() -> Metadata:
    return Metadata(kind="sorted", shape=small_parent.SHAPE, ffn_blocks=small_parent.BLOCKS, flags=small_parent.FLAGS)


def test_the_described_parent_passes(tmp_path: Path) -> None:
    small_parent.write(tmp_path / "stock", small_parent.weights())
    small_parent.write(tmp_path / "sorted", small_parent.weights(), metadata=metadata())
    position.check_parent(recipe(tmp_path / "stock"))
    position.check_parent(recipe(tmp_path / "sorted"))


def test_another_parent_is_refused_with_what_differs(tmp_path: Path) -> None:
    small_parent.write(tmp_path / "stock", small_parent.weights())
    with pytest.raises(CheckpointError, match=r"linear_fc1.weight is \(16, 12\), the recipe's \(32, 12\)"):
        position.check_parent(recipe(tmp_path / "stock", ffn=32))


def test_another_block_order_is_refused(tmp_path: Path) -> None:
    small_parent.write(tmp_path / "sorted", small_parent.weights(), metadata=metadata())
    with pytest.raises(CheckpointError, match="sorted into 4 ffn blocks, the recipe has 8"):
        position.check_parent(recipe(tmp_path / "sorted", blocks=8))


def test_another_teacher_has_the_parents_shapes_in_any_order(tmp_path: Path) -> None:
    for name in ("parent", "teacher"):
        small_parent.write(tmp_path / name, small_parent.weights(), metadata=metadata())
    wanted = dataclasses.replace(recipe(tmp_path / "parent"), teacher=str(tmp_path / "teacher"))
    position.check_parent(wanted)
    weights = small_parent.weights()
    weights["decoder.final_norm.weight"] = weights["decoder.final_norm.weight"][:-1]
    small_parent.write(tmp_path / "narrow", weights)
    with pytest.raises(CheckpointError, match=r"not the teacher that the recipe describes: decoder.final_norm.weight"):
        position.check_parent(dataclasses.replace(wanted, teacher=str(tmp_path / "narrow")))


def test_no_parent_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        position.check_parent(recipe(tmp_path / "nowhere"))


def test_without_a_gpu_a_run_takes_the_ranks_of_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    split = {"tensor-model-parallel-size": 2, "pipeline-model-parallel-size": 3, "context-parallel-size": 4}
    monkeypatch.setattr(position, "gpu_count", lambda: 0)
    assert position.default_ranks({}) == 1
    assert position.default_ranks(split) == 24
    monkeypatch.setattr(position, "gpu_count", lambda: 8)
    assert position.default_ranks(split) == 8


def test_a_stop_says_where(tmp_path: Path) -> None:
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    with pytest.raises(KeyboardInterrupt, match="stopped at iteration 0 of 9"), position.stops(tmp_path, 0, 5, 9):
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt, match="stopped at iteration 3 of 9"), position.stops(tmp_path, 0, 5, 9):
        tracker.write_text("3")  # the ranks got the signal, saved, and ended with status 0
    with position.stops(tmp_path, 3, 5, 9):
        tracker.write_text("5")
    with position.stops(tmp_path, 5, 9, 9):
        pass  # nothing was saved: that is no stop, and the caller's to judge


def saved_family(folder: Path, **changed: object) -> Path:
    """A family of the recipe, saved after 20 iterations of which 3 made no optimizer step."""
    declared = Metadata.of_family(recipe(folder).family, {}, stage=1)
    found = dataclasses.replace(declared, iteration=17, **changed)  # type: ignore[arg-type]
    tensors = {**small_parent.weights(), "elastic.router.hidden.0.weight": torch.zeros(2)}
    return small_parent.write(folder, tensors, metadata=found)


def position_of(folder: Path, **flags: object) -> int:
    wanted = recipe(folder)
    return position.family_position(
        dataclasses.replace(wanted, save=str(folder), megatron={**wanted.megatron, **flags})
    )


def test_the_position_is_megatrons_count(tmp_path: Path) -> None:
    assert position_of(tmp_path / "family") == 0
    saved_family(tmp_path / "family")
    assert position_of(tmp_path / "family") == 20


def test_another_family_and_one_without_its_router_are_refused(tmp_path: Path) -> None:
    saved_family(tmp_path / "other", budgets=(Budget("p90", 0.9),))
    with pytest.raises(CheckpointError, match=r"other/iter_0000020: another family .*budgets: the recipe has"):
        position_of(tmp_path / "other")
    described = Metadata.of_family(recipe(tmp_path).family, {}, selections=(recipe(tmp_path).family.full,))
    small_parent.write(tmp_path / "given", small_parent.weights(), metadata=described)
    with pytest.raises(CheckpointError, match=r"given/iter_0000020: the router is missing"):
        position_of(tmp_path / "given")
    small_parent.write(tmp_path / "plain", small_parent.weights())
    with pytest.raises(CheckpointError, match="is no family"):
        position_of(tmp_path / "plain")


def test_a_family_without_a_manifest_gets_one_unless_the_flag_is_off(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = saved_family(tmp_path / "family")
    (path / "integrity.json").unlink()
    assert position_of(tmp_path / "family", **{"verify-integrity": False}) == 20
    assert not (path / "integrity.json").exists()
    assert position_of(tmp_path / "family") == 20
    assert (path / "integrity.json").exists()
    assert "saved without a manifest, so only sizes could be checked" in capsys.readouterr().out
    # With the flag off no digest is compared: the user asked for that.
    for file in path.glob("*.distcp"):
        content = bytearray(file.read_bytes())
        content[-300] ^= 1
        file.write_bytes(content)
    assert position_of(tmp_path / "family", **{"verify-integrity": False}) == 20
    with pytest.raises(CheckpointError, match="is damaged"):
        position_of(tmp_path / "family")


def test_one_run_at_a_time_saves_to_a_folder(tmp_path: Path) -> None:
    with position.only_run(tmp_path / "family"):
        with pytest.raises(CheckpointError, match="another run saves to"), position.only_run(tmp_path / "family"):
            pass
        with position.only_run(tmp_path / "other"):
            pass
    with position.only_run(tmp_path / "family"):
        pass
