"""A tiny elastic run in a folder: a random parent, text of drawn words, PP=2, wandb offline."""

import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from megatron_elastic.checkpoint import find_checkpoint, read_tensor, tensor_names
from megatron_elastic.corpus import build_corpus
from megatron_elastic.layout import Layout, ModelShape
from tests.unit import small_parent

ROOT = Path(__file__).resolve().parents[2]
VOCABULARY = 512
MEGATRON: dict[str, Any] = {
    "hybrid-layer-pattern": "M-|*-", "hidden-size": 32, "ffn-hidden-size": 64, "num-attention-heads": 4,
    "group-query-attention": True, "num-query-groups": 2, "kv-channels": 8, "mamba-num-heads": 4, "mamba-head-dim": 8,
    "mamba-num-groups": 2, "mamba-state-dim": 8, "vocab-size": VOCABULARY, "tokenizer-type": "HuggingFaceTokenizer",
    "tokenizer-model": "corpus/tokenizer", "squared-relu": True, "normalization": "RMSNorm",
    "position-embedding-type": "none", "untie-embeddings-and-output-weights": True, "disable-bias-linear": True,
    "hidden-dropout": 0.0, "attention-dropout": 0.0, "calculate-per-token-loss": True,
    "pipeline-model-parallel-size": 2,
    "lr": 1e-3, "min-lr": 1e-4, "lr-decay-style": "cosine", "clip-grad": 1.0, "log-interval": 1, "seed": 5,
    "wandb-project": "elastic-test", "wandb-exp-name": "small", "wandb-save-dir": "wandb-logs",
}  # fmt: skip
STAGE = {"micro_batch_size": 2, "global_batch_size": 4, "weights": [0.6, 0.4]}
ELASTIC: dict[str, Any] = {
    "parent": "sorted", "save": "family", "train_data": "corpus/train", "validation_data": "corpus/validation",
    "ffn_blocks": 4, "save_interval": 1, "evaluation": {"interval": 2, "iterations": 1},
    "axes": {"hidden": [32, 24, 20, 16], "ffn": [64, 48, 32], "mamba_heads": [4, 2], "attention_heads": [4, 2]},
    "budgets": [{"name": "whole", "fraction": 1.0}, {"name": "half", "fraction": 0.55}],
    "stages": [
        {"iterations": 3, "sequence_length": 32, **STAGE}, {"iterations": 2, "sequence_length": 64, **STAGE},
    ],
}  # fmt: skip
SHAPE = ModelShape(
    pattern="M-*-", vocab=VOCABULARY, hidden=32, ffn=64, attention_heads=4, query_groups=2, head_dim=8,
    mamba_heads=4, mamba_head_dim=8, mamba_groups=2, mamba_state=8,
)  # fmt: skip


WITHOUT_WANDB = {flag: None for flag in MEGATRON if flag.startswith("wandb")}
"""For `write_recipe`: wandb starts a service of its own, which outlives a killed rank."""


def prepare(
    folder: Path, megatron: dict[str, Any] | None = None, *, words_per_document: int = 400, scale: float = 0.05,
    **elastic: Any,
) -> None:  # fmt: skip
    """Text, a random parent and the recipe."""
    write_text(folder / "text", words_per_document)
    build_corpus(folder / "corpus", text=folder / "text", vocab_size=VOCABULARY, validation_fraction=0.2)
    write_parent(folder / "sorted", seed=1, scale=scale)
    write_recipe(folder, megatron, **elastic)


def write_text(folder: Path, words_per_document: int) -> None:
    """Documents of words drawn from a Zipf-like law: the same text for ever, whatever becomes of this repository."""
    draw = random.Random(0)
    words = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(1, 8))) for _ in range(500)]
    weights = [1 / (rank + 1) for rank in range(len(words))]
    folder.mkdir(parents=True)
    for document in range(40_000 // words_per_document):
        (folder / f"{document:05d}.txt").write_text(" ".join(draw.choices(words, weights, k=words_per_document)))


def write_parent(folder: Path, seed: int, scale: float = 0.05, shape: ModelShape = SHAPE) -> None:
    """A parent with random weights, of this standard deviation."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    layout = Layout(shape, 4)
    for name, dimensions in layout.parameters().items():
        size = [dimension.size for dimension in dimensions]
        positive = any(part in name for part in ("norm", "A_log", "dt_bias", "mixer.D"))
        weights[name] = torch.ones(size) if positive else torch.randn(size, generator=generator) * scale
    small_parent.write(folder, weights, layout=layout)


def write_recipe(folder: Path, megatron: dict[str, Any] | None = None, **elastic: Any) -> None:
    """The recipe, with flags of Megatron (None removes one) and keys of the elastic section on top."""
    flags = {flag: value for flag, value in {**MEGATRON, **(megatron or {})}.items() if value is not None}
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"megatron": flags, "elastic": {**ELASTIC, **elastic}}))


def state(folder: Path, iteration: int | None = None) -> dict[str, torch.Tensor]:
    """Everything in the newest (or the given) checkpoint of the family but random number states.

    Weights, the router, the description, and both optimizers.
    """
    name = "family" if iteration is None else f"family/iter_{iteration:07d}"
    path = find_checkpoint(folder / name)
    return {name: read_tensor(path, name) for name in tensor_names(path) if "rng" not in name}


def different(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    """Names whose tensors are not equal bit for bit, or that only one side has."""
    both = set(one) & set(other)
    found = [name for name in both if one[name].dtype != other[name].dtype or not torch.equal(one[name], other[name])]
    return sorted({*found, *(set(one) ^ set(other))})


def train(folder: Path, *, launcher: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    """`megatron-elastic train recipe.yaml` on two CPU ranks; `launcher` starts them in this program's stead."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        environment.pop(name, None)
    command = [sys.executable, *launcher, "-m", "megatron_elastic", "train", "recipe.yaml", "--ranks", "2"]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=1500, check=False
    )
