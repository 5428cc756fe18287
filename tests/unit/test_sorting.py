"""Sorting: what moves where, on a checkpoint small enough to check by hand."""

import dataclasses
import shutil

import pytest
import torch

from megatron_elastic.checkpoint import find_checkpoint, parameters, read_common, read_metadata, read_parameter
from megatron_elastic.errors import CheckpointError
from megatron_elastic.importance.scores import DepthRanking, Scores
from megatron_elastic.layout import Layout, ModelShape
from megatron_elastic.metadata import Metadata
from megatron_elastic.sorting import Orders, orders_from_scores, random_orders, sort_checkpoint, sort_parent
from tests.unit import small_parent as parent

SHAPE, LAYOUT = parent.SHAPE, parent.LAYOUT


def scores(**changed):
    generator = torch.Generator().manual_seed(4)
    values = {axis: torch.rand(size, generator=generator) for axis, size in SHAPE.full.items()} | changed
    layers = {0: ("mamba_heads", "mamba_head_dim"), 1: ("ffn",), 2: ("attention_heads",)}
    made = {number: {axis: values[axis] for axis in axes} for number, axes in layers.items()}
    return Scores(values["hidden"], made)


def sort(source, out, orders, shape=SHAPE, **other):
    sort_checkpoint(source, out, shape=shape, ffn_blocks=parent.BLOCKS, flags=parent.FLAGS, orders=orders, **other)
    return find_checkpoint(out)


def test_orders_rank_heads_inside_their_group_and_deal_neurons_over_blocks():
    heads = torch.tensor([1.0, 4, 2, 3, 9, 7, 8, 6])
    found = orders_from_scores(
        LAYOUT,
        scores(
            mamba_heads=heads, attention_heads=heads, ffn=torch.arange(16.0), mamba_head_dim=torch.tensor([0.5, 0.7])
        ),
    )
    assert found.layers[0]["mamba_heads"].tolist() == [1, 3, 2, 0, 4, 6, 5, 7]
    assert found.layers[2]["attention_heads"].tolist() == [1, 3, 2, 0, 4, 6, 5, 7]
    assert found.layers[0]["mamba_head_dim"].tolist() == [1, 0]
    # 4 blocks of 4: the best neuron (15) opens block 0, the second (14) block 1, the fifth (11) is second in block 0.
    assert found.layers[1]["ffn"].tolist() == [15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0]


def test_hidden_is_one_order_for_every_layer():
    found = orders_from_scores(LAYOUT, scores(hidden=torch.arange(12.0)))
    assert found.hidden.tolist() == list(range(11, -1, -1))
    for name in LAYOUT.parameters():
        assert found.of(name)["hidden"] is found.hidden
    assert set(found.of("decoder.layers.1.mlp.linear_fc1.weight")) == {"hidden", "ffn"}
    assert set(found.of("output_layer.weight")) == {"hidden"}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hidden": torch.rand(11)}, r"hidden: \(11,\) scores, the parent has 12"),
        ({"ffn": torch.full((16,), float("nan"))}, "layer 1, ffn: scores that are not finite"),
    ],
)
def test_scores_of_another_parent_are_refused(changed, message):
    with pytest.raises(CheckpointError, match=message):
        orders_from_scores(LAYOUT, scores(**changed))


def test_scores_of_another_pattern_are_refused():
    other = Layout(dataclasses.replace(SHAPE, pattern="MM*"), parent.BLOCKS)
    with pytest.raises(CheckpointError, match="layer 1, ffn: not in the parent; layer 1, mamba_head_dim: missing"):
        orders_from_scores(other, scores())


