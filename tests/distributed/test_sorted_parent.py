"""Sorting changes no output, cutting gives what the elastic model runs as a slice: fp64, one process, real models."""

import pytest
import torch

from megatron_elastic.axes import AXES_OF_KIND
from megatron_elastic.budget import Budget, Selection
from megatron_elastic.checkpoint import find_checkpoint, read_parameter
from megatron_elastic.errors import CheckpointError
from megatron_elastic.extraction import cut
from megatron_elastic.family import Family
from megatron_elastic.flags import shape_flags
from megatron_elastic.sorting import Orders, random_orders, sort_checkpoint
from tests.distributed import importance_kit as kit
from tests.distributed import standalone_parent as parent

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(torch.cuda.is_available(), reason="fp64 proofs on the CPU adaptation, which refuses CUDA"),
]
SHAPE, LAYOUT = parent.SHAPE, parent.LAYOUT
SMALL = Selection.from_dict({**SHAPE.full, "hidden": 15, "ffn": 20, "mamba_heads": 6, "attention_heads": 2})
FAMILY = Family(
    shape=SHAPE,
    ffn_blocks=parent.BLOCKS,
    choices={
        "hidden": (24, 15), "ffn": (32, 20), "mamba_heads": (8, 6), "mamba_head_dim": (4,), "attention_heads": (8, 2),
        "depth": (5,),
    },
    budgets=(Budget("p100", 1.0), Budget("p50", 0.5)),
)  # fmt: skip


@pytest.fixture(scope="module")
def process(tmp_path_factory):
    from megatron_elastic import standalone

    with standalone.single_process():
        yield standalone


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints") / "parent"
    parent.write(folder, parent.weights())
    return folder


def load(process, checkpoint, flags=parent.FLAGS):
    model = process.build_plain_model(flags, torch.float64)
    process.load_weights(model, checkpoint)
    return model


def sort(source, out, orders):
    return sort_checkpoint(
        source, out, shape=SHAPE, ffn_blocks=parent.BLOCKS, flags=parent.FLAGS, orders=orders
    )  # fmt: skip


