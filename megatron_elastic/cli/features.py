"""What a machine can do with what is installed on it, and what to do about the rest."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from megatron_elastic.cli.probes import TEST_TOOLS, Machine, Package

TE = "transformer-engine"
MEGATRON = "megatron-core"
SUPPORTED_CORE = "0.19."
OTHER_TORCH = "undefined symbol"
"""What the loader says of an extension that was compiled against another torch."""
FP8_FROM = (8, 9)
MXFP8_FROM = (10, 0)


@dataclass(frozen=True)
class Verdict:
    """Whether something can be used here.

    Attributes:
        works: whether it can.
        why: what is there, or what is missing.
        remedy: what to do where it cannot; empty where nothing helps on this machine.
    """

    works: bool
    why: str
    remedy: str = ""


@dataclass(frozen=True)
class Fault:
    """Something that is installed and in the way.

    Attributes:
        what: what is wrong.
        remedy: what to do.
    """

    what: str
    remedy: str


def _pinned(version: str | None) -> str:
    return f"=={version}" if version else ""


def _full_te(machine: Machine) -> str:
    cuda = str(machine.packages["torch"].found.get("cuda") or "13").split(".")[0]
    version = _pinned(machine.packages[TE].version)
    return f"pip install --no-build-isolation 'transformer-engine[core_cu{cuda},pytorch]{version}'"


def _rebuild(name: str, version: str | None) -> str:
    options = "--no-build-isolation --force-reinstall --no-deps --no-cache-dir"
    return f"pip install {options} {name}{_pinned(version)}"


def transformer_engine_fault(machine: Machine) -> Fault | None:
    """Why an installed Transformer Engine cannot be imported, by name; None where it can, or is not there."""
    package = machine.packages[TE]
    if package.version is None or package.works is not False:
        return None
    full = _full_te(machine)
    remove = "or, on a machine that does not use it: pip uninstall transformer-engine"
    core = [name for name in (f"{TE}-cu12", f"{TE}-cu13") if machine.packages[name].version]
    binding = machine.packages[f"{TE}-torch"].version
    if not core and binding is None and ("meta package" in package.trace or "shared object" in package.trace):
        return Fault(f"{TE} {package.version} is bare: its CUDA core is not installed", f"{full}; {remove}")
    versions = {package.version, binding or package.version, *(machine.packages[name].version for name in core)}
    if len(versions) > 1:
        told = ", ".join(f"{name} {machine.packages[name].version}" for name in (TE, *core, f"{TE}-torch"))
        return Fault(f"the parts of {TE} are of different versions: {told}", f"{full}; {remove}")
    if core and binding is None:
        return Fault(f"{TE} {package.version} has no binding to torch ({TE}-torch)", f"{full}; {remove}")
    if OTHER_TORCH in package.trace:
        return Fault(
            f"{TE} {package.version} was compiled against another torch",
            f"{_rebuild(f'{TE}-torch', package.version)}; {remove}",
        )
    return Fault(f"{TE} {package.version} cannot be imported: {package.brief}", f"{full}; {remove}")


def apex_fault(machine: Machine) -> Fault | None:
    """The registry's package of the name `apex` is another project, which Megatron takes for NVIDIA's."""
    package = machine.packages["apex"]
    if package.version is None or machine.apex_is_nvidias:
        return None
    return Fault(
        f"apex {package.version} is not NVIDIA's but another project of that name, which Megatron takes for it",
        "pip uninstall apex; NVIDIA's comes with its containers, or is built from its source, and is not needed",
    )


def _import_fault(machine: Machine) -> Fault | None:
    engine = machine.packages[MEGATRON]
    if engine.works is not False:
        return None
    if "transformer_engine" in engine.trace:
        cause = transformer_engine_fault(machine)
        if cause is not None:
            return Fault(f"{cause.what}, and so `import megatron.core` fails", cause.remedy)
    return Fault(f"`import megatron.core, megatron.training` fails: {engine.brief}", "pip install .")


def faults(machine: Machine) -> list[Fault]:
    """What is installed and in the way, each once."""
    engine = _import_fault(machine)
    engine_and_te = engine is not None and engine.what.startswith((TE, f"the parts of {TE}"))
    found = [engine, None if engine_and_te else transformer_engine_fault(machine), apex_fault(machine)]
    torch = machine.packages["torch"]
    gpus = torch.found.get("gpus")
    if torch.works and machine.driver and not gpus:
        built = f"for CUDA {torch.found.get('cuda')}" if torch.found.get("cuda") else "without CUDA"
        found.append(
            Fault(
                f"driver {machine.driver} is there, and torch {torch.version} ({built}) sees no GPU",
                "see `nvidia-smi` and CUDA_VISIBLE_DEVICES; install a torch for the driver's CUDA, or a newer driver",
            )
        )
    return [fault for fault in found if fault is not None]


def _broken(name: str, package: Package) -> str:
    if package.version is None:
        return f"{name} is not installed"
    if OTHER_TORCH in package.trace:
        return f"{name} {package.version} was compiled against another torch"
    return f"{name} {package.version} fails: {package.brief}"


def _cpu(machine: Machine) -> Verdict:
    torch, engine = machine.packages["torch"], machine.packages[MEGATRON]
    if not torch.works:
        return Verdict(False, _broken("torch", torch), "pip install .")
    if not engine.works:
        fault = _import_fault(machine)
        if fault is not None:
            return Verdict(False, fault.what, fault.remedy)
        return Verdict(False, _broken(MEGATRON, engine), "pip install .")
    if not str(engine.version).startswith(SUPPORTED_CORE):
        return Verdict(
            False, f"{MEGATRON} {engine.version} is installed, and {SUPPORTED_CORE}x is supported", "pip install ."
        )
    return Verdict(True, f"torch {torch.version}, {MEGATRON} {engine.version}, {machine.cores} cores")


def _gpu(machine: Machine) -> Verdict:
    if not _cpu(machine).works:
        return Verdict(False, "Megatron does not start")
    gpus = machine.packages["torch"].found.get("gpus")
    if not gpus:
        return Verdict(False, "torch sees no GPU")
    return Verdict(True, f"{len(gpus)} x {gpus[0]}, NCCL {machine.packages['torch'].found.get('nccl')}")


def _with_gpu(check: Callable[[Machine], Verdict]) -> Callable[[Machine], Verdict]:
    def verdict(machine: Machine) -> Verdict:
        gpu, own = _gpu(machine), check(machine)
        return own if gpu.works else Verdict(False, f"{gpu.why}; {own.why}", own.remedy)

    return verdict


def _transformer_engine(machine: Machine) -> Verdict:
    package = machine.packages[TE]
    if package.works:
        return Verdict(True, f"{TE} {package.version}")
    fault = transformer_engine_fault(machine)
    if fault is None:
        return Verdict(False, _broken(TE, package), _full_te(machine))
    return Verdict(False, fault.what, fault.remedy)


def _fp8(machine: Machine) -> Verdict:
    engine = _transformer_engine(machine)
    capability = tuple(machine.packages["torch"].found.get("capability") or ())
    if not engine.works or not capability:
        return engine
    told = f"compute capability {'.'.join(map(str, capability))}"
    if capability < FP8_FROM:
        return Verdict(False, f"{told}: FP8 needs 8.9 or newer")
    mx = "" if capability >= MXFP8_FROM else "; MXFP8 needs 10.0"
    return Verdict(True, f"{told}: delayed and current scaling{', blockwise' if capability >= (9, 0) else ''}{mx}")


def _packages(*names: str, remedy: str) -> Callable[[Machine], Verdict]:
    def verdict(machine: Machine) -> Verdict:
        bad = [name for name in names if not machine.works(name)]
        if bad:
            why = "; ".join(_broken(name, machine.packages[name]) for name in bad)
            others = [name for name in bad if OTHER_TORCH in machine.packages[name].trace]
            again = [_rebuild(name, machine.packages[name].version) for name in others]
            return Verdict(False, why, "; ".join([*again, *([remedy] if len(others) < len(bad) else [])]))
        return Verdict(True, ", ".join(f"{name} {machine.packages[name].version}" for name in names))

    return verdict


def _triton(machine: Machine) -> Verdict:
    own = _packages("triton", remedy="it comes with torch for CUDA: reinstall torch")(machine)
    if own.works and not {"gcc", "clang"} & set(machine.commands) and "CC" not in os.environ:
        return Verdict(False, "triton compiles its launchers with a C compiler, and none is on PATH", "apt install gcc")
    return own


def _fused_optimizer(machine: Machine) -> Verdict:
    for name, whose in ((TE, "Transformer Engine's"), ("apex", "Apex's")):
        if machine.works(name):
            return Verdict(True, f"{whose} FusedAdam")
    return Verdict(
        False, "neither Transformer Engine nor NVIDIA's Apex works: Megatron takes torch's AdamW, which is slower"
    )


def _commands(*names: str, remedy: str) -> Callable[[Machine], Verdict]:
    def verdict(machine: Machine) -> Verdict:
        missing = [name for name in names if name not in machine.commands]
        if missing:
            return Verdict(False, f"not on PATH: {', '.join(missing)}", remedy)
        return Verdict(True, ", ".join(machine.commands[name] for name in names))

    return verdict


def _container(machine: Machine) -> Verdict:
    if machine.docker:
        return Verdict(True, f"docker's engine {machine.docker}")
    there = "docker is on PATH, and no engine answers it" if "docker" in machine.commands else "docker is not on PATH"
    return Verdict(False, there, "build docker/Dockerfile where docker runs")


def _tests(machine: Machine) -> Verdict:
    missing = [name for name in (*TEST_TOOLS, "nvidia-modelopt") if machine.packages[name].version is None]
    if missing:
        return Verdict(False, f"not installed: {', '.join(missing)}", "bash tests/run.sh installs them, or: .[dev]")
    return Verdict(True, f"pytest {machine.packages['pytest'].version}")


GPU_EXTRA = "pip install --no-build-isolation '.[gpu]'"

FEATURES: Mapping[str, Callable[[Machine], Verdict]] = {
    "train on CPU ranks": _cpu,
    "train on GPUs, local backend": _gpu,
    "transformer_engine backend": _with_gpu(_transformer_engine),
    "FP8": _with_gpu(_fp8),
    "Mamba kernels": _with_gpu(_packages("mamba-ssm", "causal-conv1d", remedy=GPU_EXTRA)),
    "Triton kernels": _with_gpu(_triton),
    "fused optimizer": _with_gpu(_fused_optimizer),
    "import and export (Hugging Face)": _packages("transformers", remedy="pip install ."),
    "Weights & Biases": _packages("wandb", remedy="pip install ."),
    "SLURM jobs": _commands("srun", "sbatch", "scontrol", "scancel", remedy="submit from a cluster's login node"),
    "container": _container,
    "tests": _tests,
}
"""Feature -> its check."""
