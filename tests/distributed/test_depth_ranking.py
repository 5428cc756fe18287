"""The order of the layers, against models that really lack them; what it costs, and how it goes on."""

import json

import pytest
import torch
from torch import Tensor

from megatron_elastic.errors import CheckpointError, ElasticError
from megatron_elastic.layout import Layout
from tests.distributed import standalone_parent as parent

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(torch.cuda.is_available(), reason="fp64 proofs on the CPU adaptation, which refuses CUDA"),
]
PATTERN = "M-*-M-M*-M--"
FLAGS = {**parent.FLAGS, "hybrid-layer-pattern": PATTERN}
LAYERS = len(PATTERN)
KEY = {"checkpoint": "parent", "samples": 3}


@pytest.fixture(scope="module")
def model():
    from megatron_elastic import standalone
    from megatron_elastic.flags import model_shape

    shape = model_shape(FLAGS, [])
    assert shape is not None
    with standalone.single_process():
        made = standalone.build_plain_model(FLAGS, torch.float64)
        weights = parent.weights(Layout(shape, parent.BLOCKS))
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                # Some layers say less than others, whatever their kind: the order is not that of the kinds.
                quiet = 0.2 if any(f"layers.{n}." in name for n in (1, 4, 8)) and "out_proj" not in name else 1.0
                parameter.copy_(weights[name] * (quiet if name.endswith(("fc2.weight", "proj.weight")) else 1.0))
        yield made


def batches(seed: int = 3) -> list[Tensor]:
    return [parent.tokens(seed), parent.tokens(seed + 100, samples=1)]


def rank(model, **how):
    from megatron_elastic.importance.depth import rank_depth

    return rank_depth(model, how.pop("batches", batches()), **{"removals": 4, "key": KEY, **how})


def logits_without(model, removed: list[int]) -> Tensor:
    """Logits of a model that lacks the layers: core's own forward on a shorter list of them."""
    whole = model.decoder.layers
    model.decoder.layers = torch.nn.ModuleList(layer for n, layer in enumerate(whole) if n not in removed)
    try:
        return torch.cat([parent.logits(model, text).flatten() for text in batches()])
    finally:
        model.decoder.layers = whole


def by_hand(model, removals: int) -> tuple[list[int], list[dict[int, float]]]:
    full, removed, rounds = logits_without(model, []), [], []
    for _ in range(removals):
        left = [n for n in range(LAYERS) if n not in removed]
        changed = {n: full - logits_without(model, [*removed, n]) for n in left}
        rounds.append({n: float((c**2).sum() / (full**2).sum()) for n, c in changed.items()})
        removed.append(min(rounds[-1], key=rounds[-1].__getitem__))
    return [*removed, *sorted(set(rounds[-1]) - set(removed), key=rounds[-1].__getitem__)], rounds


def test_scores_are_those_of_models_that_lack_the_layers(model):
    found = rank(model)
    order, rounds = by_hand(model, 4)
    assert list(found.order) == order
    for ours, theirs in zip(found.rounds, rounds, strict=True):
        assert set(ours) == set(theirs)
        # fp64; the head's norm comes from its QR factor.
        assert [ours[n] for n in theirs] == pytest.approx(list(theirs.values()), rel=1e-10)
    assert [found.score(n) for n in order[:4]] == pytest.approx([rounds[i][n] for i, n in enumerate(order[:4])])
    other = rank(model, batches=batches(seed=9))
    assert [other.rounds[0][n] for n in range(LAYERS)] != pytest.approx(
        [found.rounds[0][n] for n in range(LAYERS)], rel=1e-3
    )


def test_one_shot_judges_every_layer_once(model):
    found, (order, rounds) = rank(model, method="one-shot"), by_hand(model, 1)
    assert list(found.order) == order
    assert len(found.rounds) == 1
    assert [found.rounds[0][n] for n in range(LAYERS)] == pytest.approx([rounds[0][n] for n in range(LAYERS)])
    # The removals interact here: what is removed first changes the order of the others.
    assert found.order != rank(model, removals=LAYERS - 1).order


