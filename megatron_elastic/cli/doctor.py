"""`megatron-elastic doctor`: what is installed, what works, and what is missing for which feature."""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from megatron_elastic.cli import options

if TYPE_CHECKING:
    from megatron_elastic.cli.features import Fault, Verdict
    from megatron_elastic.cli.probes import Machine, Package

HELP = "say what is installed, what works, and what is missing for which feature"
DESCRIPTION = """\
Look at this machine: versions of the packages that matter, whether each can be imported (in a
process of its own, so that a broken one is a finding and no crash), GPUs and driver, and which
features follow from that, with the remedy for each that does not. A broken package that keeps
Megatron from starting, such as transformer-engine without its CUDA core, is told by name.
Exit status: 0 when this machine can train at all, be it on its CPU, otherwise 1."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's arguments on its own parser."""
    options.describe(parser, DESCRIPTION)
    options.as_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Do what the arguments ask for and return the exit status."""
    from megatron_elastic.cli import features, probes

    count = sum(probes.installed(name) is not None for name in probes.PROBES)
    tried: list[str] = []

    def told(name: str) -> None:
        tried.append(name)
        end = "\n" if len(tried) == count else ""
        print(
            f"\rtrying what is installed: {len(tried)} of {count} ({name})\x1b[K", end=end, file=sys.stderr, flush=True
        )

    machine = probes.examine(told if options.bars() else lambda name: None)
    verdicts = {name: check(machine) for name, check in features.FEATURES.items()}
    found = features.faults(machine)
    can_train = verdicts["train on CPU ranks"].works
    if arguments.json:
        print(json.dumps(_as_dict(machine, verdicts, found, can_train)))
    else:
        _show(machine, verdicts, found, can_train)
    return 0 if can_train else 1


def _state(package: "Package") -> str:
    if package.version is None:
        return "missing"
    return {True: "works", False: "broken", None: "installed"}[package.works]


def _as_dict(
    machine: "Machine", verdicts: "Mapping[str, Verdict]", found: "Sequence[Fault]", can_train: bool
) -> dict[str, Any]:
    packages = {
        name: {"version": package.version, "state": _state(package), "error": package.error, **package.found}
        for name, package in machine.packages.items()
    }
    return {
        "can_train": can_train,
        "python": machine.python,
        "system": machine.system,
        "cores": machine.cores,
        "driver": machine.driver,
        "docker": machine.docker,
        "packages": packages,
        "commands": dict(machine.commands),
        "faults": [asdict(fault) for fault in found],
        "features": {name: asdict(verdict) for name, verdict in verdicts.items()},
    }


def _show(machine: "Machine", verdicts: "Mapping[str, Verdict]", found: "Sequence[Fault]", can_train: bool) -> None:
    torch = machine.packages["torch"].found
    gpus = ", ".join(torch.get("gpus") or ()) or "none that torch sees"
    print(f"Python {machine.python}, {machine.system}, {machine.cores} cores")
    print(f"GPUs: {gpus}; driver {machine.driver or 'not found'}; torch is built for CUDA {torch.get('cuda') or '-'}")
    print("\nPackages")
    for name, package in machine.packages.items():
        line = f"  {name:<24}  {package.version or '-':<16}  {_state(package)}"
        print(f"{line}: {package.brief}" if package.error else line)
    print("\nFeatures")
    for name, verdict in verdicts.items():
        print(f"  {'yes' if verdict.works else 'no ':<3}  {name:<32}  {verdict.why}")
        if verdict.remedy:
            print(f"       {'':<32}  -> {verdict.remedy}")
    for fault in found:
        print(f"\nIn the way: {fault.what}\n  -> {fault.remedy}")
    print(f"\nThis machine can{'' if can_train else 'not'} train.")
