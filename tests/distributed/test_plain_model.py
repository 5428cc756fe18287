"""Core's hybrid model on this package's local layers, in one process."""

import pytest
import torch
from torch import Tensor

from megatron_elastic.errors import ElasticError

# gloo alone, and the CPU adaptation: on a GPU machine the GPU tests cover these layers.
pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(
        torch.cuda.is_available(), reason="runs on the CPU adaptation, which refuses to load beside CUDA"
    ),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    from megatron_elastic.cpu import adaptation

    adaptation.install()
    store = torch.distributed.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    from tests.distributed import plain_model

    yield plain_model
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_forward_and_backward_are_finite(models, dtype):
    model = models.build(dtype=dtype)
    logits = model(*models.batch())
    assert logits.shape == (2, models.SEQUENCE, models.VOCABULARY)
    assert logits.dtype == dtype
    logits.float().logsumexp(-1).mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if name.endswith(("A_log", "mixer.D")) else dtype), name
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_parameter_names_are_the_stock_ones(models):
    names = {name for name, _ in models.build().named_parameters()}
    mamba = (
        "in_proj.weight",
        "conv1d_weight",
        "conv1d_bias",
        "dt_bias",
        "A_log",
        "D",
        "norm.weight",
        "out_proj.weight",
    )
    expected = {"embedding.word_embeddings.weight", "decoder.final_norm.weight", "output_layer.weight"}
    for number, kind in enumerate(models.PATTERN):
        layer = {
            "M": ("norm.weight", *(f"mixer.{name}" for name in mamba)),
            "*": ("input_layernorm.weight", "self_attention.linear_qkv.weight", "self_attention.linear_proj.weight"),
            "-": ("pre_mlp_layernorm.weight", "mlp.linear_fc1.weight", "mlp.linear_fc2.weight"),
        }[kind]
        expected |= {f"decoder.layers.{number}.{name}" for name in layer}
    assert names == expected


def test_is_causal_and_sees_the_past(models):
    model = models.build(dtype=torch.float64)
    tokens, positions, mask = models.batch()
    changed = tokens.clone()
    changed[:, 20] = (changed[:, 20] + 1) % models.VOCABULARY
    before, after = model(tokens, positions, mask), model(changed, positions, mask)
    # Summed in the same order, but the scan works on whole chunks at a time.
    torch.testing.assert_close(after[:, :20], before[:, :20], rtol=0, atol=1e-13)
    assert (after[:, 20:] != before[:, 20:]).any(-1).all()


def by_steps(mixer, hidden: Tensor) -> Tensor:
    """Mamba-2 mixer `[s, b, h]`, one token and one head at a time, from its definition (Dao and Gu 2024, section 6)."""
    heads, width, groups, state = mixer.nheads, mixer.headdim, mixer.ngroups, mixer.d_state
    zxbcdt = hidden @ mixer.in_proj.weight.T
    z, xbc, dt = zxbcdt.split([heads * width, heads * width + 2 * groups * state, heads], dim=-1)
    kernel, out = mixer.conv1d_weight[:, 0], []
    memory = hidden.new_zeros(hidden.shape[1], heads, width, state)
    for t in range(len(hidden)):
        window = [xbc[t - k] * kernel[:, -1 - k] for k in range(kernel.shape[1]) if t >= k]
        x, b, c = torch.nn.functional.silu(sum(window) + mixer.conv1d_bias).split(
            [heads * width, groups * state, groups * state], dim=-1
        )
        x, b, c = x.unflatten(-1, (heads, width)), b.unflatten(-1, (groups, state)), c.unflatten(-1, (groups, state))
        step = torch.log1p(torch.exp(dt[t] + mixer.dt_bias))
        head_outputs = []
        for head in range(heads):
            group = head // (heads // groups)
            decay = torch.exp(-torch.exp(mixer.A_log[head]) * step[:, head])
            added = step[:, head, None, None] * x[:, head, :, None] * b[:, group, None, :]
            # Out of place: autograd keeps every state.
            new = decay[:, None, None] * memory[:, head] + added
            memory = torch.cat([memory[:, :head], new[:, None], memory[:, head + 1 :]], dim=1)
            head_outputs.append((new * c[:, group, None, :]).sum(-1) + mixer.D[head] * x[:, head])
        gated = torch.cat(head_outputs, dim=-1) * torch.nn.functional.silu(z[t])
        gated = gated.unflatten(-1, (groups, -1))
        gated = gated / (gated.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
        out.append(gated.flatten(-2) * mixer.norm.weight)
    return torch.stack(out) @ mixer.out_proj.weight.T


def test_mamba_mixer_is_the_recurrence(models):
    mixer = models.build(dtype=torch.float64).decoder.layers[0].mixer.double()
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(models.SEQUENCE, 2, 48, dtype=torch.float64, generator=generator)
    with torch.no_grad():
        for parameter in (mixer.D, mixer.norm.weight):
            parameter.add_(torch.randn(parameter.shape, dtype=torch.float64, generator=generator))
    probe = torch.randn(hidden.shape, dtype=torch.float64, generator=generator)
    found = {}
    for name, run in (("mixer", lambda: mixer(hidden)[0]), ("steps", lambda: by_steps(mixer, hidden))):
        output = run()
        found[name] = [output, *torch.autograd.grad((output * probe).sum(), list(mixer.parameters()))]
    for ours, reference in zip(found["mixer"], found["steps"], strict=True):
        # fp64 with another order of sums: a scan over chunks against a loop over tokens.
        torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-10)
    with torch.no_grad():
        mixer.A_log[1].add_(0.1)
    assert (mixer(hidden)[0] - found["steps"][0]).abs().max() > 1e-6


