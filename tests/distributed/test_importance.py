"""Importance on a built model, against the formulas written out, and on models of which a part is useless."""

import numpy
import pytest
import torch
from torch import Tensor

from megatron_elastic.errors import CorpusError, ElasticError, RecipeError
from megatron_elastic.importance import Scores, rank_parent
from tests.distributed import standalone_parent as parent

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(torch.cuda.is_available(), reason="fp64 proofs on the CPU adaptation, which refuses CUDA"),
]
SHAPE = parent.SHAPE


@pytest.fixture(scope="module")
def process():
    from megatron_elastic import standalone

    with standalone.single_process():
        yield standalone


def build(process, tensors: dict[str, Tensor] | None = None):
    model = process.build_plain_model(parent.FLAGS, torch.float64)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_((tensors or parent.weights())[name])
    return model


def collect(model, *batches: Tensor, **other) -> Scores:
    from megatron_elastic.importance.collect import collect_scores

    return collect_scores(model, batches, **other)


def aggregate(magnitudes: Tensor) -> Tensor:
    """Mean over the sequence, L2 over the samples: `[s, b, n] -> [n]`."""
    return sum(magnitudes[:, b].mean(0) ** 2 for b in range(magnitudes.shape[1])) ** 0.5


def attention_context(qkv: Tensor) -> Tensor:
    """Causal grouped-query attention from the packed projection, one head at a time: `[s, b, heads, d]`."""
    s, b, _ = qkv.shape
    width, per_group = SHAPE.head_dim, SHAPE.attention_heads // SHAPE.query_groups
    heads = []
    for group in qkv.view(s, b, SHAPE.query_groups, -1).unbind(2):
        *queries, key, value = group.split(width, dim=-1)
        assert len(queries) == per_group
        for query in queries:
            similarity = torch.einsum("sbd,tbd->bst", query, key) / width**0.5
            similarity = similarity.masked_fill(torch.ones(s, s).triu(1).bool(), float("-inf"))
            heads.append(torch.einsum("bst,tbd->sbd", similarity.softmax(-1), value))
    return torch.stack(heads, dim=2)


def by_hand(model, text: Tensor, weights: dict[str, Tensor], head_channels: int) -> Scores:
    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    x = weights["embedding.word_embeddings.weight"][text].transpose(0, 1)
    hidden, layers, inner = 0, {}, SHAPE.mamba_heads * SHAPE.mamba_head_dim
    norms = {"M": "norm", "-": "pre_mlp_layernorm", "*": "input_layernorm"}
    for number, kind in enumerate(SHAPE.pattern):
        own = {n.split(".", 3)[3]: t for n, t in weights.items() if n.startswith(f"decoder.layers.{number}.")}
        normed = norm(x, own[f"{norms[kind]}.weight"])
        hidden = hidden + aggregate(normed.abs())
        if kind == "M":
            values = normed @ own["mixer.in_proj.weight"][inner : 2 * inner].T
            channels = aggregate(values.abs()).view(SHAPE.mamba_heads, SHAPE.mamba_head_dim)
            shared = channels.pow(2).sum(0).sqrt()
            top = sorted(range(len(shared)), key=lambda d: -float(shared[d]))[:head_channels]
            heads = sum(channels[:, d] ** 2 for d in top) ** 0.5
            layers[number] = {"mamba_heads": heads, "mamba_head_dim": shared}
            out = model.decoder.layers[number].mixer(normed)[0]
        elif kind == "-":
            neurons = normed @ own["mlp.linear_fc1.weight"].T
            layers[number] = {"ffn": aggregate(neurons.abs())}
            out = neurons.relu().square() @ own["mlp.linear_fc2.weight"].T
        else:
            context = attention_context(normed @ own["self_attention.linear_qkv.weight"].T)
            layers[number] = {"attention_heads": aggregate(context.pow(2).sum(-1).sqrt())}
            out = context.flatten(2) @ own["self_attention.linear_proj.weight"].T
        x = x + out
    return Scores(hidden, layers)


