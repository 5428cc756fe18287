"""Each mended defect: its guard is false where the defect is absent, and the mend does what it says."""

import os
import signal
import threading
from types import SimpleNamespace

import pytest
import torch

from megatron_elastic import megatron_compat
from megatron_elastic.errors import ElasticError

HELPERS, BEFORE_FIRST_STEP, INTO_LEAVES, SHARED_STEP, SKIPPING, RESULTS, ARTIFACT = megatron_compat.DEFECTS
OPTIMIZER_DEFECTS = {
    "sharded_state_dict": BEFORE_FIRST_STEP,
    "_set_main_param_and_optimizer_states": INTO_LEAVES,
    "load_state_dict": SHARED_STEP,
}


@pytest.fixture
def utils(monkeypatch):
    """Core's `datasets.utils`, put back as it was after the test."""
    from megatron.core.datasets import utils

    monkeypatch.setattr(utils, "compile_helpers", utils.compile_helpers)
    return utils


@pytest.fixture
def optimizer_class(monkeypatch):
    """Core's `DistributedOptimizer` on torch's AdamW, put back as it was after the test."""
    from megatron.core.optimizer import distrib_optimizer

    monkeypatch.setattr(distrib_optimizer, "HAVE_APEX_OR_TE", False)
    cls = distrib_optimizer.DistributedOptimizer
    for name in OPTIMIZER_DEFECTS:
        monkeypatch.setattr(cls, name, vars(cls)[name])
    return cls


@pytest.mark.parametrize("version", ["0.19.0", "0.19.2", "0.19.5rc1"])
def test_supported_versions_pass(version):
    megatron_compat.check_core_version(version)


@pytest.mark.parametrize("version", ["0.18.1", "0.20.0", "0.190.0", "1.0"])
def test_other_versions_are_refused(version):
    with pytest.raises(ElasticError, match=rf"megatron-core {version} .*pip install"):
        megatron_compat.check_core_version(version)


def test_missing_core_is_told(monkeypatch):
    def missing(name):
        raise megatron_compat.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(megatron_compat.importlib.metadata, "version", missing)
    with pytest.raises(ElasticError, match="not installed: install megatron-core"):
        megatron_compat.check_core_version()


def test_helpers_without_makefile(utils, monkeypatch, tmp_path):
    monkeypatch.setattr(utils, "__file__", str(tmp_path / "utils.py"))
    assert HELPERS.present()
    HELPERS.mend()
    assert not HELPERS.present()
    assert utils.compile_helpers() is None


def test_helpers_with_makefile_are_left_alone(utils, monkeypatch, tmp_path):
    (tmp_path / "Makefile").touch()
    monkeypatch.setattr(utils, "__file__", str(tmp_path / "utils.py"))
    assert not HELPERS.present()


def test_helpers_that_are_not_compiled_are_left_alone(utils, monkeypatch, tmp_path):
    monkeypatch.setattr(utils, "__file__", str(tmp_path / "utils.py"))
    monkeypatch.setattr(megatron_compat.importlib.util, "find_spec", lambda name: None)
    assert not HELPERS.present()


def test_the_results_of_a_save_outlive_sigterm(monkeypatch):
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    monkeypatch.setattr(filesystem_async, "_results_queue", None)
    monkeypatch.setattr(filesystem_async, "get_write_results_queue", filesystem_async.get_write_results_queue)
    assert RESULTS.present()
    RESULTS.mend()
    assert not RESULTS.present()
    queue = filesystem_async.get_write_results_queue("fork")
    assert filesystem_async.get_write_results_queue() is queue
    os.kill(queue._manager._process.pid, signal.SIGTERM)
    queue.put("written")
    assert queue.get(timeout=60) == "written"
    queue._manager.shutdown()


def test_a_skipped_iteration_is_read_on_every_rank(monkeypatch):
    from megatron.core import num_microbatches_calculator
    from megatron.training import training

    monkeypatch.setattr(training, "dummy_train_step", training.dummy_train_step)
    assert SKIPPING.present()
    monkeypatch.setattr(num_microbatches_calculator, "get_num_microbatches", lambda: 3)
    SKIPPING.mend()
    assert not SKIPPING.present()
    one, other = iter(range(10)), iter(range(10))
    training.dummy_train_step([one, None, other])
    assert (next(one), next(other)) == (3, 3)
    training.dummy_train_step(one)
    training.dummy_train_step(None)
    assert next(one) == 7


def test_wandb_gets_the_tracker_of_this_save(monkeypatch, tmp_path):
    from megatron.training import wandb_utils

    seen = []
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    original = wandb_utils.on_save_checkpoint_success
    monkeypatch.setattr(wandb_utils, "on_save_checkpoint_success", original)
    assert ARTIFACT.present()
    monkeypatch.setattr(wandb_utils, "get_wandb_writer", lambda: seen.append(tracker.read_text()))
    ARTIFACT.mend()
    assert not ARTIFACT.present()
    late = threading.Timer(0.2, lambda: tracker.write_text("7"))
    late.start()
    wandb_utils.on_save_checkpoint_success("checkpoint", str(tracker), str(tmp_path), 7)
    late.join()
    assert seen == ["7"]
    monkeypatch.setattr(megatron_compat, "TRACKER_WAIT", 0.05)
    with pytest.raises(ElasticError, match="does not say 8"):
        wandb_utils.on_save_checkpoint_success("checkpoint", str(tracker), str(tmp_path), 8)
    assert seen == ["7"]


