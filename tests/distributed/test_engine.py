"""The backend of Transformer Engine, on a stand-in that computes with torch: fp64, one process.

What the real kernels do is in tests/gpu/test_transformer_engine.py; this is what reaches them, and what becomes of it.
"""

import contextlib
import io
import sys
import weakref
from pathlib import Path

import pytest
import torch

from megatron_elastic.errors import ElasticError, RecipeError

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(torch.cuda.is_available(), reason="fp64 proofs on the CPU adaptation, which refuses CUDA"),
]
ENGINE = "transformer_engine"
# fp64, forward and gradients, as in test_equalities.py.
TOLERANCE = 1e-11


@pytest.fixture(scope="module")
def cases():
    from megatron_elastic import standalone

    with standalone.single_process():
        sys.path.insert(0, str(Path(__file__).parent))
        import equality_cases

        yield equality_cases


@pytest.fixture(scope="module")
def installed(cases):
    import fake_engine

    with fake_engine.installed() as state:
        yield state


@pytest.fixture
def engine(installed):
    installed.calls.clear()
    installed.weights = 0
    return installed


@pytest.fixture(scope="module")
def kit(cases):
    return cases.kit


@pytest.fixture(scope="module")
def built(kit, installed):
    return kit.elastic_model(backend=ENGINE)


@pytest.fixture
def model(built, engine):
    """One for all tests that leave its weights as they are."""
    return built


@pytest.mark.parametrize("name", ["smallest", "varied"])
def test_masked_is_sliced_is_extracted(cases, kit, engine, model, name):
    target, selection = cases.teacher_logits_of(model), cases.chosen_selections()[name]
    engine.calls.clear()
    sliced = cases.outcome(model, cases.LAYOUT, target, selection=selection)
    ran = {call[1] for call in engine.calls if call[0] == "Linear"}
    masked = cases.outcome(model, cases.LAYOUT, target, **cases.soft(selection))
    assert cases.distance(masked, sliced) < TOLERANCE
    assert cases.distance(cases.extracted(selection, target, backend=ENGINE), sliced) < TOLERANCE
    assert cases.distance(cases.fused(model, selection=selection), sliced) < TOLERANCE
    # The negatives: another selection, and products that did not shrink.
    assert cases.distance(cases.outcome(model, cases.LAYOUT, target, selection=kit.FAMILY.full), sliced) > 1e-2
    sizes = selection.submodel(kit.SHAPE)
    widths = sizes.ffn if isinstance(sizes.ffn, tuple) else (sizes.ffn,)
    assert {(width, sizes.hidden) for width in widths} | {(sizes.hidden, width) for width in widths} <= ran
    assert (kit.SHAPE.hidden, kit.SHAPE.ffn) not in ran or sizes.hidden == kit.SHAPE.hidden


def test_the_parent_is_core_s_model_on_both_backends(cases, kit, model):
    target = cases.teacher_logits_of(model)
    plain = {}
    for backend in ("local", ENGINE):
        stock = kit.stock_model(kit.SHAPE, backend=backend)
        kit.set_weights(stock, cases.LAYOUT, kit.full_weights(cases.LAYOUT))
        plain[backend] = cases.outcome(stock, cases.LAYOUT, target)
    local = kit.elastic_model()
    for how in ({}, {"selection": kit.FAMILY.full}, cases.soft(kit.FAMILY.full)):
        assert cases.distance(cases.outcome(model, cases.LAYOUT, target, **how), plain["local"]) < TOLERANCE
        assert cases.distance(cases.outcome(local, cases.LAYOUT, target, **how), plain[ENGINE]) < TOLERANCE
    assert cases.distance(cases.outcome(model, cases.LAYOUT, target, selection=kit.SELECTIONS[2]), plain[ENGINE]) > 1e-2


