"""Extraction: what is kept, what is said about it, and that nothing half-made or wrong is left."""

import dataclasses
import errno
from argparse import Namespace

import pytest
import torch

from megatron_elastic import cost_model, extraction
from megatron_elastic.budget import Budget, Selection
from megatron_elastic.checkpoint import find_checkpoint, parameters, read_common, read_metadata, read_parameter, writing
from megatron_elastic.errors import CheckpointError
from megatron_elastic.extraction import cut, extract_budget
from megatron_elastic.metadata import Metadata
from megatron_elastic.sorting import random_orders, sort_checkpoint
from tests.unit import small_parent as parent

SHAPE, LAYOUT = parent.SHAPE, parent.LAYOUT
FULL = Selection.from_dict(SHAPE.full)
HALF = Selection(hidden=7, ffn=8, mamba_heads=4, mamba_head_dim=2, attention_heads=2)
FAMILY = Metadata(
    kind="family", shape=SHAPE, ffn_blocks=parent.BLOCKS, flags=parent.FLAGS,
    choices={"hidden": (12, 7), "ffn": (16, 8), "mamba_heads": (8, 4), "attention_heads": (8, 2)},
    budgets=(Budget("p100", 1.0), Budget("p50", 0.5)), selections=(FULL, HALF), stage=2, iteration=30,
)  # fmt: skip


def take(source, out, selection=HALF, **other):
    return cut(
        source, out, shape=SHAPE, ffn_blocks=parent.BLOCKS, flags=parent.FLAGS, selection=selection, **other
    )  # fmt: skip


def read_all(folder):
    path = find_checkpoint(folder)
    return {name: read_parameter(path, name) for name in parameters(path)}


def kept_by_hand(name):
    """Rows and columns that HALF keeps: 2 of 4 Mamba heads, 1 of 4 query heads a group, 2 of 4 neurons a block."""
    heads, neurons, hidden = [0, 1, 4, 5], [0, 1, 4, 5, 8, 9, 12, 13], list(range(7))
    inner, context = [2 * h + d for h in heads for d in range(2)], [3 * h + d for h in (0, 4) for d in range(3)]
    conv = [*inner, *range(16, 28)]
    rows = {
        "mixer.in_proj.weight": [*inner, *[16 + i for i in inner], *range(32, 44), *[44 + h for h in heads]],
        "mixer.conv1d_weight": conv, "mixer.conv1d_bias": conv, "mixer.dt_bias": heads, "mixer.A_log": heads,
        "mixer.D": heads, "mixer.norm.weight": inner, "mlp.linear_fc1.weight": neurons,
        # A KV group's 18 rows: 4 query heads of 3, of which the first stays, then its key and its value.
        "self_attention.linear_qkv.weight": [0, 1, 2, *range(12, 18), 18, 19, 20, *range(30, 36)],
        "mixer.out_proj.weight": hidden, "mlp.linear_fc2.weight": hidden, "self_attention.linear_proj.weight": hidden,
        "embedding.word_embeddings.weight": list(range(10)), "output_layer.weight": list(range(10)),
    }  # fmt: skip
    columns = {
        "mixer.conv1d_weight": [0], "mixer.out_proj.weight": inner, "mlp.linear_fc2.weight": neurons,
        "self_attention.linear_proj.weight": context,
    }  # fmt: skip
    short = name.split(".", 3)[-1] if name.startswith("decoder.layers") else name
    return rows.get(short, hidden), columns.get(short, hidden)


def test_every_parameter_keeps_its_entries(tmp_path):
    old = parent.weights()
    parent.write(tmp_path / "parent", old)
    count = take(tmp_path / "parent", tmp_path / "half")
    new = read_all(tmp_path / "half")
    assert set(new) == set(old)
    for name, tensor in old.items():
        rows, columns = kept_by_hand(name)
        expected = tensor[rows] if tensor.dim() == 1 else tensor[rows][:, columns]
        assert torch.equal(new[name], expected), name
        assert new[name].numel() < tensor.numel(), name
    assert count == sum(tensor.numel() for tensor in new.values())
    assert count == cost_model.parameters(SHAPE, HALF.sizes) != cost_model.parameters(SHAPE, SHAPE.full)


def test_the_full_selection_is_the_parent(tmp_path):
    old = parent.weights()
    parent.write(tmp_path / "parent", old)
    assert take(tmp_path / "parent", tmp_path / "full", FULL) == cost_model.parameters(SHAPE, SHAPE.full)
    new = read_all(tmp_path / "full")
    assert all(torch.equal(new[name], tensor) for name, tensor in old.items())


