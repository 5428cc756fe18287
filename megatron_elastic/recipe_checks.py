"""What a checked recipe would do on GPUs: FP8, expert-parallel layout, memory of each GPU, steps and tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

from megatron_elastic.config import Recipe
from megatron_elastic.cost_model import training_flops_per_token
from megatron_elastic.curriculum import Stage
from megatron_elastic.errors import RecipeError
from megatron_elastic.flags import padded_vocabulary
from megatron_elastic.hf.config import export_warnings
from megatron_elastic.layout import BUFFERS, ModelShape, layer_number
from megatron_elastic.ops.divergence import tensors_alive
from megatron_elastic.ops.fused_head import default_chunk_tokens
from megatron_elastic.parallel import Ranks, ranks_of
from megatron_elastic.precision import QUANTISED
from megatron_elastic.tiles import BLOCKS, TILES, tile_faults

GPU_BYTES = 80 * 2**30
"""An H100's."""
RESERVED = 6 * 2**30
"""Allowed for the CUDA context, NCCL's buffers, kernels' workspaces and the allocator's gaps; not measured."""


def fp8_warnings(recipe: Recipe, ranks: Ranks) -> list[str]:
    """What FP8 would not take (a recipe that asks for it has none of that), or takes with the blocks of one layout."""
    flags, family = recipe.megatron, recipe.family
    given = family.shape, family.orders, family.choices, ranks
    if not flags.get("fp8-format"):
        return [f"FP8 would refuse {axis}: {what}" for axis, what in tile_faults(*given, TILES["tensorwise"])]
    found = []
    if flags.get("fp8-recipe") == "blockwise":
        found = [
            f"{axis}: a rank's last blocks of FP8 are smaller, and another tensor-parallel size has others: {what}"
            for axis, what in tile_faults(*given, BLOCKS)
        ]
    if flags.get("transformer-impl") == "local":
        found.append("FP8 on the local backend is a reference in torch: it saves neither time nor memory")
    return found


def layout_faults(recipe: Recipe, ranks: Ranks, gpus: int) -> list[str]:
    """What is wrong with the layout of experts and of the pipeline; the rest is checked with the recipe."""
    found = []
    pp = ranks.copy // (ranks.tp * ranks.cp)
    if "E" in recipe.family.shape.pattern and gpus % (pp * ranks.ep * ranks.etp):
        found.append(
            f"megatron.expert-model-parallel-size: EP x expert TP x PP = {ranks.ep} x {ranks.etp} x {pp} does not "
            f"divide the {gpus} GPU(s)"
        )
    segments, layers = str(recipe.megatron["hybrid-layer-pattern"]).count("|") + 1, len(recipe.family.shape.pattern)
    if segments > 1 and segments % pp:
        found.append(
            f"megatron.hybrid-layer-pattern: {segments} segments are no multiple of the {pp} pipeline stage(s)"
        )
    if segments == 1 and layers % pp and "decoder-first-pipeline-num-layers" not in recipe.megatron:
        found.append(
            f"megatron.pipeline-model-parallel-size: {layers} layers do not divide over {pp} stages: mark the stages "
            "with | in hybrid-layer-pattern"
        )
    return found