@pytest.mark.parametrize(
    "other",
    [
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
        {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp", "layernorm"]},
    ],
)
def test_recompute_changes_nothing(cases, kit, engine, model, other):
    target, selection = cases.teacher_logits_of(model), cases.chosen_selections()["smallest"]
    again = kit.elastic_model(backend=ENGINE, **other)
    sliced = cases.outcome(model, cases.LAYOUT, target, selection=selection)
    engine.calls.clear()
    assert cases.distance(cases.outcome(again, cases.LAYOUT, target, selection=selection), sliced) < TOLERANCE
    more = len(engine.calls)
    engine.calls.clear()
    cases.outcome(model, cases.LAYOUT, target, selection=selection)
    assert more > len(engine.calls)


def with_main_grads(model):
    for parameter in model.parameters():
        parameter.main_grad = torch.zeros_like(parameter)
        parameter.grad_added_to_main_grad = False
    return model


def test_gradients_of_all_budgets_meet_in_the_parents_buffer(cases, kit, engine, model):
    """Masked, sliced and full, one after the other, as one step has them."""
    target = cases.teacher_logits_of(model)
    hows = [{"selection": kit.SELECTIONS[2]}, cases.soft(kit.SELECTIONS[1]), {"selection": kit.FAMILY.full}]
    alone = [cases.outcome(model, cases.LAYOUT, target, **how)["grads"] for how in hows]
    together = with_main_grads(kit.elastic_model(backend=ENGINE))
    for how in hows:
        cases.outcome(together, cases.LAYOUT, target, **how)
    linears = [name for name, _ in model.named_parameters() if "linear" in name or "_proj" in name]
    assert len(linears) == 2 * len(kit.PATTERN)
    skipped = {number for selection in kit.SELECTIONS for number in selection.skipped}
    parameters = dict(together.named_parameters())
    for name in linears:
        wanted = sum(grads[name] for grads in alone)
        parameter = parameters[name]
        assert parameter.grad_added_to_main_grad
        assert (parameter.main_grad - wanted).abs().max() < TOLERANCE * wanted.abs().max(), name
        if int(name.split(".")[2]) not in skipped:
            assert (parameter.main_grad - alone[2][name]).abs().max() > 1e-3 * wanted.abs().max(), name


def test_a_packed_copy_is_not_held_for_the_backward(kit, engine, model, monkeypatch):
    import fake_engine

    seen, forward = [], fake_engine.Linear.forward

    def watched(module, inp, is_first_microbatch=None):
        seen.append(weakref.ref(module.weight.untyped_storage()))
        return forward(module, inp, is_first_microbatch)

    monkeypatch.setattr(fake_engine.Linear, "forward", watched)
    model.zero_grad(set_to_none=True)
    linear = model.decoder.layers[1].mlp.linear_fc1
    segments = ((0, 8), (16, 24)), ((0, 24),)
    x = torch.randn(3, 2, 24, dtype=torch.float64, requires_grad=True)
    out, _ = linear(x, segments=segments)
    assert [each() for each in seen] == [None]
    out.square().sum().backward()
    weight = linear.weight.detach()[[*range(8), *range(16, 24)], :24].requires_grad_()
    y = x.detach().requires_grad_()
    (y @ weight.t()).square().sum().backward()
    assert torch.allclose(x.grad, y.grad, rtol=1e-12)
    assert torch.allclose(linear.weight.grad[[*range(8), *range(16, 24)], :24], weight.grad, rtol=1e-12)
    assert linear.weight.grad[8:16].eq(0).all()


@contextlib.contextmanager
def precision_of_layers(monkeypatch, quantised=lambda layer: True):
    """Core's context of a layer, where there is no Transformer Engine: opens the stand-in's."""
    import fake_engine

    from megatron_elastic.layers import recompute

    asked = []

    def context(config, layer_no=-1, is_init=False):
        asked.append(layer_no)
        return fake_engine.autocast(quantised(layer_no))

    with monkeypatch.context() as patch:
        patch.setattr(recompute, "get_fp8_context", context)
        yield asked


def run(kit, model, number=0, **how):
    batch = kit.batch(number)
    logits = model(batch["tokens"], batch["position_ids"], None, **how)
    logits.square().sum().backward()
    return logits.detach()


def test_weights_are_quantised_once_a_budget_and_step(kit, engine, monkeypatch):
    from megatron_elastic.layers.quantized_once import weights_changed

    model = kit.elastic_model(backend=ENGINE)
    linears, steps, budgets = 2 * len(kit.PATTERN), 2, kit.SELECTIONS[:2]
    skipped = [2 * len(selection.skipped) for selection in budgets]
    with precision_of_layers(monkeypatch):
        run(kit, model, selection=budgets[0])
        run(kit, model, selection=budgets[0])
        assert engine.weights == 2 * linears  # nobody has said when weights change
        engine.weights = 0
        for step in range(steps):
            weights_changed(model)
            for microbatch in range(2):
                for selection in budgets:
                    run(kit, model, 2 * step + microbatch, selection=selection)
        assert engine.weights == steps * sum(linears - each for each in skipped)
        # Evaluation quantises for itself: before training in a step, it leaves nothing that would lack a layout.
        weights_changed(model)
        batch = kit.batch()
        for uses in (linears, 2 * linears):
            engine.weights = 0
            for _ in range(uses // linears):
                with torch.no_grad():
                    model(batch["tokens"], batch["position_ids"], None, selection=budgets[0])
            assert engine.weights == uses
            engine.weights = 0
            run(kit, model, selection=budgets[0])
            assert engine.weights == (linears if uses == linears else 0)
        # What is kept is used: a weight that changes unannounced is not seen until it is announced.
        before = run(kit, model, selection=budgets[0])
        with torch.no_grad():
            model.decoder.layers[1].mlp.linear_fc1.weight.mul_(1.5)
        assert torch.equal(run(kit, model, selection=budgets[0]), before)
        weights_changed(model)
        assert not torch.equal(run(kit, model, selection=budgets[0]), before)


def test_a_frozen_model_quantises_its_weights_once(kit, engine, monkeypatch):
    from megatron_elastic.layers.quantized_once import weights_changed

    model = kit.elastic_model(backend=ENGINE)
    weights_changed(model.teachers[0])
    batch = kit.batch()
    with precision_of_layers(monkeypatch):
        for _ in range(3):
            weights_changed(model)
            model(batch["tokens"], batch["position_ids"], None, run_teacher=True)
    assert engine.weights == 2 * len(kit.PATTERN)


def test_quantised_slices_are_quantised_extracted_models(cases, kit, engine, model, monkeypatch):
    """Each slice has its own scale, as the extracted model has; under a mask the parent's scale is another."""
    selection = cases.chosen_selections()["smallest"]
    target = cases.teacher_logits_of(model)
    exact = cases.outcome(model, cases.LAYOUT, target, selection=selection)
    numbers = [n for n in range(len(kit.PATTERN)) if n not in selection.skipped]

    def asked_for(quantised):
        with precision_of_layers(monkeypatch, quantised):
            return cases.outcome(model, cases.LAYOUT, target, selection=selection)

    sliced = asked_for(lambda layer: True)
    some = asked_for(lambda layer: layer not in (0, len(kit.PATTERN) - 1))
    assert cases.distance(sliced, exact) > 1e-4
    assert cases.distance(some, exact) > 1e-4
    assert cases.distance(some, sliced) > 1e-4
    # The plain stack is core's: the whole of it in one context, first and last layers included.
    import fake_engine

    with fake_engine.autocast():
        whole = cases.extracted(selection, target, backend=ENGINE)
    assert cases.distance(whole, sliced) < TOLERANCE
    with precision_of_layers(monkeypatch) as asked:
        masked = cases.outcome(model, cases.LAYOUT, target, **cases.soft(selection))
    assert cases.distance(masked, sliced) > 1e-4
    assert asked == list(range(len(kit.PATTERN)))
    assert len(numbers) < len(asked)


@pytest.mark.parametrize(
    "other",
    [
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 2},
        {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
    ],
)
def test_what_is_recomputed_runs_in_the_precision_of_its_layer(cases, kit, engine, model, monkeypatch, other):
    target, again = cases.teacher_logits_of(model), kit.elastic_model(backend=ENGINE, **other)
    with precision_of_layers(monkeypatch, lambda layer: layer not in (0, 6)):
        wanted, found = (
            cases.outcome(each, cases.LAYOUT, target, selection=kit.SELECTIONS[1]) for each in (model, again)
        )
    assert cases.distance(found, wanted) < TOLERANCE
    unquantised = cases.outcome(model, cases.LAYOUT, target, selection=kit.SELECTIONS[1])
    assert cases.distance(found, unquantised) > 1e-4


def test_documents_are_apart_in_packed_attention(cases, kit, engine, model):
    documents = (torch.arange(24)[None] // torch.tensor([[7], [10]])).int()
    local, batch = kit.elastic_model(), kit.batch()
    where = batch["tokens"], batch["position_ids"], None
    for how in ({"selection": kit.SELECTIONS[1]}, cases.soft(kit.SELECTIONS[1])):
        one, other, whole = (
            model(*where, **how, documents=documents), local(*where, **how, documents=documents), model(*where, **how),
        )  # fmt: skip
        assert (one - other).abs().max() < TOLERANCE * other.abs().max()
        assert (one - whole).abs().max() > 1e-2 * whole.abs().max()
    assert "thd" in {call[1] for call in engine.calls if call[0] == "DotProductAttention"}
    from megatron_elastic.layers.packing import packed_documents

    plain = [kit.stock_model(kit.SHAPE, backend=backend) for backend in (ENGINE, "local")]
    for each in plain:
        kit.set_weights(each, cases.LAYOUT, kit.full_weights(cases.LAYOUT))
    found, wanted = (each(*where, packed_seq_params=packed_documents(documents)) for each in plain)
    assert (found - wanted).abs().max() < TOLERANCE * wanted.abs().max()


def test_experts(cases, engine):
    import moe_cases
    import moe_kit

    settings, family = moe_cases.ROUTERS["sigmoid"][0], moe_cases.family_of("sigmoid")
    weights = moe_kit.full_weights(family.layout)
    models = [moe_kit.elastic_model(family, backend, **settings) for backend in (ENGINE, "local")]
    for each in models:
        moe_kit.set_weights(each, family.layout, weights)
    selection = moe_cases.chosen(family)["smallest"]
    sliced, local = (moe_cases.outcome(each, family.layout, selection=selection) for each in models)
    probabilities = cases.one_hot(selection, family, torch.float64)
    masked = moe_cases.outcome(models[0], family.layout, probabilities=probabilities)
    assert moe_cases.error(sliced, local) < TOLERANCE
    assert moe_cases.error(masked, sliced) < TOLERANCE
    # The grouped products have the kept experts only, and rows as the router deals them.
    grouped = [call for call in engine.calls if call[0] == "GroupedLinear"]
    kept = {len(call[1]) for call in grouped}
    assert kept == {4, 8}
    assert any(rows % 16 for call in grouped for rows in call[1])
    plain = moe_kit.stock_model(family.shape, ENGINE, **settings)
    moe_kit.set_weights(plain, None, weights)
    whole = moe_cases.outcome(plain, None)
    assert moe_cases.error(whole, moe_cases.outcome(models[1], family.layout, selection=family.full)) < TOLERANCE
    assert float((whole["logits"] - sliced["logits"]).abs().max()) > 1e-2
    from megatron_elastic.importance.collect import _Sites

    with pytest.raises(ElasticError, match="scored one by one"):  # no expert runs by itself, so none would be seen
        _Sites._moe(None, plain.decoder.layers[1].mlp)


def test_quantised_experts_have_whole_tiles(cases, engine, monkeypatch):
    import moe_cases
    import moe_kit

    family = moe_cases.family_of("softmax")
    model = moe_kit.elastic_model(family, ENGINE, **moe_kit.SOFTMAX)
    moe_kit.set_weights(model, family.layout, moe_kit.full_weights(family.layout))
    exact = moe_cases.outcome(model, family.layout, selection=family.full)
    experts = [model.decoder.layers[number].mlp.experts for number in family.layers_with("experts")]
    for each in experts:
        monkeypatch.setattr(each.config, "fp8", "e4m3")
    engine.calls.clear()
    assert moe_cases.error(moe_cases.outcome(model, family.layout, selection=family.full), exact) < TOLERANCE
    grouped = [call for call in engine.calls if call[0] == "GroupedLinear"]
    assert len(grouped) == 2 * len(experts)
    assert all(rows % 16 == 0 for call in grouped for rows in call[1])
    with precision_of_layers(monkeypatch):
        rough = moe_cases.outcome(model, family.layout, selection=family.full)
    assert float((rough["logits"] - exact["logits"]).abs().max() / exact["logits"].abs().max()) > 1e-4


def test_checkpoints_are_the_same_on_both_backends(kit, engine):
    model, local = kit.elastic_model(backend=ENGINE), kit.elastic_model()
    entries = [{key: entry.key for key, entry in each.sharded_state_dict().items()} for each in (model, local)]
    assert entries[0] == entries[1]
    assert [name for name, _ in model.named_modules()] == [name for name, _ in local.named_modules()]
    for each in model.parameters():
        each.data.zero_()
    model.load_state_dict(local.state_dict(), strict=True)
    run(kit, model, selection=kit.SELECTIONS[1])
    assert list(model.state_dict()) == list(local.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), local.parameters(), strict=True))


def test_a_stock_engine_checkpoint_is_a_parent_of_both(cases, kit, engine, tmp_path):
    """Norms fused into the linears after them, and their modules' extra states, as Megatron saves them."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    from megatron_elastic.checkpoint import FUSED_NORMS
    from megatron_elastic.training import load_parent

    source = kit.elastic_model()
    kit.set_weights(source, cases.LAYOUT, kit.full_weights(cases.LAYOUT, jitter=0.3))
    entries = {k: entry for k, entry in source.sharded_state_dict().items() if not k.endswith("_extra_state")}
    layers = {"M": "mixer", "*": "self_attention", "-": "mlp"}
    for entry in entries.values():
        for fused, stock in FUSED_NORMS.items():
            words = entry.key.split(".")
            if words[:2] == ["decoder", "layers"] and entry.key.endswith(f"{words[2]}.{stock}"):
                assert fused.split(".")[0] == layers[kit.PATTERN[int(words[2])]]
                entry.key = entry.key.removesuffix(stock) + fused
    state = io.BytesIO()
    torch.save({"recipe": None, "extra_fp8_variables": {}}, state)
    for name in [name for name in entries if "linear" in name or "_proj" in name]:
        key = f"{name.removesuffix('weight')}_extra_state"
        entries[key] = ShardedObject(key, state, (1,), (0,))
    folder = tmp_path / "parent" / "iter_0000001"
    folder.mkdir(parents=True)
    dist_checkpointing.save({"model": entries}, str(folder))
    (tmp_path / "parent" / "latest_checkpointed_iteration.txt").write_text("1")
    for into in (kit.elastic_model(backend=ENGINE), kit.elastic_model()):
        load_parent(into, tmp_path / "parent")
        for name, parameter in into.named_parameters():
            assert torch.equal(parameter, source.get_parameter(name)), name
    usual = kit.full_weights(cases.LAYOUT)["decoder.layers.0.norm.weight"]
    assert not torch.equal(into.get_parameter("decoder.layers.0.norm.weight"), usual)


def test_what_it_cannot_do_is_refused_by_name(cases, kit, engine, monkeypatch):
    from megatron_elastic.layers.te_attention import EngineAttention
    from megatron_elastic.layers.te_linear import TEElasticColumnParallelLinear, TEElasticRowParallelLinear

    common = {"config": kit.config(), "init_method": torch.nn.init.zeros_, "skip_bias_add": False}
    with pytest.raises(ElasticError, match="has no bias"):
        TEElasticColumnParallelLinear(8, 8, bias=True, gather_output=False, **common)
    with pytest.raises(ElasticError, match="leaves its outputs split"):
        TEElasticColumnParallelLinear(8, 8, bias=False, gather_output=True, **common)
    with pytest.raises(ElasticError, match="inputs that are split"):
        TEElasticRowParallelLinear(8, 8, bias=False, input_is_parallel=False, is_expert=False, **common)
    linear = TEElasticColumnParallelLinear(8, 8, bias=False, gather_output=False, **common)
    with pytest.raises(ElasticError, match="own weight"):
        linear(torch.zeros(1, 1, 8), weight=torch.zeros(8, 8))

    class Two:
        def size(self):
            return 2

    sizes = {"groups": 2, "heads": 8, "width": 4, "scale": 0.5, "layer_number": 1}
    monkeypatch.setattr(torch.distributed, "get_process_group_ranks", lambda group: [0, 1])
    split = EngineAttention(kit.config(), **sizes, cp_group=Two())
    query, key, value = (torch.zeros(6, 1, heads, 4) for heads in (8, 2, 2))
    assert split(query, key, value).shape == (6, 1, 32)
    with pytest.raises(ElasticError, match="documents and context parallelism"):
        split(query, key, value, torch.zeros(1, 12, dtype=torch.int32))
    monkeypatch.delenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", raising=False)
    monkeypatch.setattr(common["config"], "deterministic_mode", True)
    with pytest.raises(ElasticError, match="NVTE_ALLOW_NONDETERMINISTIC_ALGO=0"):
        EngineAttention(common["config"], **sizes, cp_group=Two())
    monkeypatch.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")
    EngineAttention(common["config"], **sizes, cp_group=Two())


def test_the_backend_that_there_is(cases, engine):
    from megatron_elastic.backend import available_backend, chosen_backend

    assert chosen_backend({}, cuda=True) == available_backend({}, cuda=True) == ENGINE
    assert chosen_backend({"transformer-impl": "local"}, cuda=True) == "local"
    assert chosen_backend({}, cuda=False) == "local"
    with pytest.raises(RecipeError, match="no CUDA device"):
        chosen_backend({"transformer-impl": ENGINE}, cuda=False)
    assert available_backend({"transformer-impl": ENGINE}, cuda=False) == "local"