def test_random_orders_follow_the_seed_and_the_groups():
    one, again, other = random_orders(LAYOUT, 1), random_orders(LAYOUT, 1), random_orders(LAYOUT, 2)
    assert torch.equal(one.hidden, again.hidden)
    assert not torch.equal(one.hidden, other.hidden)
    for orders in (one, other):
        assert sorted(orders.hidden.tolist()) == list(range(12))
        assert sorted(orders.layers[1]["ffn"].tolist()) == list(range(16))
        for number, axis in ((0, "mamba_heads"), (2, "attention_heads")):
            assert sorted(orders.layers[number][axis][:4].tolist()) == [0, 1, 2, 3]
            assert sorted(orders.layers[number][axis].tolist()) == list(range(8))
    assert not torch.equal(one.layers[0]["mamba_heads"], other.layers[0]["mamba_heads"])


def by_hand(name, old, orders):
    """Each parameter of the three layers, written out entry by entry."""
    hidden = orders.hidden
    short = name.split(".", 3)[-1] if name.startswith("decoder.layers") else name
    m, f, a = (orders.layers[n][axis].tolist() for n, axis in enumerate(("mamba_heads", "ffn", "attention_heads")))
    inner = [2 * head + d for head in m for d in orders.layers[0]["mamba_head_dim"].tolist()]
    states = list(range(12))  # B and C: 2 groups of 3, both untouched
    context = [3 * head + d for head in a for d in range(3)]
    # A KV group's 18 rows: 4 query heads of 3, then its key and its value.
    query = [[18 * (h // 4) + 3 * (h % 4) + d for h in heads for d in range(3)] for heads in (a[:4], a[4:])]
    qkv = [*query[0], *range(12, 18), *query[1], *range(30, 36)]
    rows = {
        "mixer.in_proj.weight": [*inner, *[16 + i for i in inner], *[32 + i for i in states], *[44 + i for i in m]],
        "mixer.conv1d_weight": [*inner, *[16 + i for i in states]],
        "mixer.conv1d_bias": [*inner, *[16 + i for i in states]],
        "mixer.dt_bias": m, "mixer.A_log": m, "mixer.D": m, "mixer.norm.weight": inner,
        "mlp.linear_fc1.weight": f, "self_attention.linear_qkv.weight": qkv,
    }  # fmt: skip
    columns = {
        "mixer.out_proj.weight": inner, "mlp.linear_fc2.weight": f, "self_attention.linear_proj.weight": context,
    }  # fmt: skip
    if short in columns:
        return old[hidden][:, columns[short]]
    if old.dim() == 1:
        return old[rows.get(short, hidden.tolist())]
    if short == "mixer.conv1d_weight":
        return old[rows[short]]
    return old[rows.get(short, list(range(len(old))))][:, hidden]


def test_every_parameter_is_permuted_along_every_axis(tmp_path):
    old = parent.weights()
    parent.write(tmp_path / "parent", old)
    orders = orders_from_scores(LAYOUT, scores(mamba_head_dim=torch.tensor([1.0, 2.0])))
    path = sort(tmp_path / "parent", tmp_path / "sorted", orders)
    assert set(parameters(path)) == set(old)
    for name, tensor in old.items():
        new = read_parameter(path, name)
        assert torch.equal(new, by_hand(name, tensor, orders)), name
        assert not torch.equal(new, tensor), name


def test_sorting_is_undone_by_the_inverse_orders(tmp_path):
    orders, old = random_orders(LAYOUT, 3), parent.weights()
    inverse = Orders(
        orders.hidden.argsort(),
        {number: {axis: order.argsort() for axis, order in axes.items()} for number, axes in orders.layers.items()},
    )
    parent.write(tmp_path / "parent", old)
    there = sort(tmp_path / "parent", tmp_path / "there", orders)
    back = sort(tmp_path / "there", tmp_path / "back", inverse)
    for name, tensor in old.items():
        assert not torch.equal(read_parameter(there, name), tensor), name
        assert torch.equal(read_parameter(back, name), tensor), name


def test_sorted_checkpoint_describes_itself_and_starts_anew(tmp_path):
    parent.write(tmp_path / "parent", parent.weights())
    path = sort(tmp_path / "parent", tmp_path / "sorted", random_orders(LAYOUT, 0), depth_ranking=[2, 0, 1])
    assert read_metadata(path) == Metadata(
        kind="sorted", shape=SHAPE, ffn_blocks=parent.BLOCKS, flags=parent.FLAGS, depth_ranking=(2, 0, 1)
    )
    args = read_common(path)["args"]
    assert (args.hidden_size, args.lr) == (12, 0.1)
    assert (args.iteration, args.consumed_train_samples) == (0, 0)


def test_dtype_stays(tmp_path):
    old = {name: tensor.bfloat16() for name, tensor in parent.weights().items()}
    parent.write(tmp_path / "parent", old)
    path = sort(tmp_path / "parent", tmp_path / "sorted", random_orders(LAYOUT, 0))
    assert {info.dtype for info in parameters(path).values()} == {torch.bfloat16}


def test_foreign_checkpoints_are_refused_and_leave_nothing(tmp_path):
    name = "decoder.layers.1.mlp.linear_fc1.weight"
    whole = parent.weights()
    cases = {
        "missing": ({n: t for n, t in whole.items() if n != name}, f"{name} is missing"),
        "shape": ({**whole, name: whole[name][:8]}, rf"{name} is \(8, 12\), the shape says \(16, 12\)"),
        "unknown": ({**whole, "decoder.layers.1.mlp.linear_fc1.bias": torch.zeros(16)}, "fc1.bias has no place"),
    }
    for case, (tensors, message) in cases.items():
        parent.write(tmp_path / case, tensors)
        with pytest.raises(CheckpointError, match=message):
            sort(tmp_path / case, tmp_path / "sorted", random_orders(LAYOUT, 0))
    with pytest.raises(CheckpointError, match="does not exist"):
        sort(tmp_path / "nowhere", tmp_path / "sorted", random_orders(LAYOUT, 0))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(cases)


def test_a_taken_folder_is_refused(tmp_path):
    parent.write(tmp_path / "parent", parent.weights())
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CheckpointError, match="exists already"):
        sort(tmp_path / "parent", tmp_path / "parent", random_orders(LAYOUT, 0))
    assert sorted(tmp_path.rglob("*")) == before


EXPERTS = ModelShape(
    pattern="E", vocab=10, hidden=6, experts=4, expert_ffn=8, shared_expert_ffn=4, top_k=2, expert_bias=True
)


@pytest.mark.parametrize("gated", [False, True])
def test_every_expert_has_an_order_of_its_own(tmp_path, gated):
    shape = dataclasses.replace(EXPERTS, gated=gated)
    layout = Layout(shape, parent.BLOCKS, 2)
    old = parent.weights(layout)
    parent.write(tmp_path / "parent", old, layout=layout)
    orders = random_orders(layout, 5)
    path = sort(tmp_path / "parent", tmp_path / "sorted", orders, shape, expert_blocks=2)
    assert read_metadata(path).expert_blocks == 2
    experts, neurons = orders.layers[0]["experts"], orders.layers[0]["expert_ffn"]
    assert neurons.shape == (4, 8)
    assert not torch.equal(neurons[0], neurons[1])
    read = {name: read_parameter(path, name) for name in old}
    mlp, hidden = "decoder.layers.0.mlp.", orders.hidden
    for name in ("router.weight", "router.expert_bias"):
        expected = old[mlp + name][experts]
        assert torch.equal(read[mlp + name], expected[:, hidden] if expected.dim() > 1 else expected)
    shared = orders.layers[0]["shared_expert_ffn"]
    assert torch.equal(
        read[mlp + "shared_experts.linear_fc2.weight"], old[mlp + "shared_experts.linear_fc2.weight"][hidden][:, shared]
    )
    for place, expert in enumerate(experts.tolist()):
        rows = neurons[expert]
        rows_in = torch.cat([rows, rows + 8]) if gated else rows
        fc1, fc2 = (mlp + f"experts.experts.linear_fc{n}.weight" for n in (1, 2))
        assert torch.equal(read[fc1][place], old[fc1][expert][rows_in][:, hidden])
        assert torch.equal(read[fc2][place], old[fc2][expert][hidden][:, rows])
        # By another expert's order it would not be.
        assert not torch.equal(read[fc2][place], old[fc2][expert][hidden][:, neurons[expert - 1]])


def test_experts_are_dealt_over_their_blocks_and_neurons_over_theirs():
    layout, generator = Layout(EXPERTS, parent.BLOCKS, 2), torch.Generator().manual_seed(1)
    made = {
        "experts": torch.tensor([3.0, 9, 1, 5]),
        "expert_ffn": torch.rand(4, 8, generator=generator),
        "shared_expert_ffn": torch.rand(4, generator=generator),
    }
    found = orders_from_scores(layout, Scores(torch.rand(6), {0: made})).layers[0]
    # 2 blocks of 2: the best expert (1) opens block 0, the second (3) block 1.
    assert found["experts"].tolist() == [1, 0, 3, 2]
    for expert in range(4):
        ranked = made["expert_ffn"][expert].argsort(descending=True).tolist()
        assert found["expert_ffn"][expert].tolist() == [ranked[i] for i in (0, 4, 1, 5, 2, 6, 3, 7)]
    with pytest.raises(CheckpointError, match=r"layer 0, expert_ffn: \(8,\) scores, the parent has 4 x 8 entries"):
        orders_from_scores(layout, Scores(torch.rand(6), {0: {**made, "expert_ffn": torch.rand(8)}}))


def elastic_depth(**other):
    from megatron_elastic.config import parse_recipe

    stage = {"iterations": 1, "sequence_length": 8, "global_batch_size": 1, "micro_batch_size": 1, "weights": [1.0]}
    flags = {
        **parent.FLAGS, "make-vocab-size-divisible-by": 2, "position-embedding-type": "none", "hidden-dropout": 0.0,
        "untie-embeddings-and-output-weights": True, "disable-bias-linear": True, "attention-dropout": 0.0,
        "calculate-per-token-loss": True,
    }  # fmt: skip
    elastic = {
        "parent": "sorted", "save": "family", "train_data": "text", "validation_data": "text", "stages": [stage],
        "ffn_blocks": parent.BLOCKS, "axes": {"depth": [3, 2]}, "budgets": [{"name": "p100", "fraction": 1.0}],
        "selections": {"p100": {}}, **other,
    }  # fmt: skip
    return parse_recipe({"megatron": flags, "elastic": elastic})


def test_elastic_depth_needs_an_order_of_the_layers(tmp_path):
    parent.write(tmp_path / "parent", parent.weights())
    made = scores()
    made.save(tmp_path / "without.pt")
    depth = DepthRanking("one-shot", (2, 1, 0), ({0: 0.3, 1: 0.2, 2: 0.1},), 6, 9)
    dataclasses.replace(made, depth=depth).save(tmp_path / "with.pt")

    def ranking(recipe, name):
        path = sort_parent(recipe, tmp_path / "parent", tmp_path / f"{name}.pt", tmp_path / "sorted")
        found = read_metadata(find_checkpoint(path))
        shutil.rmtree(tmp_path / "sorted")
        return found.depth_ranking

    with pytest.raises(CheckpointError, match=r"depth is elastic.*rank the parent with --depth iterative"):
        ranking(elastic_depth(), "without")
    assert ranking(elastic_depth(), "with") == (2, 1, 0)
    # What the recipe says comes first.
    assert ranking(elastic_depth(depth_ranking=[1, 2, 0]), "without") == (1, 2, 0)
    assert ranking(elastic_depth(depth_ranking=[1, 2, 0]), "with") == (1, 2, 0)