def deviation(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("seed", range(3))
def test_the_sorted_parent_has_the_parents_logits(process, source, tmp_path, seed):
    before, text = load(process, source), parent.tokens()
    sort(source, tmp_path / "sorted", random_orders(LAYOUT, seed))
    after = load(process, tmp_path / "sorted")
    # fp64: the same sums in another order.
    assert deviation(parent.logits(after, text), parent.logits(before, text)) < 1e-12
    parameters = dict(before.named_parameters())
    assert all(not torch.equal(parameter, parameters[name]) for name, parameter in after.named_parameters())


@pytest.mark.parametrize("gated", [False, True])
def test_a_parent_with_every_kind_of_layer_keeps_its_logits(process, tmp_path, gated):
    flags = {**kit.EXPERT_FLAGS, "hybrid-layer-pattern": "ME*-EM", "swiglu": gated, "squared-relu": not gated}
    layout, text = kit.layout(flags), parent.tokens()
    kit.write_parent(tmp_path / "parent", flags)
    orders = random_orders(layout, 0)
    assert {axis for axes in orders.layers.values() for axis in axes} == set(layout.shape.axes) - {"hidden", "depth"}

    def sort(out, orders):
        blocks = {"ffn_blocks": parent.BLOCKS, "expert_blocks": 2}
        sort_checkpoint(tmp_path / "parent", tmp_path / out, shape=layout.shape, flags=flags, orders=orders, **blocks)
        return parent.logits(load(process, tmp_path / out, flags), text)

    before = parent.logits(load(process, tmp_path / "parent", flags), text)
    # The same sums in another order; core's expert router rounds its scores to fp32.
    assert deviation(sort("sorted", orders), before) < 1e-6
    assert deviation(sort("sorted again", random_orders(layout, 3)), before) < 1e-6
    # One layer's experts move, and their router does not follow.
    model = load(process, tmp_path / "sorted", flags)
    with torch.no_grad():
        bias = read_parameter(find_checkpoint(tmp_path / "parent"), "decoder.layers.1.mlp.router.expert_bias")
        model.decoder.layers[1].mlp.router.expert_bias.copy_(bias)
    assert deviation(parent.logits(model, text), before) > 1e-3


def identity(**changed: torch.Tensor) -> Orders:
    """Leaves every axis as it is, but for those given."""
    axes = {axis: changed.get(axis, torch.arange(size)) for axis, size in SHAPE.full.items()}
    layers = {n: {axis: axes[axis] for axis in AXES_OF_KIND[kind]} for n, kind in enumerate(SHAPE.pattern)}
    return Orders(axes["hidden"], layers)


@pytest.mark.parametrize("axis", ["mamba_heads", "attention_heads"])
def test_heads_must_stay_in_their_group(process, source, tmp_path, axis):
    text = parent.tokens()
    before = parent.logits(load(process, source), text)
    inside, across = [1, 0, 2, 3, 4, 5, 7, 6], [4, 1, 2, 3, 0, 5, 6, 7]
    for order, out in ((inside, "inside"), (across, "across")):
        sort(source, tmp_path / out, identity(**{axis: torch.tensor(order)}))
    assert deviation(parent.logits(load(process, tmp_path / "inside"), text), before) < 1e-12
    assert deviation(parent.logits(load(process, tmp_path / "across"), text), before) > 1e-3


@pytest.mark.parametrize(
    "left_out",
    [
        "embedding.word_embeddings.weight", "decoder.final_norm.weight", "output_layer.weight",
        "decoder.layers.0.mixer.norm.weight", "decoder.layers.0.mixer.D", "decoder.layers.2.input_layernorm.weight",
    ],
)  # fmt: skip
def test_one_parameter_left_unsorted_shows(process, source, tmp_path, left_out):
    text = parent.tokens()
    before = parent.logits(load(process, source), text)
    sort(source, tmp_path / "sorted", random_orders(LAYOUT, 1))
    model = load(process, tmp_path / "sorted")
    with torch.no_grad():
        model.get_parameter(left_out).copy_(parent.weights()[left_out])
    assert deviation(parent.logits(model, text), before) > 1e-6


@pytest.mark.parametrize("selection", [SMALL, FAMILY.full], ids=["small", "full"])
def test_the_extracted_model_is_the_slice(process, source, tmp_path, selection):
    text = parent.tokens()
    family = process.build_elastic_model(parent.FLAGS, FAMILY, torch.float64)
    process.load_weights(family, source)
    cut(source, tmp_path / "cut", shape=SHAPE, ffn_blocks=4, flags=parent.FLAGS, selection=selection)
    extracted = load(process, tmp_path / "cut", shape_flags(selection.submodel(SHAPE), parent.FLAGS))
    inside = parent.logits(family, text, selection=selection)
    # fp64: a slice may be summed in pieces.
    assert deviation(parent.logits(extracted, text), inside) < 1e-12
    other = FAMILY.full if selection == SMALL else SMALL
    assert deviation(parent.logits(family, text, selection=other), inside) > 1e-3


def test_a_checkpoint_of_another_shape_is_refused(process, source, tmp_path):
    cut(source, tmp_path / "cut", shape=SHAPE, ffn_blocks=4, flags=parent.FLAGS, selection=SMALL)
    with pytest.raises(CheckpointError, match="not a checkpoint of this model"):
        load(process, tmp_path / "cut")


def test_megatron_loads_what_was_written(process, source, tmp_path):
    from megatron.core import dist_checkpointing

    path = sort(source, tmp_path / "sorted", random_orders(LAYOUT, 0))
    ours, theirs = load(process, tmp_path / "sorted"), process.build_plain_model(parent.FLAGS, torch.float64)
    # Under a key of its own: what Megatron keeps beside the tensors comes at the top level.
    loaded = dist_checkpointing.load({"model": theirs.sharded_state_dict()}, str(path))
    theirs.load_state_dict(loaded["model"])
    text = parent.tokens()
    assert torch.equal(parent.logits(theirs, text), parent.logits(ours, text))
