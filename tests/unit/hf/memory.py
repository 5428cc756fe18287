"""Measures the memory that import and export take; run by test_memory.py in a process of its own."""

import functools
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from megatron_elastic.checkpoint import LazyTensor
from megatron_elastic.hf.config import read_config
from megatron_elastic.hf.exporting import export_model
from megatron_elastic.hf.importing import import_model
from megatron_elastic.hf.names import parameters
from megatron_elastic.hf.tensors import read_folder, write_folder
from tests.unit.extraction_memory import peak
from tests.unit.hf.folders import MOE


def write(folder: Path, size: int) -> dict[str, Any]:
    """A model whose largest parameters are experts, a QKV weight and an embedding of about `1024 * size` numbers."""
    config = {
        **MOE, "hybrid_override_pattern": "EM*", "hidden_size": 512, "vocab_size": 2 * size, "n_routed_experts": 8,
        "moe_intermediate_size": size // 4, "moe_shared_expert_intermediate_size": 16, "head_dim": size // 6,
    }  # fmt: skip
    folder.mkdir()
    made = [parameter for parameter in parameters(read_config(config).shape)]
    pieces = [piece for parameter in made for piece in parameter.pieces]
    lazy = {
        p.name: LazyTensor(p.shape, torch.float32, lambda shape=p.shape: torch.full(shape, 1.0))  # type: ignore[misc]
        for p in pieces
    }
    write_folder(folder, lazy, 10**8)
    (folder / "config.json").write_text(json.dumps(config))
    sizes = {parameter.stock: torch.Size(parameter.shape).numel() * 4 for parameter in made}
    return {"largest": max(sizes.values())}


def main() -> None:
    """Prints what was measured: name -> bytes, and `largest`, the bytes of the largest parameter."""
    with tempfile.TemporaryDirectory(dir=sys.argv[2]) as folder:
        root = Path(folder)
        write(root / "tiny", 96)
        import_model(root / "tiny", root / "tiny-in")  # what is imported and made once is no peak
        export_model(root / "tiny-in", root / "tiny-out")
        found = write(root / "hf", int(sys.argv[1]))
        found["import"] = peak(functools.partial(import_model, root / "hf", root / "in"))
        found["export"] = peak(functools.partial(export_model, root / "in", root / "out"))
        found["whole model"] = peak(lambda: [entry.read() for entry in read_folder(root / "hf").values()])
    print(json.dumps(found))


if __name__ == "__main__":
    main()