def test_documents_are_kept_apart(models):
    from megatron_elastic.layers.packing import packed_documents

    model = models.build(dtype=torch.float64)
    tokens, positions, _ = models.batch()
    documents = torch.arange(models.SEQUENCE).ge(15).long().expand(2, -1)
    together = model(tokens, positions, None, packed_seq_params=packed_documents(documents))
    for here in (documents[0] == 0, documents[0] == 1):
        alone = model(tokens[:, here], positions[:, here], None)
        # fp64: the scan's chunks and the rows of the GEMMs are cut elsewhere.
        torch.testing.assert_close(together[:, here], alone, rtol=1e-11, atol=1e-12)
    assert (model(tokens, positions, None) - together)[:, 15:].abs().max() > 1e-2 * together.abs().max()


def test_what_the_local_layers_cannot_run_is_refused(models):
    from megatron.core.packed_seq_params import PackedSeqParams

    model = models.build()
    tokens, positions, _ = models.batch()
    ends = torch.tensor([0, 15, models.SEQUENCE], dtype=torch.int32)
    with pytest.raises(ElasticError, match=r"not qkv_format 'thd': pass .*packed_documents"):
        model(tokens, positions, None, packed_seq_params=PackedSeqParams(qkv_format="thd", cu_seqlens_q=ends))
    with pytest.raises(ElasticError, match="no inference cache"):
        model.decoder.layers[0].mixer(torch.zeros(models.SEQUENCE, 2, 48), object())


def test_kernel_flag_is_put_back(models):
    from megatron.core.ssm import mamba_mixer

    from megatron_elastic.layers.plain import without_mamba_kernels

    before = mamba_mixer.HAVE_MAMBA_SSM
    models.build()
    assert mamba_mixer.HAVE_MAMBA_SSM is before

    def fail():
        with without_mamba_kernels():
            assert mamba_mixer.HAVE_MAMBA_SSM
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        fail()
    assert mamba_mixer.HAVE_MAMBA_SSM is before


@pytest.mark.parametrize("flags", [{"normalization": "LayerNorm"}, {"layernorm_zero_centered_gamma": True}])
def test_other_norms_are_refused(models, flags):
    with pytest.raises(ElasticError, match="normalization RMSNorm"):
        models.build(**flags)


def test_spec_is_what_the_command_line_takes(models):
    from megatron.core.transformer.spec_utils import ModuleSpec, import_module

    assert isinstance(import_module(("megatron_elastic.layers.plain", "plain_stack_spec")), ModuleSpec)