@pytest.mark.parametrize("removals", [4, LAYERS - 1])
def test_cost_is_counted_and_at_most_055_of_running_from_the_first_layer(model, removals):
    ran = []
    handles = [layer.register_forward_hook(lambda *_: ran.append(1)) for layer in model.decoder.layers]
    try:
        found = rank(model, removals=removals)
    finally:
        for handle in handles:
            handle.remove()
    left = range(LAYERS, LAYERS - removals, -1)
    assert found.layer_forwards == len(ran) / len(batches())
    assert found.layer_forwards == LAYERS + sum(n * (n - 1) // 2 for n in left)
    assert found.layer_forwards_naive == LAYERS + sum(n * (n - 1) for n in left)
    assert found.layer_forwards <= 0.55 * found.layer_forwards_naive


def test_progress_reaches_what_was_planned(model):
    told: list[tuple[int, int]] = []
    found = rank(model, progress=lambda done, planned: told.append((done, planned)))
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[-1] == (found.layer_forwards, found.layer_forwards)


class Stop(Exception):
    """Stands for whatever ends a run."""


def test_an_interrupted_ranking_goes_on_with_the_same_result(model, tmp_path):
    state = tmp_path / "scores.pt.depth.json"
    whole = rank(model)

    def stop(done: int, planned: int) -> None:
        if done > 0.7 * planned:
            raise Stop

    with pytest.raises(Stop):
        rank(model, state=state, progress=stop)
    kept = json.loads(state.read_text())
    assert kept["removed"] == list(whole.order[:2])
    again = rank(model, state=state)
    assert again.order == whole.order
    assert again.rounds == whole.rounds  # bit for bit
    # The parent and the model without two layers are run once more.
    assert again.layer_forwards == whole.layer_forwards + LAYERS + LAYERS - 2
    assert rank(model, state=state, removals=2) == again  # nothing is left to do
    # It is what the file says that is gone on from.
    state.write_text(json.dumps({**kept, "removed": [10, 11]}))
    assert rank(model, state=state).order[:2] == (10, 11)


def test_the_state_of_another_ranking_is_refused(model, tmp_path):
    state = tmp_path / "state.json"
    rank(model, state=state, removals=1)
    with pytest.raises(CheckpointError, match=r"samples: 3 there, 4 here.*delete it"):
        rank(model, state=state, key={**KEY, "samples": 4})
    with pytest.raises(CheckpointError, match="method: 'iterative' there, 'one-shot' here"):
        rank(model, state=state, method="one-shot")
    state.write_text("{")
    with pytest.raises(CheckpointError, match="no state of a depth ranking"):
        rank(model, state=state)


def test_impossible_rankings_are_refused(model):
    for how in ({"removals": 0}, {"removals": LAYERS}, {"method": "random"}, {"batches": []}):
        with pytest.raises(ElasticError, match="1 to 11 removals"):
            rank(model, **how)


def test_logits_that_are_not_finite_are_an_error(model):
    weight = model.decoder.layers[1].mlp.linear_fc2.weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(float("inf"))
    try:
        with pytest.raises(ElasticError, match="not finite"):
            rank(model)
    finally:
        with torch.no_grad():
            weight.copy_(before)


def test_the_factor_of_the_head_gives_the_norm_of_the_logits(model):
    from megatron_elastic.importance import depth

    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(7, 12, generator=generator, dtype=torch.float64)
    for vocabulary in (5, 12, 300):
        weight = torch.randn(vocabulary, 12, generator=generator, dtype=torch.float64)
        before, depth._VOCABULARY_SLICE = depth._VOCABULARY_SLICE, 64
        try:
            factor = depth.triangular_factor(weight, model.pg_collection)
        finally:
            depth._VOCABULARY_SLICE = before
        norms = torch.linalg.vector_norm(vectors @ factor.t(), dim=1)
        assert torch.allclose(norms, torch.linalg.vector_norm(vectors @ weight.t(), dim=1), rtol=1e-12)
        assert factor.shape[1] == 12