def flat(scores: Scores) -> dict[tuple[int, str], Tensor]:
    found = {(number, axis): t for number, axes in scores.layers.items() for axis, t in axes.items()}
    return {(-1, "hidden"): scores.hidden, **found}


@pytest.mark.parametrize("head_channels", [SHAPE.mamba_head_dim, 2])
def test_scores_are_the_formulas(process, head_channels):
    model, text = build(process), parent.tokens(samples=3)
    found = flat(collect(model, text[:2], text[2:], head_channels=head_channels))
    with torch.no_grad():
        expected = flat(by_hand(model, text, parent.weights(), head_channels))
        other = flat(by_hand(model, parent.tokens(seed=4, samples=3), parent.weights(), head_channels))
    assert set(found) == set(expected)
    for place, scores in expected.items():
        # fp64; attention and sums in another order.
        torch.testing.assert_close(found[place], scores, rtol=1e-11, atol=0, msg=lambda m, p=place: f"{p}: {m}")
        assert not torch.allclose(found[place], other[place], rtol=1e-3), place
    assert collect(model, text).faults(SHAPE) == []
    judged_otherwise = flat(collect(model, text, head_channels=3))[0, "mamba_heads"]
    assert not torch.allclose(judged_otherwise, expected[0, "mamba_heads"], rtol=1e-3)


@pytest.mark.parametrize("gated", [False, True])
def test_scores_of_experts_are_the_formulas(process, gated):
    from tests.distributed import importance_kit as kit

    flags = {**kit.EXPERT_FLAGS, "hybrid-layer-pattern": "E", "swiglu": gated, "squared-relu": not gated}
    weights = parent.weights(kit.layout(flags))
    model, text, name = process.build_plain_model(flags, torch.float64), parent.tokens(samples=3), "decoder.layers.0."
    layer = model.decoder.layers[0]

    def neurons(x: Tensor, fc1: Tensor) -> Tensor:
        if not gated:
            return x @ fc1.T
        gate, value = (x @ fc1.T).chunk(2, dim=-1)
        return gate / (1 + (-gate).exp()) * value

    def output(x: Tensor, fc1: Tensor, fc2: Tensor) -> Tensor:
        active = neurons(x, fc1)
        return (active if gated else active.relu() ** 2) @ fc2.T

    own = {n.removeprefix(name): t for n, t in weights.items() if n.startswith(name)}
    fc1, fc2 = (own[f"mlp.experts.experts.linear_fc{n}.weight"] for n in (1, 2))
    with torch.no_grad():
        for full, parameter in model.named_parameters():
            stock, _, number = full.partition("experts.local_experts.")
            if number:
                parameter.copy_(own["mlp.experts.experts." + number[2:]][int(number[0])])
            else:
                parameter.copy_(weights[stock])
        layer.mlp.router.expert_bias.copy_(own["mlp.router.expert_bias"])
        found = collect(model, text[:2], text[2:])
        embedded = weights["embedding.word_embeddings.weight"][text].transpose(0, 1).contiguous()
        normed = layer.pre_mlp_layernorm(embedded)
        gates, chosen = layer.mlp.router(normed)
        tokens = normed.flatten(0, 1)
        gains, activity = [], []
        for expert in range(4):
            mine, gate = tokens[chosen[:, expert]], gates[chosen[:, expert], expert]
            gains.append((gate * output(mine, fc1[expert], fc2[expert]).pow(2).sum(1).sqrt()).mean())
            activity.append(neurons(mine, fc1[expert]).abs().mean(0))
        shared = aggregate(neurons(normed, own["mlp.shared_experts.linear_fc1.weight"]).abs())
    assert chosen.sum() == 2 * len(tokens)
    expected = {"experts": torch.stack(gains), "expert_ffn": torch.stack(activity), "shared_expert_ffn": shared}
    assert set(found.layers[0]) == set(expected)
    for axis, scores in expected.items():
        # fp64; but core's router rounds its gates to fp32, and rounding follows from the batch that a token is in.
        exact = 1e-7 if axis == "experts" else 1e-11
        torch.testing.assert_close(found.layers[0][axis], scores, rtol=exact, atol=0, msg=lambda m, a=axis: f"{a}: {m}")
    # REAP is no count: how often an expert is chosen says something else.
    assert found.layers[0]["experts"].argsort().tolist() != chosen.sum(0).argsort().tolist()
    assert collect(model, text).faults(kit.layout(flags).shape) == []


