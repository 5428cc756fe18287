"""What the GPU benchmarks share: their options, the models' settings, the clock, and the peaks of the cards.

A parent of 2.3 billion parameters (`models.GPU_SHAPE`: hidden 4096, V = 131072) in bf16, or with FP8 linears, on one
GPU.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

LOCAL, TRANSFORMER_ENGINE = "local", "transformer_engine"
PEAK_FLOPS: Mapping[str, float] = {"H100": 989e12, "H200": 989e12, "GH200": 989e12, "A100": 312e12, "B200": 2250e12}
"""Part of a card's name -> its dense bf16 FLOP/s, without sparsity, of the SXM form (NVIDIA's data sheets)."""
SMOKE_TOKENS = 64


@dataclass(frozen=True)
class Setting:
    """What runs.

    Attributes:
        shape: of the parent.
        tokens: of a sequence; a batch has one.
        config: changes to Megatron's config.
        layers: fields of `ElasticModelConfig`.
        stack: spec of the stock model's layers.
        facts: all of it, to print with the numbers.
    """

    shape: Any
    tokens: int
    config: Mapping[str, Any]
    layers: Mapping[str, Any]
    stack: Any
    facts: Mapping[str, Any]


def parser(text: str | None) -> argparse.ArgumentParser:
    """The options that all have."""
    made = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--json", action="store_true", help="one JSON object on one line")
    made.add_argument("--tokens", type=int, default=4096, help="of a sequence; a step has one")
    made.add_argument("--repeats", type=int, default=10, help="turns, after two that warm up")
    made.add_argument("--fp8", choices=("tensorwise", "blockwise"), help="FP8 linears, with this recipe of Megatron's")
    made.add_argument("--backend", choices=(LOCAL, TRANSFORMER_ENGINE), help="default: Transformer Engine's layers")
    made.add_argument("--smoke", action="store_true", help="tiny shapes on the CPU: whether it runs, no numbers")
    return made


def start(asked: argparse.Namespace) -> None:
    """Makes the process ready for one card; ends it with status 2 where there is none."""
    import torch

    if asked.smoke:
        if torch.cuda.is_available():
            sys.exit("--smoke runs on the CPU: hide the GPUs with CUDA_VISIBLE_DEVICES=")
        from megatron_elastic.cpu import adaptation

        adaptation.install()
        torch.set_num_threads(1)
        asked.tokens, asked.repeats = SMOKE_TOKENS, 1
    elif not torch.cuda.is_available():
        print("this benchmark needs a CUDA device, and there is none; --smoke runs tiny shapes here", file=sys.stderr)
        sys.exit(2)


def prepare(asked: argparse.Namespace) -> Setting:
    """Megatron's groups of one rank, and what the models are built with."""
    import torch

    start(asked)
    from benchmarks import models
    from megatron_elastic.layers.plain import plain_stack_spec

    models.start()
    backend = asked.backend or (LOCAL if asked.smoke else TRANSFORMER_ENGINE)
    shape = models.SMALL_SHAPE if asked.smoke else models.GPU_SHAPE
    config: dict[str, Any] = {"params_dtype": torch.bfloat16, "pipeline_dtype": torch.bfloat16, "bf16": True}
    layers: dict[str, Any] = {}
    stack = plain_stack_spec
    if backend == TRANSFORMER_ENGINE:
        from megatron_elastic.specs import plain_spec

        layers["backend"], stack = backend, plain_spec(backend)
    if asked.fp8:
        from megatron_elastic.precision import Precision, Scaling

        layers["precision"] = Precision(Scaling("hybrid", asked.fp8))
        if backend == TRANSFORMER_ENGINE:
            config |= {"fp8": "hybrid", "fp8_recipe": asked.fp8}
    facts = {
        "card": card(),
        "backend": backend,
        "precision": f"fp8 {asked.fp8}" if asked.fp8 else "bf16",
        "hidden": shape.hidden,
        "tokens": asked.tokens,
        "forward_flops": {
            f"{share:g}": round(models.share_of_flops(models.selection(share, shape), shape, asked.tokens), 4)
            for share in models.SIZES
        },
    }
    return Setting(shape, asked.tokens, config, layers, stack, facts)


def card() -> str:
    """The GPU's name, or what runs instead."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU, smoke test: the numbers say nothing"


def peak_flops() -> float | None:
    """The card's dense bf16 FLOP/s; None for one that the table does not have."""
    return next((peak for name, peak in PEAK_FLOPS.items() if name in card()), None)


def seconds(todo: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Time of every step in each turn, by the GPU's clock; in turns, so that what heats the card meets all alike."""
    import torch

    found: dict[str, list[float]] = {name: [] for name in todo}
    for turn in range(repeats + 2):
        for name, step in todo.items():
            if torch.cuda.is_available():
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                step()
                end.record()
                torch.cuda.synchronize()
                passed = begin.elapsed_time(end) / 1e3
            else:
                before = time.perf_counter()
                step()
                passed = time.perf_counter() - before
            if turn > 1:
                found[name].append(passed)
    return found


def show(asked: argparse.Namespace, found: Mapping[str, Any]) -> None:
    """Prints the numbers."""
    if asked.json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        print(f"{name:<44} {value:.4g}" if isinstance(value, float) else f"{name:<44} {value}")
