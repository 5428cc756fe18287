"""Share of a GPU's peak that steps reach: the model's FLOPs over the time and the card's dense bf16 FLOP/s.

    python benchmarks/gpu_mfu.py [--json] [--fp8 RECIPE] [--tokens N]

FLOPs are those of `megatron_elastic.cost_model`, a backward being two forwards: of a plain step of the stock parent, of
each budget by itself with the teacher's forward, and of joint steps. What is computed twice (the teacher's LM head for
each further budget, recomputation) does not count. With FP8 the peak is still bf16's, so that the two can be compared.
"""

from statistics import median

from benchmarks import gpu_common, step_time


def main() -> None:
    """Measures, and prints."""
    asked = gpu_common.parser(__doc__).parse_args()
    setting = gpu_common.prepare(asked)
    from benchmarks import models
    from megatron_elastic.cost_model import forward_flops_per_token

    shape, length = setting.shape, setting.tokens
    elastic = models.elastic_model(shape, length, layers=setting.layers, **setting.config)
    stock = models.stock_model(shape, length, stack=setting.stack, **setting.config)
    todo = step_time.steps(elastic, stock, models.batch(shape, length), shape, budgets=True)
    todo = {name: step for name, step in todo.items() if not name.startswith("masked")}
    shares = {float(share): part for share, part in setting.facts["forward_flops"].items()}
    # In forwards of the parent.
    work = {"plain": 3.0}
    work |= {f"budget {share}": 1.0 + 3.0 * part for share, part in shares.items()}
    work |= {
        f"sliced {count}": 1.0 + 3.0 * sum(shares[share] for share in sizes)
        for count, sizes in step_time.FAMILIES.items()
    }
    forward, peak = length * float(forward_flops_per_token(shape, shape.full, length)), gpu_common.peak_flops()
    report = {**setting.facts, "peak_flops": peak}
    for name, values in gpu_common.seconds(todo, asked.repeats).items():
        rate = work[name] * forward / median(values)
        report[f"tflops {name}"] = rate / 1e12
        report[f"mfu {name}"] = None if peak is None else rate / peak
    gpu_common.show(asked, report)


if __name__ == "__main__":
    main()
