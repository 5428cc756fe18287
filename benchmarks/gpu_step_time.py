"""Time of an elastic step on a GPU against the masked mode and against the stock model's plain step.

    python benchmarks/gpu_step_time.py [--json] [--fp8 RECIPE] [--tokens N] [--profile]

As benchmarks/step_time.py: forward and backward of the teacher once and every budget sliced; of the same budgets masked
with the teacher run for each; of the stock parent. `--profile` adds a table of GPU time by operation (on stderr), and
for each kind of sliced weight the time of its product when it is packed first, as it is here, and piece by piece.
"""

import sys
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import gpu_common, step_time
from megatron_elastic.ops.sliced_parameter import sliced_parameter

Ranges = tuple[tuple[int, int], ...]


def piece_by_piece(x: Tensor, weight: Tensor, rows: Ranges, columns: Ranges) -> Tensor:
    """`x` `[..., kept columns]` times the kept entries of a weight without joining them first."""
    parts, total = x.split([stop - start for start, stop in columns], -1), None
    for part, (start, stop) in zip(parts, columns, strict=True):
        made = torch.cat([F.linear(part, weight[first:last, start:stop]) for first, last in rows], -1)
        total = made if total is None else total + made
    assert total is not None
    return total


def products(model: Any, selection: Any, tokens: int, repeats: int) -> dict[str, dict[str, float]]:
    """Milliseconds of forward and the input's gradient, of the first layer of each kind of one budget."""
    stack, found, seen = model.module.decoder, dict[str, dict[str, float]](), set[str]()
    for layer, plan in zip(stack.layers, stack.plans.of(selection).layers, strict=True):
        for name, segments in plan.segments.items():
            if len(segments) != 2 or name in seen:
                continue
            seen.add(name)
            weight = layer.get_parameter(name).detach()
            rows, columns = (
                ((0, size),) if ranges is None else tuple(ranges)
                for ranges, size in zip(segments, weight.shape, strict=True)
            )
            width = sum(stop - start for start, stop in columns)
            x = torch.randn(tokens, width, dtype=weight.dtype, device=weight.device, requires_grad=True)

            def run(product: Callable[[], Tensor], x: Tensor = x) -> None:
                torch.autograd.grad(product().sum(), x)

            todo = {
                "packed": lambda x=x, w=weight, s=segments: run(lambda: F.linear(x, sliced_parameter(w, *s)), x),
                "pieces": lambda x=x, w=weight, r=rows, c=columns: run(lambda: piece_by_piece(x, w, r, c), x),
            }
            timed = gpu_common.seconds(todo, repeats)
            found[name] = {how: 1e3 * min(values) for how, values in timed.items()}
            found[name]["number_of_pieces"] = len(rows) * len(columns)
    return found


def profile(step: Callable[[], None]) -> str:
    """Time of every operation in one step on the device."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    key = "self_cpu_time_total"
    if torch.cuda.is_available():
        activities, key = [*activities, torch.profiler.ProfilerActivity.CUDA], "self_device_time_total"
    with torch.profiler.profile(activities=activities) as found:
        step()
    return str(found.key_averages().table(sort_by=key, row_limit=30, max_name_column_width=60))


def main() -> None:
    """Measures, and prints."""
    parser = gpu_common.parser(__doc__)
    parser.add_argument("--profile", action="store_true", help="where the time goes; pieces against packing")
    asked = parser.parse_args()
    setting = gpu_common.prepare(asked)
    from benchmarks import models

    shape, length = setting.shape, setting.tokens
    elastic = models.elastic_model(shape, length, layers=setting.layers, **setting.config)
    stock = models.stock_model(shape, length, stack=setting.stack, **setting.config)
    todo = step_time.steps(elastic, stock, models.batch(shape, length), shape, budgets=asked.profile)
    found = gpu_common.seconds(todo, asked.repeats)
    shares = {
        count: [setting.facts["forward_flops"][f"{share:g}"] for share in sizes]
        for count, sizes in step_time.FAMILIES.items()
    }
    report = {
        **setting.facts,
        **step_time.bounds(shares),
        **step_time.ratios(found),
        "seconds": {name: median(values) for name, values in found.items()},
    }
    if asked.profile:
        print(profile(todo["sliced 3"]), file=sys.stderr)
        report["products_ms"] = products(elastic, models.selection(0.5, shape), length, asked.repeats)
    gpu_common.show(asked, report)


if __name__ == "__main__":
    main()