@pytest.mark.parametrize("seed", range(3))
def test_useless_entries_get_the_lowest_scores(process, seed):
    generator = torch.Generator().manual_seed(seed)

    def half(size: int, groups: int = 1) -> Tensor:
        width = size // groups
        return torch.cat([torch.randperm(width, generator=generator)[: width // 2] + g * width for g in range(groups)])

    tensors, useless = parent.weights(), {}
    useless[-1, "hidden"] = half(SHAPE.hidden)
    for number, kind in enumerate(SHAPE.pattern):
        name = f"decoder.layers.{number}."
        if kind == "-":
            useless[number, "ffn"] = half(SHAPE.ffn)
            tensors[name + "mlp.linear_fc1.weight"][useless[number, "ffn"]] = 0
        elif kind == "M":
            heads = useless[number, "mamba_heads"] = half(SHAPE.mamba_heads, SHAPE.mamba_groups)
            inner = SHAPE.mamba_heads * SHAPE.mamba_head_dim
            x = tensors[name + "mixer.in_proj.weight"][inner : 2 * inner]
            x.view(SHAPE.mamba_heads, SHAPE.mamba_head_dim, -1)[heads] = 0
        norm = {"M": "norm", "-": "pre_mlp_layernorm", "*": "input_layernorm"}[kind]
        tensors[name + f"{norm}.weight"][useless[-1, "hidden"]] = 0
    found = flat(collect(build(process, tensors), parent.tokens()))
    for place, entries in useless.items():
        assert set(found[place].argsort()[: len(entries)].tolist()) == set(entries.tolist()), place
        assert found[place][entries].max() == 0, place
        others = torch.ones(len(found[place])).bool()
        others[entries] = False
        assert found[place][others].min() > 0, place


def test_useless_key_value_group_makes_its_heads_useless(process):
    tensors = parent.weights()
    qkv = tensors["decoder.layers.2.self_attention.linear_qkv.weight"]
    # The last rows of the second group are its values.
    qkv[-SHAPE.head_dim :] = 0
    found = flat(collect(build(process, tensors), parent.tokens()))[2, "attention_heads"]
    assert (found[4:] == 0).all()
    assert (found[:4] > 0).all()


def test_the_model_is_left_as_it_was(process):
    model = build(process)
    model.train()
    before = parent.logits(model, parent.tokens())
    model.train()
    collect(model, parent.tokens())
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(parent.logits(model, parent.tokens()), before)


def test_no_sample_is_refused(process):
    with pytest.raises(ElasticError, match=r"calibration\.samples"):
        collect(build(process))


def test_single_process_refuses_launchers_and_nesting(process, monkeypatch):
    with pytest.raises(ElasticError, match="initialised already"), process.single_process():
        pass
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ElasticError, match="a launcher started 2"), process.single_process():
        pass


def test_flags_that_megatron_does_not_know_are_refused(process):
    with pytest.raises(RecipeError, match="Megatron refuses"):
        process.build_plain_model({**parent.FLAGS, "no-such-flag": 1})


def write_data(prefix, length: int, vocab: int = 60) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    text = numpy.random.default_rng(0).integers(vocab, size=length).astype(numpy.uint16)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=numpy.uint16)
    builder.add_document(text, [length])
    builder.finalize(f"{prefix}.idx")


def recipe(prefix, length=16, **axes):
    from megatron_elastic.config import parse_recipe

    flags = {name: value for name, value in parent.FLAGS.items() if name != "pipeline-model-parallel-size"}
    stage = {"iterations": 1, "sequence_length": 8, "global_batch_size": 1, "micro_batch_size": 1, "weights": [1.0]}
    elastic = {
        "parent": "sorted", "save": "family", "train_data": str(prefix), "validation_data": str(prefix),
        "ffn_blocks": parent.BLOCKS, "axes": axes, "budgets": [{"name": "p100", "fraction": 1.0}],
        "selections": {"p100": {}}, "stages": [stage],
        "calibration": {"samples": 5, "sequence_length": length, "batch_size": 2, "depth_samples": 4},
    }  # fmt: skip
    return parse_recipe({"megatron": flags, "elastic": elastic}, world_size=2)


def test_rank_parent_writes_one_file(process, tmp_path, monkeypatch):
    from megatron_elastic.importance.calibration import CalibrationText

    write_data(tmp_path / "text", 1000)
    fp32 = {name: tensor.float() for name, tensor in parent.weights().items()}
    parent.write(tmp_path / "parent", fp32)
    # The groups of this module stand; making them has its own test.
    monkeypatch.setattr(process, "single_process", __import__("contextlib").nullcontext)
    wanted = recipe(tmp_path / "text", depth=[5, 4, 3], mamba_head_dim=[4, 3])
    made = rank_parent(wanted, tmp_path / "parent", tmp_path / "scores.pt")
    read = Scores.load(tmp_path / "scores.pt")
    text = CalibrationText(tmp_path / "text", samples=5, sequence_length=16, vocab=60)
    expected = flat(collect(build(process, fp32), text.tokens(range(5)), head_channels=3))
    for place, scores in expected.items():
        assert torch.equal(flat(made)[place], flat(read)[place])
        # fp32 activations against fp64 ones.
        torch.testing.assert_close(flat(read)[place], scores, rtol=1e-4, atol=1e-6)
    assert read.depth == made.depth
    assert read.depth is not None
    assert (read.depth.method, sorted(read.depth.order), len(read.depth.rounds)) == ("iterative", [0, 1, 2, 3, 4], 2)
    assert not list(tmp_path.glob("*.depth.json"))
    fingerprint = read.calibration["fingerprint"]
    assert len(fingerprint) == 64
    assert read.calibration == {
        "samples": 5, "sequence_length": 16, "data": str(tmp_path / "text"), "checkpoint": str(tmp_path / "parent"),
        "depth_samples": 4, "seed": None, "head_channels": 3, "fingerprint": fingerprint,
    }  # fmt: skip
    fixed = rank_parent(recipe(tmp_path / "text"), tmp_path / "parent", tmp_path / "fixed.pt")
    assert fixed.depth is None
    once = rank_parent(recipe(tmp_path / "text"), tmp_path / "parent", tmp_path / "once.pt", depth="one-shot")
    assert once.depth is not None
    assert len(once.depth.rounds) == 1


def test_a_split_that_does_not_fit_is_refused(process, tmp_path, monkeypatch):
    with (
        pytest.raises(ElasticError, match="1 ranks: they must be a multiple of TP x PP = 4"),
        process.split_groups(parent.FLAGS),
    ):
        pass
    write_data(tmp_path / "text", 1000)
    parent.write(tmp_path / "parent", parent.weights())
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ElasticError, match=r"sequence_length 15: with sequence-parallel it must be a multiple of .* 2"):
        rank_parent(recipe(tmp_path / "text", length=15), tmp_path / "parent", tmp_path / "scores.pt")


def test_rank_parent_checks_before_it_computes(tmp_path):
    parent.write(tmp_path / "parent", parent.weights())
    with pytest.raises(CorpusError, match=r"no \.bin"):
        rank_parent(recipe(tmp_path / "nothing"), tmp_path / "parent", tmp_path / "scores.pt")
    assert not (tmp_path / "scores.pt").exists()
