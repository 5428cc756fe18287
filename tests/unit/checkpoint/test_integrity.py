"""Damage of every kind is refused by name; what a stopped save left is put in order."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

from megatron_elastic import checkpoint
from megatron_elastic.budget import Budget, Selection
from megatron_elastic.checkpoint import integrity
from megatron_elastic.checkpoint.names import CONFIG, INDEX, MANIFEST, TRACKER
from megatron_elastic.cli.main import main
from megatron_elastic.errors import CheckpointError
from megatron_elastic.metadata import SCHEMA, Metadata
from tests.unit import small_parent

FULL = Selection.from_dict(small_parent.SHAPE.full)
FAMILY = Metadata(
    kind="family", shape=small_parent.SHAPE, ffn_blocks=small_parent.BLOCKS, flags=small_parent.FLAGS,
    choices={axis: (size,) for axis, size in small_parent.SHAPE.full.items()},
    budgets=(Budget("p100", 1.0),), selections=(FULL,), stage=1, iteration=20,
)  # fmt: skip


def family(folder: Path, metadata: Metadata = FAMILY) -> Path:
    return small_parent.write(folder, small_parent.weights(), metadata=metadata)


def flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 0x10
    file.write_bytes(content)


def shard(path: Path, name: str = "output_layer.weight") -> Path:
    """The file of a tensor."""
    places = checkpoint.reading.index(path).storage_data
    return path / next(place.relative_path for key, place in places.items() if key.fqn == name)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


DAMAGE = {
    "truncated shard": (lambda path: truncate(shard(path)), r"__0_\d+\.distcp is truncated: \d+ bytes, .* refers to"),
    "flipped byte in a shard": (lambda path: flip(shard(path), -300), r"__0_\d+\.distcp is damaged: its SHA-256"),
    "flipped byte in the index": (lambda path: flip(path / INDEX, 700), r"\.metadata is damaged: its SHA-256"),
    "missing shard": (lambda path: shard(path).unlink(), r"__0_\d+\.distcp is missing"),
    "missing index": (lambda path: (path / INDEX).unlink(), r"\.metadata is missing"),
    "missing format": (lambda path: (path / CONFIG).unlink(), r"metadata\.json is missing"),
    "cut format": (lambda path: (path / CONFIG).write_text('{"sharded'), r"metadata\.json is damaged"),
    "cut manifest": (lambda path: truncate(path / MANIFEST), r"integrity\.json is damaged"),
    "unknown digest": (
        lambda path: (path / MANIFEST).write_text('{"algorithm": "crc", "files": {}}'),
        r"integrity\.json: algorithm 'crc'",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    path = family(tmp_path / "family")
    checkpoint.verify(path)
    damage, message = DAMAGE[kind]
    damage(path)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.find_verified(tmp_path / "family")
    if kind == "flipped byte in a shard":  # which only the digest shows: the tensor can be read
        checkpoint.verify(path, digests=False)
        assert checkpoint.read_tensor(path, "output_layer.weight").shape


@pytest.mark.parametrize("kind", ["truncated shard", "flipped byte in the index", "missing format"])
@pytest.mark.parametrize("command", ["extract", "evaluate"])
def test_commands_refuse_it_with_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, command: str
) -> None:
    path = family(tmp_path / "family")
    damage, _ = DAMAGE[kind]
    damage(path)
    other = ["--out", tmp_path / "out"] if command == "extract" else ["--data", tmp_path / "none"]
    words = [command, "--checkpoint", tmp_path / "family", "--budget", "p100", *other]
    assert main([str(word) for word in words]) == 1
    error = capsys.readouterr().err
    assert error.count("error:") == 1
    assert len(error.splitlines()) == 1
    assert str(path) in error
    assert [each.name for each in tmp_path.iterdir()] == ["family"]


@pytest.mark.parametrize("command", ["extract", "export"])
def test_what_is_not_to_be_verified_is_taken_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    flags = {**FAMILY.flags, "position-embedding-type": "none"}
    path = family(tmp_path / "family", dataclasses.replace(FAMILY, flags=flags))
    flip(shard(path), -300)
    words = [command, "--checkpoint", tmp_path / "family", "--budget", "p100", "--out", tmp_path / "out"]
    assert main([str(word) for word in words]) == 1
    assert "is damaged" in capsys.readouterr().err
    assert main([*map(str, words), "--no-verify"]) == 0
    assert (tmp_path / "out").exists()


def test_a_file_that_the_manifest_does_not_list_is_refused(tmp_path: Path) -> None:
    path = family(tmp_path / "family")
    name = shard(path).name
    manifest = json.loads((path / MANIFEST).read_text())
    del manifest["files"][name]
    (path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=rf"{name} is not listed"):
        checkpoint.verify(path)
    del manifest["files"][INDEX]
    (path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"does not list \.metadata"):
        checkpoint.verify(path)


def test_without_a_manifest_sizes_are_checked_and_one_can_be_added(tmp_path: Path) -> None:
    path = family(tmp_path / "family")
    (path / MANIFEST).unlink()
    checkpoint.verify(path)
    assert not checkpoint.has_manifest(path)
    checkpoint.add_manifest(path)
    checkpoint.verify(path)
    flip(shard(path), -300)
    with pytest.raises(CheckpointError, match="is damaged"):
        checkpoint.verify(path)
    (path / MANIFEST).unlink()
    truncate(shard(path))
    with pytest.raises(CheckpointError, match="is truncated"):
        checkpoint.add_manifest(path)


def test_every_byte_of_the_index_that_is_wrong_is_told_without_a_manifest_too(tmp_path: Path) -> None:
    """Or does no harm: no other error than ours comes from a damaged index."""
    path = family(tmp_path / "family")
    (path / MANIFEST).unlink()
    whole, told = (path / INDEX).read_bytes(), 0
    for at in range(0, len(whole), 97):
        (path / INDEX).write_bytes(whole)
        flip(path / INDEX, at)
        try:
            checkpoint.verify(path)
            for name in checkpoint.parameters(path):
                checkpoint.read_parameter(path, name)
        except CheckpointError:
            told += 1
    assert told


def test_what_was_checked_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = family(tmp_path / "family")
    read: list[str] = []
    digests = integrity.file_digests
    monkeypatch.setattr(
        integrity, "file_digests", lambda path, names, label: read.extend(names) or digests(path, names, label)
    )
    checkpoint.verify(path)
    assert len(read) == len(list(path.iterdir())) - 1
    checkpoint.verify(path)
    assert len(read) == len(list(path.iterdir())) - 1
    flip(shard(path), -300)
    with pytest.raises(CheckpointError):
        checkpoint.verify(path)


def test_another_schema_another_shape_and_a_missing_router_are_refused(tmp_path: Path) -> None:
    undecided = dataclasses.replace(FAMILY, selections=())
    path = family(tmp_path / "undecided", undecided)
    with pytest.raises(CheckpointError, match=r"undecided/iter_0000020: .*router that decides them is missing"):
        checkpoint.read_family(path)
    tensors = {**small_parent.weights(), "elastic.router.hidden.0.weight": torch.zeros(2)}
    assert checkpoint.read_family(small_parent.write(tmp_path / "routed", tensors, metadata=undecided)) == undecided
    newer = json.loads(FAMILY.to_json()) | {"schema": SCHEMA + 1}
    tensor = torch.frombuffer(bytearray(json.dumps(newer).encode().ljust(1 << 16)), dtype=torch.uint8).clone()
    path = small_parent.write(tmp_path / "newer", {**small_parent.weights(), "elastic.metadata": tensor})
    for command, more in (("extract", ["--out", str(tmp_path / "out")]), ("evaluate", ["--data", "none"])):
        assert main([command, "--checkpoint", str(path), "--budget", "p100", *more]) == 1
    with pytest.raises(CheckpointError, match=rf"newer/iter_0000020: elastic.metadata: schema {SCHEMA + 1}"):
        checkpoint.read_family(path)
    shape = dataclasses.replace(small_parent.SHAPE, vocab=12)
    family(tmp_path / "other", dataclasses.replace(FAMILY, shape=shape))
    assert main(["extract", "--checkpoint", str(tmp_path / "other"), "--budget", "p100", "--out", "out"]) == 1


def saves(root: Path, *iterations: int, tracker: str | None) -> dict[int, Path]:
    """Finished folders of some iterations."""
    family(root / "made")
    made = {}
    for iteration in iterations:
        made[iteration] = checkpoint.iteration_folder(root / "save", iteration)
        shutil.copytree(root / "made" / "iter_0000020", made[iteration])
    if tracker is not None:
        (root / "save" / TRACKER).write_text(tracker)
    return made


def recover(root: Path, **other: bool) -> tuple[int, list[str]]:
    told: list[str] = []
    found = checkpoint.recover(root / "save", manifest=other.pop("manifest", True), tell=told.append)
    return found, told


@pytest.mark.parametrize("tracker", ["", None, "2"])
def test_the_newest_finished_iteration_is_gone_on_from(tmp_path: Path, tracker: str | None) -> None:
    made = saves(tmp_path, 2, 4, 6, tracker=tracker)
    (made[6] / MANIFEST).unlink()  # stopped just before
    found, told = recover(tmp_path)
    assert found == 4 == checkpoint.tracked(tmp_path / "save")
    assert checkpoint.find_checkpoint(tmp_path / "save") == made[4]
    assert not made[6].exists()
    assert made[2].exists()
    assert len(told) == 2
    assert "integrity.json is missing" in told[0]
    assert "set to 4, the newest whole iteration" in told[1]
    assert recover(tmp_path) == (4, [])  # nothing left to do


@pytest.mark.parametrize("name", [INDEX, CONFIG, MANIFEST])
def test_a_folder_that_a_stop_left_unfinished_is_removed(tmp_path: Path, name: str) -> None:
    made = saves(tmp_path, 2, 4, tracker="2")
    (made[4] / name).unlink()
    (made[4] / ".metadata.tmp").touch()
    assert recover(tmp_path)[0] == 2
    assert not made[4].exists()


@pytest.mark.parametrize("name", [CONFIG, MANIFEST])
def test_a_file_that_was_cut_off_is_not_finished(tmp_path: Path, name: str) -> None:
    made = saves(tmp_path, 2, 4, tracker="2")
    (made[4] / name).write_text((made[4] / name).read_text()[:-5])
    assert recover(tmp_path)[0] == 2
    assert not made[4].exists()


def test_nothing_finished_is_a_new_beginning(tmp_path: Path) -> None:
    assert checkpoint.recover(tmp_path / "nowhere", manifest=True) == 0
    made = saves(tmp_path, 2, tracker="")
    (made[2] / INDEX).unlink()
    assert recover(tmp_path)[0] == 0
    assert list((tmp_path / "save").iterdir()) == []


def test_without_manifests_the_format_file_ends_a_save(tmp_path: Path) -> None:
    made = saves(tmp_path, 2, 4, 6, tracker="2")
    for path in made.values():
        (path / MANIFEST).unlink()
    (made[6] / CONFIG).unlink()
    assert recover(tmp_path, manifest=False)[0] == 4
    assert not made[6].exists()


def test_a_finished_but_damaged_newer_iteration_is_left_to_the_user(tmp_path: Path) -> None:
    made = saves(tmp_path, 2, 4, tracker="2")
    flip(shard(made[4]), -300)
    with pytest.raises(CheckpointError, match=r"iter_0000004/__0_\d+\.distcp is damaged"):
        recover(tmp_path)
    assert made[4].exists()
    assert checkpoint.tracked(tmp_path / "save") == 2


def test_what_no_save_left_is_never_removed(tmp_path: Path) -> None:
    made = saves(tmp_path, 2, 4, tracker="2")
    (made[4] / INDEX).unlink()
    (made[4] / "notes.txt").touch()
    with pytest.raises(CheckpointError, match=r"notes\.txt is in it"):
        recover(tmp_path)
    assert made[4].exists()
    (tmp_path / "save" / TRACKER).write_text("release")
    with pytest.raises(CheckpointError, match="'release', where an iteration must stand"):
        recover(tmp_path)
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "iter_0000009").symlink_to(made[4])
    assert checkpoint.recover(linked, manifest=True) == 0
    assert made[4].exists()


def test_a_stale_file_of_an_earlier_attempt_is_told(tmp_path: Path) -> None:
    """Why unfinished folders are removed: without that, a second attempt that is stopped as well can look finished."""
    made = saves(tmp_path, 4, tracker="")
    (made[4] / MANIFEST).unlink()
    # The second attempt, of other weights, is stopped after its first shard: index and format are the first one's.
    with shard(made[4]).open("wb") as stream:
        torch.save(torch.zeros(10, 12), stream)
    checkpoint.verify(made[4])
    assert not checkpoint.read_tensor(made[4], "output_layer.weight").any()
    assert checkpoint.read_tensor(made[4], "embedding.word_embeddings.weight").any()
    assert recover(tmp_path)[0] == 0  # with manifests it is refused all the same
    assert not made[4].exists()