def pipeline(recipe: Recipe, pp: int) -> list[list[int]]:
    """The layers of each pipeline stage, by number."""
    segments = str(recipe.megatron["hybrid-layer-pattern"]).split("|")
    if len(segments) == 1:
        each = -(-len(segments[0]) // pp)
        segments = [segments[0][start : start + each] for start in range(0, len(segments[0]), each)]
    stages: list[list[int]] = [[] for _ in range(pp)]
    start = 0
    for number, segment in enumerate(segments):
        stages[number % pp].extend(range(start, start + len(segment)))
        start += len(segment)
    return stages


def rank_parameters(recipe: Recipe, ranks: Ranks, layers: Sequence[int], *, first: bool, last: bool) -> tuple[int, int]:
    """Parameters of the parent on one rank of a pipeline stage: those of experts, and all others."""
    worlds = {"": 1, "tp": ranks.tp, "ep": ranks.ep, "etp": ranks.etp}
    experts = others = 0
    for name, dimensions in recipe.family.layout.parameters().items():
        number = layer_number(name)
        here = number in layers if number is not None else (first if name.startswith("embedding") else last)
        if here and not name.endswith(BUFFERS):
            count = prod(dimension.size // worlds[dimension.sharded] for dimension in dimensions)
            if ".experts." in name:
                experts += count
            else:
                others += count
    return experts, others


def saved_per_token(shape: ModelShape, kind: str, ranks: Ranks, sequence_parallel: bool) -> float:
    """Elements that one layer keeps of a token for its backward, on one rank, at full width without recompute.

    Inputs of norms and GEMMs and of what stands between them; attention keeps no scores, the scan no states of single
    tokens. A sum over the tensors that the formulas need, not a measurement.
    """
    hidden = shape.hidden / (ranks.tp if sequence_parallel else 1)
    full: Mapping[str, int] = shape.full
    outer = 2 * hidden  # the residual and its norm's output
    if kind == "M":
        inner = full["mamba_heads"] * shape.mamba_head_dim
        states = 2 * shape.mamba_groups * shape.mamba_state
        # in_proj's output, the convolution's, the scan's, the gated norm's
        return outer + (2 * inner + states + full["mamba_heads"] + inner + states + 2 * inner) / ranks.tp
    if kind == "*":
        query = full["attention_heads"] * shape.head_dim
        return outer + (2 * query + 2 * shape.query_groups * shape.head_dim) / ranks.tp
    inputs = 3 if shape.gated else 2  # what fc1 returns, and the activation
    if kind == "-":
        return outer + inputs * full["ffn"] / ranks.tp
    routed = shape.top_k * (2 * shape.hidden + inputs * full["expert_ffn"] / ranks.etp)
    return outer + 2 * full["experts"] + routed + inputs * shape.shared_expert_ffn / ranks.tp


def _activations(recipe: Recipe, ranks: Ranks, layers: Sequence[int], stage: Stage, in_flight: float) -> float:
    """Bytes of one pipeline stage's activations, all microbatches in flight together."""
    flags, shape = recipe.megatron, recipe.family.shape
    parallel = bool(flags.get("sequence-parallel"))
    tokens = stage.micro_batch_size * stage.sequence_length / ranks.cp
    each = [2 * tokens * saved_per_token(shape, shape.pattern[number], ranks, parallel) for number in layers]
    if flags.get("recompute-granularity") != "full":
        return in_flight * sum(each)
    # Every chunk of layers keeps its input; one chunk at a time is there in full while it is run again.
    chunk = int(flags.get("recompute-num-layers", 1))
    chunks = -(-len(layers) // chunk)
    if flags.get("recompute-method") == "block":  # the first layers alone are run again
        kept = each[chunk:]
        inputs, largest = min(chunk, len(each)), max(each[:chunk], default=0.0)
    else:
        kept, inputs = [], chunks
        largest = max((sum(each[start : start + chunk]) for start in range(0, len(each), chunk)), default=0.0)
    hidden = 2 * tokens * shape.hidden / (ranks.tp if parallel else 1)
    return in_flight * (inputs * hidden + sum(kept)) + largest


def _loss(recipe: Recipe, ranks: Ranks, stage: Stage) -> float:
    """Bytes of the KD loss on the last stage: the teacher's hidden states, and a chunk of logits.

    Of a chunk there are the student's and the teacher's logits in bf16, and in fp32 one tensor more than the loss works
    on.
    """
    tokens = stage.micro_batch_size * stage.sequence_length // ranks.cp
    vocabulary = padded_vocabulary(recipe.megatron) // ranks.tp
    tensors = tensors_alive(recipe.loss)
    chunk = min(tokens, default_chunk_tokens(tokens, vocabulary, tensors))
    hidden = tokens * recipe.family.shape.hidden
    return 2 * hidden * 3 + chunk * vocabulary * (2 * 2 + 4 * (tensors + 1))


def _fp8_copies(recipe: Recipe, parameters: int) -> dict[str, float]:
    """Bytes of the weights' FP8 copies on a rank, at most: a byte in each of Hopper's two layouts, for a whole step.

    Each sliced budget has its own; while the router learns there is one for all. Embedding and LM head are counted too.
    """
    if recipe.precision is None:
        return {}
    copies = sum(budget.fraction for budget in recipe.family.budgets) + (recipe.teacher_precision == QUANTISED)
    return {"fp8": 2 * copies * parameters}


def gpu_memory(recipe: Recipe, ranks: Ranks, gpus: int) -> dict[str, int]:
    """Bytes of the fullest GPU while the router learns (full widths): an estimate, by what takes them.

    Weights and the teacher's in bf16 (fp32 without the flag), gradients in fp32 as Megatron accumulates them, Adam's
    moments and the fp32 copy of the weights, shared over data-parallel ranks by the distributed optimizer; activations
    of the microbatches that 1F1B keeps in flight on a stage; the loss's chunk on the last one; in FP8 the weights'
    copies.
    """
    flags = recipe.megatron
    pp = ranks.copy // (ranks.tp * ranks.cp)
    stages = pipeline(recipe, pp)
    cached = recipe.teacher_cache is not None and recipe.teacher_cache.mode == "read"
    virtual = max(1, (str(flags["hybrid-layer-pattern"]).count("|") + 1) // pp)
    width = 2 if flags.get("bf16") else 4
    replicas = gpus // (ranks.tp * pp)
    expert_replicas = max(1, gpus // (ranks.etp * ranks.ep * pp))
    best: dict[str, int] = {}
    for position, layers in enumerate(stages):
        first, last = position == 0, position == pp - 1
        experts, others = rank_parameters(recipe, ranks, layers, first=first, last=last)
        shared = bool(flags.get("use-distributed-optimizer"))
        states = experts / (expert_replicas if shared else 1) + others / (replicas if shared else 1)
        # 1F1B, and the interleaved schedule, of whose microbatches each holds one of `virtual` chunks of layers.
        warm_up = 2 * (pp - position - 1) + (virtual - 1) * pp
        in_flight = pp - position if virtual == 1 else (warm_up + 1) / virtual
        found = {
            "weights": width * (experts + others),
            "teacher": 0 if cached else width * (experts + others),
            "gradients": 4 * (experts + others),
            "optimizer": (8 + (4 if width == 2 else 0)) * states,
            "activations": max(_activations(recipe, ranks, layers, stage, in_flight) for stage in recipe.stages),
            "loss": max(_loss(recipe, ranks, stage) for stage in recipe.stages) if last else 0,
            "reserved": RESERVED,
            **_fp8_copies(recipe, experts + others),
        }
        rounded = {name: round(value) for name, value in found.items()}
        rounded["total"] = sum(rounded.values())
        if not best or rounded["total"] > best["total"]:
            best = rounded
    return best


def _stage_facts(recipe: Recipe, stage: Stage, data_parallel: int) -> dict[str, Any]:
    """Steps, tokens and work of one stage of the curriculum, each base token once."""
    shape, budgets = recipe.family.shape, len(recipe.family.budgets)
    tokens = stage.iterations * stage.global_batch_size * stage.sequence_length
    students = 1 if recipe.budget_mode == "sampled" else budgets
    training = training_flops_per_token(shape, shape.full, stage.sequence_length)
    cached = recipe.teacher_cache is not None and recipe.teacher_cache.mode == "read"
    return {
        "steps": stage.iterations,
        "sequence_length": stage.sequence_length,
        "global_batch_size": stage.global_batch_size,
        "microbatches": stage.global_batch_size // (stage.micro_batch_size * data_parallel) * recipe.roles,
        "tokens_a_step": stage.global_batch_size * stage.sequence_length,
        "tokens": tokens,
        # The teacher's forward is a third of one training pass; while the router learns all run at full width.
        "flops_at_full_width": round(tokens * training * (students + (0 if cached else 1 / 3))),
        "teacher_cache_bytes": 0 if recipe.teacher_cache is None else tokens * recipe.teacher_cache.bytes_per_token,
    }


def unloadable(recipe: Recipe) -> list[str]:
    """What `export` will say of the budgets: which stock engine loads them, where not all do."""
    family, found = recipe.family, dict[str, None]()
    for number, budget in enumerate(family.budgets):
        if recipe.selections:
            shape = recipe.selections[number].submodel(family.shape)
        else:
            # A router may choose differently for any layer.
            apart = [axis for axis in family.heterogeneous if len(family.choices[axis]) > 1 and budget.heterogeneous]
            different: dict[str, Any] = {axis: family.choices[axis][:2] for axis in apart if budget.fraction < 1.0}
            shape = replace(family.shape, **different)
        found.update((f"budget {budget.name}: {warning}", None) for warning in export_warnings(shape))
    return list(found)


def run_facts(recipe: Recipe, gpus: int | None = None) -> dict[str, Any]:
    """The run of a recipe: its layout, stages, memory of a GPU, and what a user should know before paying for it.

    Args:
        recipe: checked.
        gpus: of the run; None for the fewest that hold one copy of the model and of its experts.

    Returns:
        `run`, `stages`, `memory_per_gpu` (bytes, with their `total`) and `warnings`, for JSON.

    Raises:
        RecipeError: the layout does not fit the GPUs.
    """
    ranks = ranks_of(recipe.megatron, [])
    pp = ranks.copy // (ranks.tp * ranks.cp)
    if gpus is None:
        gpus = ranks.copy
        while "E" in recipe.family.shape.pattern and gpus % (pp * ranks.ep * ranks.etp):
            gpus += ranks.copy
    faults, warnings = layout_faults(recipe, ranks, gpus), list[str]()
    if faults:
        raise RecipeError(faults, recipe.source)
    warnings += fp8_warnings(recipe, ranks)
    memory = gpu_memory(recipe, ranks, gpus)
    if memory["total"] > GPU_BYTES:
        warnings.append(
            f"the fullest GPU needs about {memory['total'] / 2**30:.1f} GiB, more than an H100's 80 GiB: use more "
            "recompute, or larger TP, PP, CP or EP"
        )
    warnings += unloadable(recipe)
    data_parallel = gpus // ranks.copy
    if len(recipe.family.choices["depth"]) > 1 and not recipe.family.depth_ranking:
        warnings.append(
            "depth: which layers are left out is known when the parent is ranked (megatron-elastic rank), so the "
            "selections proposed here keep all of them"
        )
    return {
        "run": {
            "gpus": gpus,
            **{"TP": ranks.tp, "PP": pp, "CP": ranks.cp, "DP": data_parallel, "EP": ranks.ep, "expert_TP": ranks.etp},
            "steps": recipe.iterations,
            "tokens": recipe.base_tokens,
        },
        "stages": [_stage_facts(recipe, stage, data_parallel) for stage in recipe.stages],
        "memory_per_gpu": memory,
        "warnings": warnings,
    }
