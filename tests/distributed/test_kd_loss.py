"""The losses over a vocabulary sharded on two processes, against the whole vocabulary on one."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from megatron_elastic.curriculum import DistillationLoss
from megatron_elastic.ops.cross_entropy import cross_entropy
from megatron_elastic.ops.kd_loss import kd_loss, kd_loss_ref
from megatron_elastic.ops.top_k_loss import teacher_top_k, top_k_kd_loss, top_k_kd_loss_ref

pytestmark = pytest.mark.distributed

# fp64 sums of some hundred terms of size one, in another order.
EXACT = {"rtol": 1e-11, "atol": 1e-12}
WORLD, VOCABULARY = 2, 14
LOSSES = [
    DistillationLoss(),
    DistillationLoss(kind="reverse_kl"),
    DistillationLoss(kind="jsd", beta=0.3),
    DistillationLoss(kind="jsd", ce_weight=0.6),
    DistillationLoss(ce_weight=0.6),
]


def make_inputs():
    generator = torch.Generator().manual_seed(0)
    shapes = [(5, 3, 4), (VOCABULARY, 4), (5, 3, 6), (VOCABULARY, 6)]
    hidden, weight, teacher_hidden, teacher_weight = (
        torch.randn(*s, generator=generator, dtype=torch.float64) for s in shapes
    )
    # One shard holds the larger logits: a maximum taken per shard would show.
    teacher_weight[VOCABULARY // 2 :] *= 5
    weights = (torch.arange(15) % 4 != 0).double().view(5, 3)
    labels = torch.arange(15).view(5, 3) % VOCABULARY
    return hidden, weight, teacher_hidden, teacher_weight, weights, labels


def check_rank(rank, store_path):
    torch.set_num_threads(1)
    store = dist.FileStore(store_path, WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=600))
    hidden, weight, teacher_hidden, teacher_weight, weights, labels = make_inputs()
    hidden.requires_grad_()
    weight.requires_grad_()
    half = VOCABULARY // WORLD
    shard = slice(rank * half, (rank + 1) * half)
    part = weight.detach()[shard].clone().requires_grad_()
    group = dist.group.WORLD
    for chosen in LOSSES:
        settings = {"temperature": 1.5, "loss": chosen, "labels": labels}
        expected, expected_lse = kd_loss_ref(hidden, weight, teacher_hidden, teacher_weight, weights, **settings)
        expected_grads = torch.autograd.grad(expected, (hidden, weight))
        known = None
        for _ in range(2):
            loss, known = kd_loss(
                hidden, part, teacher_hidden, teacher_weight[shard], weights,
                group=group, teacher_lse=known, chunk_tokens=4, **settings,
            )  # fmt: skip
            torch.testing.assert_close(loss, expected, **EXACT)
            torch.testing.assert_close(known, expected_lse, **EXACT)
            d_hidden, d_part = torch.autograd.grad(loss, (hidden, part))
            torch.testing.assert_close(d_part, expected_grads[1][shard], **EXACT)
            assert not torch.allclose(d_hidden, expected_grads[0], rtol=1e-3)
            dist.all_reduce(d_hidden)
            torch.testing.assert_close(d_hidden, expected_grads[0], **EXACT)
        inside = {**settings, "labels": labels % half}
        alone, _ = kd_loss(hidden, part, teacher_hidden, teacher_weight[shard], weights, **inside)
        assert not torch.allclose(alone, expected, rtol=1e-3)

    # Equal logits on both shards: which of them are kept must not depend on the shards.
    teacher_weight[half] = teacher_weight[0]
    for k in (1, 5, half + 2, VOCABULARY):
        kept = teacher_top_k(teacher_hidden, teacher_weight, k, temperature=1.5)
        sharded = teacher_top_k(
            teacher_hidden, teacher_weight[shard], k, temperature=1.5, group=group, chunk_tokens=4
        )
        assert torch.equal(sharded[0], kept[0])
        torch.testing.assert_close(sharded[1], kept[1], **EXACT)
        if k < half:
            assert not torch.equal(teacher_top_k(teacher_hidden, teacher_weight[shard], k)[0], kept[0])
        for chosen in LOSSES:
            settings = {"temperature": 1.5, "loss": chosen, "labels": labels}
            expected = top_k_kd_loss_ref(hidden, weight, *kept, weights, **settings)
            expected_grads = torch.autograd.grad(expected, (hidden, weight))
            loss = top_k_kd_loss(hidden, part, *kept, weights, group=group, chunk_tokens=4, **settings)
            torch.testing.assert_close(loss, expected, **EXACT)
            d_hidden, d_part = torch.autograd.grad(loss, (hidden, part))
            torch.testing.assert_close(d_part, expected_grads[1][shard], **EXACT)
            assert not torch.allclose(d_hidden, expected_grads[0], rtol=1e-3)
            dist.all_reduce(d_hidden)
            torch.testing.assert_close(d_hidden, expected_grads[0], **EXACT)

    whole = cross_entropy(hidden, weight, labels, weights)
    torch.testing.assert_close(cross_entropy(hidden, part, labels, weights, group, 4), whole, **EXACT)
    dist.destroy_process_group()


def test_sharded_vocabulary_equals_the_whole_one(tmp_path):
    mp.spawn(check_rank, (str(tmp_path / "store"),), nprocs=WORLD)
