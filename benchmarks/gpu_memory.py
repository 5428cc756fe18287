"""Peak memory of a joint step on a GPU over that of the full budget alone, plus the teacher's weights.

    python benchmarks/gpu_memory.py [--json] [--fp8 RECIPE] [--tokens N]

As benchmarks/joint_memory.py, on one stage: four budgets and the teacher in Megatron's schedule, two base microbatches,
weights, gradient buffers (fp32) and the allocator's peak counted, without optimizer states.
"""

from benchmarks import gpu_common, joint_memory


def main() -> None:
    """Measures, and prints."""
    asked = gpu_common.parser(__doc__).parse_args()
    setting = gpu_common.prepare(asked)
    from benchmarks import models

    shape, length = setting.shape, setting.tokens
    model = models.elastic_model(shape, length, layers=setting.layers, **setting.config)
    budgets = [{"selection": models.selection(share, shape)} for share in sorted(joint_memory.SHARES)]
    found = joint_memory.ratios(model, budgets, models.batch(shape, length))
    gpu_common.show(asked, {**setting.facts, **found})


if __name__ == "__main__":
    main()