def test_cutting_with_orders_is_sorting_then_cutting(tmp_path):
    parent.write(tmp_path / "parent", parent.weights())
    orders = random_orders(LAYOUT, 5)
    sort_checkpoint(
        tmp_path / "parent", tmp_path / "sorted", shape=SHAPE, ffn_blocks=4, flags=parent.FLAGS, orders=orders
    )
    take(tmp_path / "sorted", tmp_path / "two steps")
    take(tmp_path / "parent", tmp_path / "one step", orders=orders)
    take(tmp_path / "parent", tmp_path / "unsorted")
    one, two, unsorted = (read_all(tmp_path / name) for name in ("one step", "two steps", "unsorted"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not any(torch.equal(one[name], unsorted[name]) for name in one)


def test_smaller_budgets_are_nested_in_larger_ones():
    small, large = HALF, Selection(hidden=10, ffn=12, mamba_heads=6, mamba_head_dim=2, attention_heads=6)
    for name, dimensions in LAYOUT.parameters().items():
        for dimension in dimensions:
            rows = [
                {row for a, b in dimension.segments(s.sizes, SHAPE.full) for row in range(a, b)} for s in (small, large)
            ]
            assert rows[0] <= rows[1], name


def test_extracted_checkpoint_describes_itself(tmp_path):
    parent.write(tmp_path / "family", parent.weights(), metadata=FAMILY)
    found = extract_budget(tmp_path / "family", "p50", tmp_path / "p50")
    cost = cost_model.parameters(SHAPE, HALF.sizes)
    assert found == {
        "budget": "p50", "parameters": cost, "selection": HALF.as_dict(), "checkpoint": str(tmp_path / "p50")
    }  # fmt: skip
    said = read_metadata(find_checkpoint(tmp_path / "p50"))
    assert (said.kind, said.budget, said.iteration, said.ffn_blocks) == ("extracted", "p50", 30, 4)
    assert said.shape == dataclasses.replace(SHAPE, **HALF.sizes)
    assert said.flags == {
        **parent.FLAGS, "hidden-size": 7, "ffn-hidden-size": 8, "num-attention-heads": 2, "mamba-num-heads": 4,
        "make-vocab-size-divisible-by": 1,
    }  # fmt: skip
    args = read_common(find_checkpoint(tmp_path / "p50"))["args"]
    assert isinstance(args, Namespace)
    sizes = args.hidden_size, args.ffn_hidden_size, args.num_attention_heads, args.num_query_groups
    assert sizes == (7, 8, 2, 2)
    assert (args.mamba_num_heads, args.kv_channels, args.num_layers, args.consumed_train_samples) == (4, 3, 3, 0)


def test_the_router_of_a_family_stays_behind(tmp_path):
    tensors = {**parent.weights(), "elastic.router.hidden.0.weight": torch.zeros(4, 2)}
    parent.write(tmp_path / "family", tensors, metadata=FAMILY)
    extract_budget(tmp_path / "family", "p100", tmp_path / "p100")
    new = read_all(tmp_path / "p100")
    assert set(new) == set(parent.weights())


@pytest.mark.parametrize(
    ("metadata", "budget", "message"),
    [
        (None, "p50", "is no family, it has no description"),
        (dataclasses.replace(FAMILY, kind="extracted"), "p50", "is 'extracted', not a family"),
        (FAMILY, "p25", r"budget 'p25': the family has \['p100', 'p50'\]"),
        (dataclasses.replace(FAMILY, selections=()), "p50", "not decided yet"),
    ],
)
def test_what_has_no_such_budget_is_refused(tmp_path, metadata, budget, message):
    parent.write(tmp_path / "family", parent.weights(), metadata=metadata)
    with pytest.raises(CheckpointError, match=message):
        extract_budget(tmp_path / "family", budget, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["family"]


def test_missing_foreign_and_taken_folders_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        extract_budget(tmp_path / "nowhere", "p50", tmp_path / "out")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "model.safetensors").write_text("")
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        extract_budget(tmp_path / "foreign", "p50", tmp_path / "out")
    parent.write(tmp_path / "family", parent.weights(), metadata=FAMILY)
    with pytest.raises(CheckpointError, match="exists already"):
        extract_budget(tmp_path / "family", "p50", tmp_path / "foreign")
    assert [path.name for path in (tmp_path / "foreign").iterdir()] == ["model.safetensors"]
    (tmp_path / "empty").mkdir()
    extract_budget(tmp_path / "family", "p50", tmp_path / "empty")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "family", "foreign"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"ffn": 6}, "ffn: choice 6 does not divide by its 4 blocks"),
        ({"mamba_heads": 3}, "mamba_heads: choice 3"),
        ({"hidden": 13}, "hidden: .*choice 13 must lie in 1..12"),
    ],
)
def test_selections_that_do_not_fit_the_blocks_are_refused(tmp_path, changed, message):
    parent.write(tmp_path / "parent", parent.weights())
    with pytest.raises(CheckpointError, match=message):
        take(tmp_path / "parent", tmp_path / "out", dataclasses.replace(HALF, **changed))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("what", ["file", "index"])
def test_what_was_written_is_compared_with_what_should_be(tmp_path, monkeypatch, what):
    parent.write(tmp_path / "parent", parent.weights())
    name = "decoder.layers.2.self_attention.linear_proj.weight"
    finish = writing._Writer.finish

    def damaged(writer):
        (key,) = (key for key in writer.places if key.fqn == name)
        if what == "index":
            other = next(each for each in writer.places if each.fqn.endswith("linear_fc1.weight"))
            writer.places[key] = writer.places[other]
        finish(writer)
        if what == "file":
            file = writer.path / writer.places[key].relative_path
            content = bytearray(file.read_bytes())
            at = content.index(parent.weights()[name][0, 0].numpy().tobytes())
            content[at] ^= 1
            file.write_bytes(content)

    monkeypatch.setattr(writing._Writer, "finish", damaged)
    with pytest.raises(CheckpointError, match=f"{name} is not what was written"):
        take(tmp_path / "parent", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["parent"]


def test_a_failure_on_the_way_leaves_nothing(tmp_path, monkeypatch):
    parent.write(tmp_path / "parent", parent.weights())
    read = extraction.read_entries

    def broken(path, name, entries):
        if name == "output_layer.weight":
            raise OSError(errno.EIO, "broken")
        return read(path, name, entries)

    monkeypatch.setattr(extraction, "read_entries", broken)
    with pytest.raises(CheckpointError, match=r"out cannot be written \(Input/output error\)"):
        take(tmp_path / "parent", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["parent"]


def test_not_a_number_is_carried_as_it_is(tmp_path):
    tensors = parent.weights()
    tensors["decoder.final_norm.weight"][0] = float("nan")
    parent.write(tmp_path / "parent", tensors)
    take(tmp_path / "parent", tmp_path / "out")
    assert read_all(tmp_path / "out")["decoder.final_norm.weight"][0].isnan()