@pytest.mark.parametrize("name", OPTIMIZER_DEFECTS)
def test_optimizer_defect_is_found_once(optimizer_class, name):
    defect = OPTIMIZER_DEFECTS[name]
    assert defect.present()
    defect.mend()
    assert not defect.present()


@pytest.mark.parametrize("name", OPTIMIZER_DEFECTS)
def test_optimizer_defect_is_absent_with_fused_adam(optimizer_class, name, monkeypatch):
    from megatron.core.optimizer import distrib_optimizer

    monkeypatch.setattr(distrib_optimizer, "HAVE_APEX_OR_TE", True)
    assert not OPTIMIZER_DEFECTS[name].present()


@pytest.mark.parametrize("name", OPTIMIZER_DEFECTS)
def test_optimizer_defect_is_absent_from_another_implementation(optimizer_class, name, monkeypatch):
    monkeypatch.setattr(optimizer_class, name, lambda self, *args: None)
    assert not OPTIMIZER_DEFECTS[name].present()


def adamw(parameters, steps=0):
    """AdamW whose parameters have taken `steps` steps with gradient 1."""
    optimizer = torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.5)
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    return optimizer


def test_loading_creates_state_and_keeps_parameters(optimizer_class, monkeypatch):
    seen = []
    monkeypatch.setattr(
        optimizer_class, "sharded_state_dict", lambda self, *args: seen.append(len(self.optimizer.state))
    )
    BEFORE_FIRST_STEP.mend()
    weight = torch.nn.Parameter(torch.full((3,), 2.0))
    wrapped = SimpleNamespace(optimizer=adamw([weight]))
    wrapped._init_optimizer_states_with_dummy_values = lambda: (
        setattr(weight, "grad", torch.zeros_like(weight)),
        wrapped.optimizer.step(),
    )
    optimizer_class.sharded_state_dict(wrapped, {})
    optimizer_class.sharded_state_dict(wrapped, {}, True)
    assert seen == [0, 1]
    assert torch.equal(weight, torch.full((3,), 2.0))
    assert wrapped.optimizer.param_groups[0]["lr"] == 0.1


def test_states_are_copied_into_leaves(optimizer_class):
    weight, model_weight = torch.nn.Parameter(torch.zeros(3)), object()
    wrapped = SimpleNamespace(
        optimizer=adamw([weight], steps=1),
        model_param_group_index_map={model_weight: (0, 0)},
        config=SimpleNamespace(use_precision_aware_optimizer_no_fp8_or_ds_fp8=False),
    )
    loaded = {"param": torch.ones(3), "exp_avg": torch.full((3,), 2.0), "exp_avg_sq": torch.full((3,), 3.0)}
    with pytest.raises((KeyError, RuntimeError)):
        optimizer_class._set_main_param_and_optimizer_states(wrapped, model_weight, loaded)
    INTO_LEAVES.mend()
    optimizer_class._set_main_param_and_optimizer_states(wrapped, model_weight, loaded)
    state = wrapped.optimizer.state[weight]
    assert torch.equal(weight, loaded["param"])
    assert torch.equal(state["exp_avg_sq"], loaded["exp_avg_sq"])
    assert state["step"] == 1
    # A step among the loaded tensors is not the one that counts.
    optimizer_class._set_main_param_and_optimizer_states(wrapped, model_weight, {**loaded, "step": torch.ones(3) * 9})
    assert state["step"] == 1


def test_every_parameter_counts_its_own_steps(optimizer_class, monkeypatch):
    weights = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
    wrapped = SimpleNamespace(optimizer=adamw(weights, steps=1))

    def shared(self, state_dict):
        step = torch.tensor(7.0)
        for state in self.optimizer.state.values():
            state["step"] = step

    monkeypatch.setattr(optimizer_class, "load_state_dict", shared)
    optimizer_class.load_state_dict(wrapped, {})
    wrapped.optimizer.step()
    assert [int(wrapped.optimizer.state[weight]["step"]) for weight in weights] == [10, 10, 10]
    SHARED_STEP.mend()
    optimizer_class.load_state_dict(wrapped, {})
    wrapped.optimizer.step()
    assert [int(wrapped.optimizer.state[weight]["step"]) for weight in weights] == [8, 8, 8]


def test_install_mends_what_is_there_once(utils, optimizer_class, monkeypatch, tmp_path):
    monkeypatch.setattr(utils, "__file__", str(tmp_path / "utils.py"))
    assert megatron_compat.install() == tuple(defect.name for defect in megatron_compat.DEFECTS)
    assert megatron_compat.install() == ()
