"""Context parallelism and packed documents against one process and against each document alone, in fp64."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import elastic_kit as kit
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.ssm import mamba_context_parallel
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from megatron.core.utils import get_batch_on_this_cp_rank
from torch import Tensor

from megatron_elastic.family import Family
from megatron_elastic.layers import context_parallel
from megatron_elastic.layers.packing import packed_documents

LENGTH = 72  # three chunks of the scan
# Every boundary inside a slice of some rank; a document of one token; two ends on the same slice.
ENDS = ((5, 6, 46, 72), (31, 33, 72))
SELECTIONS = (
    kit.narrow(hidden=28, ffn=(48, 40, 64), attention_heads=(6, 4), mamba_head_dim=3),
    kit.narrow(hidden=20, ffn=32, mamba_heads=(4, 8), mamba_head_dim=2, attention_heads=(6, 4), depth=6),
)
# One SSM group: context-parallel ranks then share its B and C.
ONE_GROUP = replace(kit.FAMILY, shape=replace(kit.SHAPE, mamba_groups=1))
Outcome = dict[str, Any]


def documents() -> Tensor:
    """`[2, LENGTH]`, the number of every token's document."""
    rows = [torch.arange(LENGTH).unsqueeze(1).ge(torch.tensor(ends)).sum(1) for ends in ENDS]
    return torch.stack(rows)


def probabilities(seed: int) -> dict[str, Tensor]:
    """Soft choices that are far from certain, as leaves."""
    generator = torch.Generator().manual_seed(seed)
    return {
        axis: torch.randn(kit.FAMILY.uses(axis), len(choices), generator=generator, dtype=torch.float64)
        .softmax(1)
        .requires_grad_()
        for axis, choices in kit.FAMILY.choices.items()
    }


def local(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """This context-parallel rank's part of a batch, cut by core."""
    group = parallel_state.get_context_parallel_group()
    found: dict[str, Tensor] = get_batch_on_this_cp_rank(dict(batch), is_hybrid_cp=False, cp_group=group)
    return found


def summed(tensor: Tensor, group: Any) -> Tensor:
    """Sum over a group, of a copy."""
    total = tensor.detach().clone()
    dist.all_reduce(total, group=group)
    return total


def whole_gradients(model: Any, family: Family) -> dict[str, Tensor]:
    """Every weight's gradient: summed over context-parallel ranks, tensor-parallel shards joined or summed."""
    tp, cp = parallel_state.get_tensor_model_parallel_group(), parallel_state.get_context_parallel_group()
    dimensions, found = family.layout.parameters(), {}
    for name, parameter in model.named_parameters():
        # A layer that a slice leaves out has no gradient on any rank.
        grad = summed(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad, cp)
        if getattr(parameter, "sequence_parallel", False):
            grad = summed(grad, tp)
        shards = [torch.empty_like(grad) for _ in range(tp.size())]
        dist.all_gather(shards, grad, group=tp)
        found[name] = kit.unshard(shards, dimensions[name])
    return found


def model_ranks() -> Any:
    """The ranks that hold one copy of the model."""
    return parallel_state.get_tensor_and_context_parallel_group()


def distilled(model: Any, family: Family, how: dict[str, Any], batch: dict[str, Tensor], **extra: Any) -> Outcome:
    """KD loss inside the model's forward, and every gradient, weights and probabilities."""
    part = local(batch)
    where = part["tokens"], part["position_ids"]
    model.zero_grad(set_to_none=True)
    leaves = how.get("probabilities", {})
    for leaf in leaves.values():
        leaf.grad = None
    with torch.no_grad():
        target = model.teacher_target(model(*where, run_teacher=True, **extra))
    loss = model(*where, **how, teacher=target, loss_mask=part["loss_mask"], **extra)
    loss.backward()
    return {
        "loss": summed(loss, parallel_state.get_context_parallel_group()),
        "grads": whole_gradients(model, family),
        "leaves": {axis: summed(leaf.grad, model_ranks()) for axis, leaf in leaves.items()},
    }


def labelled(model: Any, batch: dict[str, Tensor], **extra: Any) -> Outcome:
    """Cross entropy from the logits, for models without a loss of their own."""
    part = local(batch)
    model.zero_grad(set_to_none=True)
    logits = gather_from_tensor_model_parallel_region(model(part["tokens"], part["position_ids"], None, **extra))
    loss = (F.cross_entropy(logits.transpose(1, 2), part["labels"], reduction="none") * part["loss_mask"]).sum()
    loss.backward()
    group = parallel_state.get_context_parallel_group()
    return {"loss": summed(loss, group), "grads": whole_gradients(model, kit.FAMILY), "leaves": {}}


def distance(a: Outcome, b: Outcome) -> dict[str, float]:
    """Worst relative error of each quantity."""
    found = {"loss": float((a["loss"] - b["loss"]).abs() / b["loss"].abs()), "grads": kit.worst(a["grads"], b["grads"])}
    if b["leaves"]:
        found["leaves"] = kit.worst(a["leaves"], b["leaves"])
    return found


def ways() -> dict[str, dict[str, Any]]:
    """Slices and soft selections."""
    sliced = {f"sliced{number}": {"selection": selection} for number, selection in enumerate(SELECTIONS, start=1)}
    return {**sliced, **{f"soft{seed}": {"probabilities": probabilities(seed)} for seed in (1, 2)}}


def batch() -> dict[str, Tensor]:
    """The whole sequences."""
    return kit.batch(3, length=LENGTH)


RECOMPUTE: dict[str, dict[str, Any]] = {
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 2},
    "core": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
}
# Name of the case -> settings of the model, by (TP, CP). Four ranks of CP share an SSM group, as two do with one group.
CASES: dict[tuple[int, int], dict[str, dict[str, Any]]] = {
    (1, 2): {
        "cp2": {},
        "cp2_rope": {"positions": "rope"},
        "cp2_recompute_full": RECOMPUTE["full"],
        "cp2_recompute_core": RECOMPUTE["core"],
        "cp2_one_group": {"family": ONE_GROUP},
    },
    (1, 4): {"cp4": {}},
    (2, 2): {"tp2_cp2": {}, "tp2_cp2_sp": {"sequence_parallel": True}},
}
KINDS: dict[str, dict[str, Any]] = {"one": {}, "packed": {"documents": documents()}}
PACKED = ("packed/sliced2", "packed/soft1")
BOTH = ("one/sliced2", "one/soft1", *PACKED)
EVERY = tuple(f"{kind}/{name}" for kind in KINDS for name in ways())
WHICH = {"cp2": EVERY, "cp2_rope": BOTH, "cp4": BOTH, "tp2_cp2": BOTH}
"""What a case runs, where it is not packed documents alone."""


