"""Any selection: masked, sliced, and cut to disk and loaded as a plain model, it is one model. fp64, one process."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_elastic.budget import Budget, Selection
from megatron_elastic.cost_model import parameters
from megatron_elastic.extraction import cut
from megatron_elastic.family import Family
from megatron_elastic.flags import shape_flags
from megatron_elastic.masks import one_hot
from tests.distributed import standalone_parent as parent

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(torch.cuda.is_available(), reason="fp64 proofs on the CPU adaptation, which refuses CUDA"),
]
SHAPE, LAYOUT = parent.SHAPE, parent.LAYOUT
LAYERS = len(SHAPE.pattern)
FAMILY = Family(
    shape=SHAPE,
    ffn_blocks=parent.BLOCKS,
    choices={
        "hidden": (24, 21, 15, 8),
        "ffn": (32, 20, 12, 4),
        "mamba_heads": (8, 6, 2),
        "mamba_head_dim": (4, 3, 1),
        "attention_heads": (8, 4, 2),
        "depth": (5, 4, 3, 2),
    },
    heterogeneous=("ffn", "mamba_heads", "attention_heads"),
    depth_ranking=(1, 3, 2),
    budgets=(Budget("p100", 1.0), Budget("p50", 0.5)),
)
# fp64: some hundred roundings of 1e-16 in each sum, as in test_equalities.py; a slice may be summed in pieces.
TOLERANCE = 1e-11


def narrow(**sizes):
    return FAMILY.select({**SHAPE.full, **sizes})


def drawn(depth):
    """Sizes of every layer; layers are left out by rank, or any of them."""
    sizes = {
        axis: st.tuples(*[st.sampled_from(FAMILY.choices[axis])] * FAMILY.uses(axis)).map(
            lambda kept: kept if len(kept) > 1 else kept[0]
        )
        for axis in SHAPE.full
    }
    if depth:
        return st.fixed_dictionaries({**sizes, "depth": st.sampled_from(FAMILY.choices["depth"])}).map(FAMILY.select)
    skipped = st.sets(st.sampled_from(range(LAYERS)), max_size=LAYERS - 1).map(lambda found: tuple(sorted(found)))
    return st.fixed_dictionaries({**sizes, "skipped": skipped}).map(Selection.from_dict)


@pytest.fixture(scope="module")
def process():
    from megatron_elastic import standalone

    with standalone.single_process():
        yield standalone


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints") / "parent"
    parent.write(folder, parent.weights())
    return folder


@pytest.fixture(scope="module")
def elastic(process, source):
    model = process.build_elastic_model(parent.FLAGS, FAMILY, torch.float64)
    process.load_weights(model, source)
    return model


def outcome(model, **how):
    """Logits, loss, and every gradient that there is."""
    text = parent.tokens()
    model.zero_grad(set_to_none=True)
    logits = model(text, torch.arange(text.shape[1]).expand(len(text), -1), None, **how)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), text[:, 1:].flatten())
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), "loss": loss.detach()[None]}, grads


def of_the_whole_parent(grads):
    """Gradients of every weight of the parent: of those without one, zeros."""
    dimensions = LAYOUT.parameters()
    shapes = {name: [dimension.size for dimension in each] for name, each in dimensions.items()}
    return {name: grads.get(name, torch.zeros(shapes[name], dtype=torch.float64)) for name in dimensions}


def distance(one, other):
    from tests.distributed import elastic_kit as kit

    (made, grads), (wanted, wanted_grads) = one, other
    return max(kit.worst(made, wanted), kit.worst(of_the_whole_parent(grads), of_the_whole_parent(wanted_grads)))


def extracted(process, source, folder, selection):
    """The submodel, cut to disk and built by itself; its gradients in their place in the parent's."""
    from tests.distributed import elastic_kit as kit

    count = cut(source, folder, shape=SHAPE, ffn_blocks=parent.BLOCKS, flags=parent.FLAGS, selection=selection)
    shape = selection.submodel(SHAPE)
    model = process.build_plain_model(shape_flags(shape, parent.FLAGS), torch.float64, shape)
    process.load_weights(model, folder)
    built = sum(parameter.numel() for parameter in model.parameters())
    assert count == built == parameters(SHAPE, selection.sizes, selection.gates(LAYERS))
    made, grads = outcome(model)
    return made, kit.scatter_back(grads, LAYOUT, selection)


SELECTIONS = {
    **{axis: narrow(**{axis: FAMILY.choices[axis][-1]}) for axis in FAMILY.axes},
    "ffn by layer": narrow(ffn=(4, 32)),
    "mamba_heads by layer": narrow(mamba_heads=(8, 2)),
    "all": FAMILY.select({axis: choices[-1] for axis, choices in FAMILY.choices.items()}),
    "all by layer": narrow(
        hidden=15, ffn=(20, 12), mamba_heads=(2, 6), mamba_head_dim=3, attention_heads=(4,), depth=4
    ),
}


@pytest.mark.parametrize("name", SELECTIONS)
def test_every_axis_alone_and_all_together(process, source, elastic, tmp_path, name):
    selection = SELECTIONS[name]
    sliced = outcome(elastic, selection=selection)
    masked = outcome(elastic, probabilities=one_hot(selection, FAMILY, torch.float64))
    assert distance(masked, sliced) < TOLERANCE
    assert distance(extracted(process, source, tmp_path / "cut", selection), sliced) < TOLERANCE
    assert distance(outcome(elastic, selection=FAMILY.full), sliced) > 1e-2


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(selection=drawn(depth=True))
def test_masked_is_sliced_whatever_is_drawn(elastic, selection):
    sliced = outcome(elastic, selection=selection)
    masked = outcome(elastic, probabilities=one_hot(selection, FAMILY, torch.float64))
    assert distance(masked, sliced) < TOLERANCE
    # Layers that are left out have no gradient at all in the slice, and one of zeros under the mask.
    for number in selection.skipped:
        assert not [name for name in sliced[1] if name.startswith(f"decoder.layers.{number}.")]
        own = [grad for name, grad in masked[1].items() if name.startswith(f"decoder.layers.{number}.")]
        assert own
        assert all(grad.count_nonzero() == 0 for grad in own)


@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(selection=drawn(depth=False))
def test_extracted_is_sliced_whatever_is_drawn(process, source, elastic, tmp_path_factory, selection):
    folder = tmp_path_factory.mktemp("drawn") / "cut"
    sliced = outcome(elastic, selection=selection)
    assert distance(extracted(process, source, folder, selection), sliced) < TOLERANCE


def test_other_layers_left_out_are_another_model(elastic):
    one, other = (outcome(elastic, selection=narrow(depth=4)), outcome(elastic, selection=Selection.from_dict(
        {**SHAPE.full, "skipped": (4,)}
    )))  # fmt: skip
    assert float((one[0]["logits"] - other[0]["logits"]).abs().max()) > 1e-2
