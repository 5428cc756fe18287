"""The CPU adaptation replaces what it says it replaces, and nothing that computes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_elastic.cpu import adaptation
from megatron_elastic.errors import ElasticError

ROOT = Path(__file__).resolve().parents[3]

SNAPSHOT = """
import importlib, pydoc, sys
import torch, torch._dynamo, torch.cuda.random
import megatron.training.training, megatron.training.arguments, megatron.training.checkpointing
from megatron_elastic.cpu import adaptation

OWNERS = ["torch", "torch.Tensor", "torch.cuda", "torch.cuda.random", "torch.nn.functional", "torch.distributed"]
OWNERS += sorted(name for name in sys.modules if name.startswith("megatron."))
WRITER = "megatron.core.dist_checkpointing.strategies.filesystem_async.FileSystemWriterAsync"
OWNERS.append(WRITER)

def owner(name):
    return pydoc.locate(name) if name in ("torch.Tensor", WRITER) else importlib.import_module(name)

def snapshot():
    found = {f"{name}.{key}": value for name in OWNERS for key, value in list(vars(owner(name)).items())}
    found["torch._dynamo.config.disable"] = torch._dynamo.config.disable
    return found

def changed(before, after):
    return {name for name in before.keys() | after.keys() if before.get(name) is not after.get(name)}

def check(install, names):
    before = snapshot()
    install()
    found = changed(before, snapshot())
    assert found == set(names), (sorted(found - set(names)), sorted(set(names) - found))
    after = snapshot()
    install()
    assert not changed(after, snapshot()), "a second call changes something"

check(adaptation.install, adaptation.REPLACED_NAMES)
check(adaptation.install_training, adaptation.REPLACED_FOR_TRAINING)

x = torch.arange(6.0, device="cuda").view(2, 3).to("cuda").cuda()
assert x.device.type == "cpu" and x.type() == "torch.cuda.FloatTensor"
assert x.to(torch.float64).dtype == torch.float64 and x.to(device="cuda:0", dtype=torch.int32).dtype == torch.int32
assert torch.zeros(2, device=torch.device("cuda", 0), pin_memory=True).device.type == "cpu"
assert x.type(torch.float64).dtype == torch.float64
torch.cuda.manual_seed(3)
state, first = torch.cuda.get_rng_state(), torch.rand(4, device="cuda")
torch.cuda.set_rng_state(state)
assert torch.equal(first, torch.rand(4)) and not torch.equal(first, torch.rand(4))
with torch.cuda.stream(torch.cuda.Stream()):
    torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
print("same")
"""


def test_replaces_exactly_the_listed_names():
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(
        [sys.executable, "-c", SNAPSHOT], capture_output=True, text=True, timeout=900, cwd=ROOT, env=environment
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.splitlines()[-1] == "same"


def test_names_are_listed_once():
    names = adaptation.REPLACED_NAMES + adaptation.REPLACED_FOR_TRAINING
    assert len(names) == len(set(names))


def test_refuses_where_cuda_is_available(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ElasticError, match="CUDA_VISIBLE_DEVICES"):
        adaptation.install()


def test_import_does_not_need_megatron():
    script = """
import sys
import megatron_elastic.cpu.adaptation, megatron_elastic.megatron_compat, megatron_elastic.checkpoint
sys.exit(any(name.startswith("megatron.") for name in sys.modules))
"""
    assert subprocess.run([sys.executable, "-c", script], timeout=600, cwd=ROOT).returncode == 0
