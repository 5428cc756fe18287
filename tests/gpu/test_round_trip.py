"""A family from CPU ranks to the device and back is the same family.

Not run on a GPU yet. On the CPU all three parts run in one process; on CUDA the first and the last are processes
without it, the first of them two tensor-parallel ranks.
"""

import json
from pathlib import Path

import pytest
import torch

from tests.distributed.launch import run_ranks
from tests.gpu import round_trip_body as body

# fp32 logits of seven layers, as in test_equalities.py, averaged over 40 tokens.
TOLERANCE = 1e-4


def on_the_cpu(what: str, folder: Path, device: torch.device) -> None:
    """One part of the way in a process without CUDA."""
    if device.type == "cpu":
        body.main(what, folder)
    else:
        run_ranks(body.__file__, 2 if what == "save" else 1, what, folder)


def test_weights_and_router_come_back_as_they_left(engine: None, device: torch.device, tmp_path: Path) -> None:
    from tests.distributed import elastic_kit as kit

    kit.layout_of_ranks()
    on_the_cpu("save", tmp_path, device)
    left = body.stored(tmp_path / "from_cpu")
    model = body.elastic_family(0.0, device)
    built = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    body.load(model, tmp_path / "from_cpu")
    assert not any(torch.equal(built[name], parameter) for name, parameter in model.named_parameters())
    # Evaluated and saved: nothing has changed.
    with torch.no_grad():
        before = float(body.cross_entropy(model, device))
    body.save(model, tmp_path / "evaluated")
    back = body.stored(tmp_path / "evaluated")
    assert left.keys() == back.keys()
    assert [name for name, tensor in left.items() if not torch.equal(tensor, back[name])] == []
    # One step, saved: what is stored is what the device holds, and trains the same model on the CPU.
    body.cross_entropy(model, device).backward()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
        after = float(body.cross_entropy(model, device))
    assert after < before - 100 * TOLERANCE
    body.save(model, tmp_path / "stepped")
    on_the_cpu("load", tmp_path, device)
    assert json.loads((tmp_path / "loss.json").read_text()) == pytest.approx(after, abs=TOLERANCE)
    changed = body.stored(tmp_path / "stepped")
    weights = {name for name in left if not name.startswith("elastic.")}
    assert {name for name, tensor in left.items() if not torch.equal(tensor, changed[name])} <= weights
    body.load(model, tmp_path / "from_cpu")
    body.load(model, tmp_path / "stepped")
    with torch.no_grad():
        assert float(body.cross_entropy(model, device)) == pytest.approx(after, abs=TOLERANCE)
