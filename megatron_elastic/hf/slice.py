"""Cuts one model out of this folder, which holds a whole family of them: `python slice.py --budget NAME --out DIR`.

The weights in this folder are those of the largest model; every smaller one is a part of them. `elastic.json` says
which rows of which tensor. Nothing is trained and nothing is downloaded. Needs torch and safetensors.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
DESCRIPTION, CONFIG = "elastic.json", "config.json"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def places() -> dict[str, str]:
    """Every tensor's file."""
    from safetensors import safe_open

    if (HERE / INDEX).exists():
        found: dict[str, str] = json.loads((HERE / INDEX).read_text())["weight_map"]
        return found
    with safe_open(HERE / SINGLE, "pt") as file:
        return dict.fromkeys(file.keys(), SINGLE)


def cut(tensor: Any, keep: list[int | None], ranges: list[list[list[int]]]) -> Any:
    """The rows of a tensor that are kept along each dimension."""
    import torch

    for dimension, number in enumerate(keep):
        if number is not None:
            parts = [tensor.narrow(dimension, start, stop - start) for start, stop in ranges[number]]
            tensor = torch.cat(parts, dimension)
    return tensor.contiguous()


def tensors(rules: list[dict[str, Any]], ranges: list[list[list[int]]]) -> Iterator[tuple[str, Any]]:
    """Name and value of every tensor of the smaller model, one in memory at a time."""
    from safetensors import safe_open

    files = places()
    for rule in rules:
        for new, old in enumerate(rule.get("experts", [0])):
            name = rule["from"].replace("*", str(old))
            with safe_open(HERE / files[name], "pt") as file:
                yield rule["to"].replace("*", str(new)), cut(file.get_tensor(name), rule["keep"], ranges)


def write(out: Path, budget: dict[str, Any], ranges: list[list[list[int]]], shard_bytes: int) -> None:
    """Writes shards as they fill up, then gives them their final names."""
    from safetensors.torch import save_file

    shards: list[list[str]] = []
    shard: dict[str, Any] = {}
    used = total = 0

    def flush() -> None:
        save_file(shard, out / f"{len(shards)}.part", {"format": "pt"})
        shards.append(list(shard))
        shard.clear()

    for name, value in tensors(budget["tensors"], ranges):
        if shard and used + value.nbytes > shard_bytes:
            flush()
            used = 0
        shard[name] = value
        used += value.nbytes
        total += value.nbytes
    flush()
    names = (
        [SINGLE]
        if len(shards) == 1
        else [f"model-{n + 1:05d}-of-{len(shards):05d}.safetensors" for n in range(len(shards))]
    )
    for number, name in enumerate(names):
        (out / f"{number}.part").rename(out / name)
    if len(shards) > 1:
        weights = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
        (out / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weights}, indent=2))
    (out / CONFIG).write_text(json.dumps(budget["config"], indent=2) + "\n")
    own = {CONFIG, INDEX, DESCRIPTION}
    for path in HERE.rglob("*"):
        place = path.relative_to(HERE)
        if path.is_file() and path.suffix not in (".safetensors", ".py") and str(place) not in own:
            (out / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, out / place)


def main() -> int:
    """Reads the command line and cuts."""
    family = json.loads((HERE / DESCRIPTION).read_text())
    budgets = family["budgets"]
    sizes = "; ".join(f"{name}: {each['parameters'] / 1e9:.2f}B parameters" for name, each in budgets.items())
    parser = argparse.ArgumentParser(description=f"Cuts one model out of this folder. Budgets: {sizes}.")
    parser.add_argument("--budget", required=True, choices=list(budgets), help="which model")
    parser.add_argument("--out", required=True, type=Path, help="folder to write; must not exist")
    parser.add_argument("--shard-gb", type=float, default=5.0, help="the most that one file holds, in GB (default: 5)")
    arguments = parser.parse_args()
    if arguments.out.exists():
        sys.stderr.write(f"{arguments.out} exists already: remove it, or choose another folder\n")
        return 1
    partial = arguments.out.with_name(f".{arguments.out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        write(partial, budgets[arguments.budget], family["ranges"], int(arguments.shard_gb * 1e9))
        partial.rename(arguments.out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