def outcomes(model: Any, family: Family, names: Sequence[str]) -> dict[str, Outcome]:
    """Kind / way -> outcome."""
    return {
        name: distilled(model, family, ways()[name.split("/")[1]], batch(), **KINDS[name.split("/")[0]])
        for name in names
    }


def compared(got: dict[str, Outcome], want: dict[str, Outcome]) -> dict[str, dict[str, float]]:
    """Errors of every outcome."""
    return {name: distance(outcome, want[name]) for name, outcome in got.items()}


@contextlib.contextmanager
def replaced(place: Any, name: str, value: Any) -> Iterator[None]:
    """An inserted fault."""
    right = getattr(place, name)
    setattr(place, name, value)
    try:
        yield
    finally:
        setattr(place, name, right)


def faults(want: dict[str, Outcome], want_rotary: dict[str, Outcome]) -> dict[str, dict[str, float]]:
    """Each fault on two ranks of CP against the right result on one process."""
    how, whole, packed = ways()["soft1"], batch(), documents()
    model, rotary = kit.elastic_model(), kit.elastic_model(positions="rope")
    run: Callable[..., Outcome] = lambda **extra: distilled(model, kit.FAMILY, how, whole, **extra)  # noqa: E731
    right = run()
    found = {"none": distance(right, want["one/soft1"])}
    mine = {axis: leaf.grad.clone() for axis, leaf in how["probabilities"].items()}
    found["one rank's share of the router's gradient"] = distance({**right, "leaves": mine}, want["one/soft1"])
    with replaced(context_parallel, "slices_of_rank", lambda group: (2 * group.rank(), 2 * group.rank() + 1)):
        found["order of the queries"] = distance(run(), want["one/soft1"])
    with replaced(context_parallel, "_undo_attention_load_balancing", lambda x, size: x):
        found["order of the keys"] = distance(run(), want["one/soft1"])
    with replaced(mamba_context_parallel, "_undo_attention_load_balancing", lambda x, size, packed: x):
        found["order of the scan"] = distance(run(), want["one/soft1"])
    table = rotary.rotary_pos_emb
    with replaced(table, "forward", lambda length: table.get_emb(length // 2)):
        found["positions"] = distance(distilled(rotary, kit.FAMILY, how, whole), want_rotary["one/soft1"])
    found["documents"] = distance(run(), want["packed/soft1"])
    for name, settings in {"": {}, " recomputed": RECOMPUTE["core"]}.items():
        counted = mock.Mock(wraps=context_parallel.causal_attention)
        with replaced(context_parallel, "causal_attention", counted):
            distilled(kit.elastic_model(**settings), kit.FAMILY, how, whole)
        found[f"attention calls{name}"] = {"number": counted.call_count}
    in_ranks_order = torch.cat([packed.chunk(4, 1)[number] for number in (0, 3, 1, 2)], 1)
    found["order of the documents"] = distance(run(documents=in_ranks_order), want["packed/soft1"])
    return found


def each_document_alone(model: Any, how: dict[str, Any], whole: dict[str, Tensor]) -> Outcome:
    """The sum over separate runs of every document."""
    parts = []
    for row, ends in enumerate(ENDS):
        for start, end in zip((0, *ends), ends, strict=False):
            text = {name: value[row : row + 1, start:end] for name, value in whole.items()}
            parts.append(distilled(model, kit.FAMILY, how, text))
    total: Outcome = {"loss": sum(part["loss"] for part in parts)}
    for kind in ("grads", "leaves"):
        total[kind] = {name: sum(part[kind][name] for part in parts) for name in parts[0][kind]}
    return total


def packing(model: Any, outcomes: dict[str, Outcome]) -> dict[str, dict[str, float]]:
    """Packed documents on one process against each of them alone."""
    found = {}
    for name in ("sliced2", "soft1"):
        want = each_document_alone(model, ways()[name], batch())
        found[name] = distance(outcomes[f"packed/{name}"], want)
        found[f"fault/{name}"] = distance(outcomes[f"one/{name}"], want)
    return found


def first_row(model: Any, **extra: Any) -> Outcome:
    """The first row of the batch, sliced."""
    row = {name: value[:1] for name, value in batch().items()}
    return distilled(model, kit.FAMILY, {"selection": SELECTIONS[1]}, row, **extra)


def packed_sequences() -> PackedSeqParams:
    """The first row's documents in Megatron's terms; what follows the last end is a document too."""
    ends = torch.tensor((0, *ENDS[0][:-1]), dtype=torch.int32)
    return PackedSeqParams(qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends)


def refusals(model: Any) -> dict[str, float]:
    """1 for each wrong argument that is refused by name."""
    wrong: dict[str, dict[str, Any]] = {
        "pass one of the two": {"documents": documents()[:1], "packed_seq_params": packed_sequences()},
        "documents has the shape [1, 71] for a batch of 1 x 72 tokens": {"documents": documents()[:1, 1:]},
        "attention is causal": {"attention_mask": torch.zeros(1, 1, LENGTH, LENGTH, dtype=torch.bool)},
    }
    found = dict.fromkeys(wrong, 0.0)
    for text, extra in wrong.items():
        try:
            first_row(model, **extra)
        except ValueError as error:
            found[text] = float(text in str(error))
    return found


def core_documents() -> dict[str, Any]:
    """The documents as core's own layers carry them."""
    return {"packed_seq_params": packed_documents(documents())}


def stock(positions: str) -> Any:
    """The plain model on core's own layers, which trains the parent and is the oracle of the elastic one."""
    model = kit.stock_model(kit.SHAPE, positions=positions)
    kit.set_weights(model, kit.FAMILY.layout, kit.full_weights(kit.FAMILY.layout))
    return model


def run_all() -> dict[str, dict[str, float]]:
    """Group of cases / case -> quantity -> worst error over the ranks.

    All that runs on one layout runs together: gloo keeps the threads of every group that was ever made.
    """
    results: dict[str, dict[str, float]] = {}

    def add(group: str, errors: dict[str, dict[str, float]]) -> None:
        results.update({f"{group}/{case}": each for case, each in errors.items()})

    kit.layout_of_ranks()
    want, plain, want_row = {}, {}, {}
    for positions in ("none", "rope"):
        model = kit.elastic_model(positions=positions)
        want[positions] = outcomes(model, kit.FAMILY, EVERY if positions == "none" else BOTH)
        add(f"packing/{positions}", packing(model, want[positions]))
        plain[positions] = labelled(model, batch(), documents=documents())
        add(f"plain/tp1_cp1/{positions}", {
            "stock": distance(labelled(stock(positions), batch(), **core_documents()), plain[positions])
        })  # fmt: skip
        want_row[positions] = first_row(model, documents=documents()[:1])
        row = first_row(model, packed_seq_params=packed_sequences())
        add(f"cu_seqlens/{positions}", {"cp1": distance(row, want_row[positions])})
    add("arguments", {"refused": refusals(model)})
    want["one_group"] = outcomes(kit.elastic_model(family=ONE_GROUP), ONE_GROUP, PACKED)
    for (tp, cp), cases in CASES.items():
        kit.layout_of_ranks(tp, cp=cp)
        for case, settings in cases.items():
            family = settings.get("family", kit.FAMILY)
            key = "one_group" if family is ONE_GROUP else settings.get("positions", "none")
            got = outcomes(kit.elastic_model(**settings), family, WHICH.get(case, PACKED))
            add(case, compared(got, want[key]))
        for positions in ("none", "rope"):
            model = kit.elastic_model(positions=positions)
            add(f"plain/tp{tp}_cp{cp}/{positions}", {
                "stock": distance(labelled(stock(positions), batch(), **core_documents()), plain[positions]),
                "elastic": distance(labelled(model, batch(), documents=documents()), plain[positions]),
            })  # fmt: skip
        if (tp, cp) == (1, 2):
            add("fault", faults(want["none"], want["rope"]))
            row = first_row(model, packed_seq_params=packed_sequences())
            add(f"cu_seqlens/{positions}", {"cp2": distance(row, want_row[positions])})
            without = labelled(stock(positions), batch())
            add("fault", {"documents on the stock stack": distance(without, plain[positions])})
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, results)
    return {case: {k: max(one[case][k] for one in everyone) for k in errors} for case, errors in results.items()}
