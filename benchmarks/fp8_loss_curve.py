"""Loss curves in FP8 against bf16: the same text, the same steps, a small hybrid model.

    python benchmarks/fp8_loss_curve.py [--json] [--steps 200] [--recipe tensorwise|blockwise] [--folder FOLDER]

Three curves, each by Megatron's own training through this package's commands: the parent's cross entropy; and of a
family of that parent (trained in bf16) the distillation losses of its full and its half budget, at given sizes (a
router may choose others in another precision), with a teacher in bf16. On a machine with Transformer Engine FP8 is
Transformer Engine's, else this package's reference. What is printed are relative differences of curves smoothed over 20
steps.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from megatron_elastic.backend import available_backend  # noqa: E402
from megatron_elastic.corpus import build_corpus  # noqa: E402
from megatron_elastic.report.events import Curve, read_scalars  # noqa: E402

SMOOTHED = 20
"""Steps that a point of a smoothed curve is the mean of."""
MEGATRON: dict[str, Any] = {
    "hybrid-layer-pattern": "M-*-M-", "hidden-size": 128, "ffn-hidden-size": 256, "num-attention-heads": 8,
    "group-query-attention": True, "num-query-groups": 4, "kv-channels": 16, "mamba-num-heads": 16,
    "mamba-head-dim": 16, "mamba-num-groups": 2, "mamba-state-dim": 16, "vocab-size": 1024,
    "tokenizer-type": "HuggingFaceTokenizer", "tokenizer-model": "corpus/tokenizer", "squared-relu": True,
    "normalization": "RMSNorm", "position-embedding-type": "none", "untie-embeddings-and-output-weights": True,
    "disable-bias-linear": True, "hidden-dropout": 0.0, "attention-dropout": 0.0, "calculate-per-token-loss": True,
    "bf16": True, "seed": 1234, "lr": 1.0e-3, "min-lr": 1.0e-4, "lr-decay-style": "cosine", "lr-warmup-iters": 10,
    "weight-decay": 0.1, "adam-beta2": 0.95, "clip-grad": 1.0, "log-interval": 1,
}  # fmt: skip
BATCH = {"sequence_length": 128, "global_batch_size": 8, "micro_batch_size": 8}
ELASTIC: dict[str, Any] = {
    "parent": "parent-bf16", "train_data": "corpus/train", "validation_data": "corpus/validation",
    "axes": {
        "hidden": [128, 112, 96, 80], "ffn": [256, 128], "mamba_head_dim": [16, 12, 8], "attention_heads": [8, 4],
    },
    "budgets": [{"name": "whole", "fraction": 1.0}, {"name": "half", "fraction": 0.55}],
    "selections": {"whole": {}, "half": {"hidden": 96, "ffn": 128, "mamba_head_dim": 12, "attention_heads": 4}},
}  # fmt: skip


def recipe(precision: str, scaling: str, steps: int) -> dict[str, Any]:
    """The recipe of one precision; everything else is equal."""
    fp8 = {"fp8-format": "hybrid", "fp8-recipe": scaling} if precision == "fp8" else {}
    stage = {"iterations": steps, **BATCH, "weights": [0.5, 0.5]}
    return {
        "megatron": {**MEGATRON, **fp8},
        "pretrain": {
            "save": f"parent-{precision}",
            "iterations": steps,
            **BATCH,
            "megatron": {"lr": 4.0e-3, "min-lr": 4.0e-4},
        },
        "elastic": {
            **ELASTIC,
            "save": f"family-{precision}",
            "stages": [stage],
            "save_interval": steps,
            "evaluation": {"interval": steps, "iterations": 1},
        },
    }


def run(folder: Path, command: str, precision: str) -> Mapping[str, Curve]:
    """One training, and its scalars."""
    words = [sys.executable, "-m", "megatron_elastic", command, f"{precision}.yaml", "--ranks", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(words, cwd=folder, check=True, stdout=sys.stderr, env=environment)
    name = "parent" if command == "pretrain" else "family"
    return read_scalars(folder / f"{name}-{precision}" / "tensorboard")


def difference(curve: Curve, of: Curve) -> dict[str, float]:
    """How far a smoothed curve is from another one, relative to that one, where the mean is over whole windows."""
    assert curve.steps == of.steps
    pairs = list(zip(curve.smoothed(SMOOTHED).values, of.smoothed(SMOOTHED).values, strict=True))[SMOOTHED - 1 :]
    relative = [(one - other) / other for one, other in pairs]
    return {
        "last": relative[-1],
        "largest": max(map(abs, relative)),
        "mean": sum(map(abs, relative)) / len(relative),
        "loss": pairs[-1][0],
        "loss_bf16": pairs[-1][1],
    }


def measure(folder: Path, scaling: str, steps: int) -> dict[str, Any]:
    """Trains everything in a folder.

    Returns:
        Of each curve the relative difference from bf16 at the end, the largest and the mean, and both losses.
    """
    text = Path(asyncio.__file__).parent
    build_corpus(folder / "corpus", text=text, vocab_size=MEGATRON["vocab-size"], validation_fraction=0.1)
    curves: dict[str, dict[str, Mapping[str, Curve]]] = {}
    for precision in ("bf16", "fp8"):
        (folder / f"{precision}.yaml").write_text(yaml.safe_dump(recipe(precision, scaling, steps)))
        curves[precision] = {command: run(folder, command, precision) for command in ("pretrain", "train")}
    found: dict[str, Any] = {
        "steps": steps,
        "recipe": scaling,
        "backend": available_backend(MEGATRON, cuda=torch.cuda.is_available()),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }
    for command, name in (("pretrain", "lm loss"), ("train", "kd whole"), ("train", "kd half")):
        found[name] = difference(curves["fp8"][command][name], curves["bf16"][command][name])
    return found


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="machine-readable output")
    parser.add_argument("--steps", type=int, default=200, help="of each training (default: 200)")
    parser.add_argument("--recipe", default="tensorwise", choices=["tensorwise", "blockwise"])
    parser.add_argument("--folder", type=Path, help="keep everything here (default: a temporary folder)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        found = measure(folder, arguments.recipe, arguments.steps)
    if arguments.json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        print(f"{name}: {value}")


if __name__ == "__main__":
    main()
