"""What the fork server's ranks are made to do wrong: hooks that wrap functions in one rank's own process.

A run is divided into phases: `step N` (the N-th optimizer step), `save N` (the checkpoint after it; of an asynchronous
save only what training waits for), `between N` (from there until the asynchronous save is in the tracker file),
`writer N` (an asynchronous save's own process), `begin of K` and `end of K` (a stage: from the start of the rank to its
first step, and from its last step and checkpoint to the end of Megatron's part). A moment is a share of the calls,
Python's and C's, that a rank makes inside a phase: the same moment in every run.
"""

import builtins
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_elastic.checkpoint import TRACKER


class Phases:
    """Tells a listener where this rank is."""

    def __init__(self, begin: Callable[[str], None], end: Callable[[str], None]) -> None:
        self.begin, self.end = begin, end

    def around(self, owner: Any, name: str, phase: Callable[..., str | None]) -> None:
        """Makes each call of a function a phase, named by its arguments."""
        function = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            word = phase(*args, **kwargs)
            if word is None:
                return function(*args, **kwargs)
            self.begin(word)
            result = function(*args, **kwargs)
            self.end(word)
            return result

        setattr(owner, name, wrapped)

    def install(self, words: Sequence[str]) -> None:
        """Wraps what the phases are made of, in this process."""
        from megatron.training import async_utils, get_args, training

        from megatron_elastic import training as elastic_training

        stage = words[words.index("--stage") + 1]
        opening, closing = f"begin of {stage}", f"end of {stage}"
        open_phases = [opening]
        self.begin(opening)

        def step(*_: Any, **kwargs: Any) -> str:
            if opening in open_phases:
                open_phases.remove(opening)
                self.end(opening)
            return f"step {kwargs['iteration'] + 1}"

        self.around(training, "train_step", step)
        save = training.save_checkpoint

        def save_checkpoint(iteration: int, *args: Any, **kwargs: Any) -> None:
            self.begin(f"save {iteration}")
            save(iteration, *args, **kwargs)
            self.end(f"save {iteration}")
            if get_args().async_save:
                open_phases.append(f"between {iteration}")
                self.begin(f"between {iteration}")

        training.save_checkpoint = save_checkpoint
        finalize = training.maybe_finalize_async_save

        def maybe_finalize_async_save(*args: Any, **kwargs: Any) -> None:
            finalize(*args, **kwargs)
            while async_utils.is_empty_async_queue() and open_phases and open_phases[0].startswith("between"):
                self.end(open_phases.pop(0))

        training.maybe_finalize_async_save = maybe_finalize_async_save
        train, pretrain = training.train, elastic_training.pretrain

        def train_then_begin(*args: Any, **kwargs: Any) -> Any:
            result = train(*args, **kwargs)
            self.begin(closing)
            return result

        def pretrain_then_end(*args: Any, **kwargs: Any) -> None:
            pretrain(*args, **kwargs)
            self.end(closing)

        training.train, elastic_training.pretrain = train_then_begin, pretrain_then_end


class _Count:
    """Counts the calls of a phase, with `sys.setprofile`."""

    def __init__(self, at: float, act: Callable[[], None]) -> None:
        self.at, self.act, self.calls = at, act, 0

    def __call__(self, _: Any, event: str, __: Any) -> None:
        if event in ("call", "c_call"):
            self.calls += 1
            if self.calls >= self.at:
                sys.setprofile(None)
                self.act()


def measure(rank: int, words: Sequence[str], *, out: str) -> None:
    """Writes the calls of every phase to a file a rank: `phase TAB calls`."""
    file = Path(f"{out}-{rank}").open("a", buffering=1)  # noqa: SIM115
    counts: dict[str, _Count] = {}

    def begin(phase: str) -> None:
        counts[phase] = _Count(float("inf"), lambda: None)
        sys.setprofile(counts[phase])

    def end(phase: str) -> None:
        sys.setprofile(None)
        file.write(f"{phase}\t{counts[phase].calls}\n")

    Phases(begin, end).install(words)


def die(everything: bool) -> None:
    """SIGKILL to this process, or to all ranks and all that they started, as when a machine goes down."""
    if everything:
        os.killpg(0, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def terminate(rank: int, words: Sequence[str], *, victim: int, phase: str) -> None:
    """SIGTERM to the ranks and all that they started at the beginning of a rank's phase, as torchrun sends it."""

    def begin(word: str) -> None:
        if rank == victim and word == phase:
            os.killpg(0, signal.SIGTERM)

    Phases(begin, lambda _: None).install(words)


def kill(rank: int, words: Sequence[str], *, victim: int, phase: str, calls: int, everything: bool) -> None:
    """Kills rank `victim` (or everything) at the `calls`-th call of a phase, at its end at the latest."""
    if rank != victim:
        return
    if phase.startswith("writer"):
        _kill_in_writer(int(phase.split()[1]), calls)
        return

    def begin(word: str) -> None:
        if word == phase:
            sys.setprofile(_Count(calls, lambda: die(everything)))

    def end(word: str) -> None:
        if word == phase:
            die(everything)

    Phases(begin, end).install(words)


def _kill_in_writer(iteration: int, calls: int) -> None:
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    write = FileSystemWriterAsync.write_preloaded_data

    def write_preloaded_data(transforms: Any, *args: Any, **kwargs: Any) -> Any:
        if f"iter_{iteration:07d}" in kwargs["write_bucket"][0]:
            sys.setprofile(_Count(calls, lambda: die(True)))
        return write(transforms, *args, **kwargs)

    FileSystemWriterAsync.write_preloaded_data = staticmethod(write_preloaded_data)


def kill_in_tracker(rank: int, words: Sequence[str], *, iteration: int) -> None:
    """Kills everything when the tracker file has been opened for writing, and is empty."""
    real = builtins.open

    def opened(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        result = real(file, mode, *args, **kwargs)
        if mode == "w" and str(file).endswith(TRACKER) and Path(file).parent.joinpath(f"iter_{iteration:07d}").exists():
            die(True)
        return result

    builtins.open = opened


def read_counts(out: Path, rank: int) -> dict[str, int]:
    """What `measure` wrote."""
    lines = Path(f"{out}-{rank}").read_text().splitlines()
    return {phase: int(calls) for phase, calls in (line.split("\t") for line in lines)}


def _loss_calls(act: Callable[[int, Any], Any]) -> None:
    """Passes each training loss through a function of (iteration from 1, loss)."""
    from megatron.training import get_args

    from megatron_elastic.model import ElasticHybridModel

    forward = ElasticHybridModel.forward

    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        if self.post_process and self.training and kwargs.get("teacher") is not None:
            return act(get_args().curr_iteration + 1, output)
        return output

    ElasticHybridModel.forward = wrapped


def spoil_loss(
    rank: int, words: Sequence[str], *, victim: int, iteration: int, value: str, student: int, times: int
) -> None:
    """Makes the loss of one rank's `student`-th microbatch of an iteration NaN or infinite, the first `times` times."""
    if rank != victim:
        return
    seen = 0

    def act(now: int, loss: Any) -> Any:
        nonlocal seen
        seen += now == iteration
        # Four students a step: two base microbatches, two budgets.
        spoilt = now == iteration and (seen - 1) % 4 == student and (seen - 1) // 4 < times
        return loss * float(value) if spoilt else loss

    _loss_calls(act)


def reject_once(rank: int, words: Sequence[str], *, victim: int, iteration: int) -> None:
    """Makes one rank's validation reject a good loss once, without being fatal: the step is rerun and goes on."""
    from megatron.core.rerun_state_machine import RerunState, RerunStateMachine
    from megatron.training import get_args

    validate = RerunStateMachine.validate_result

    def validate_result(self: Any, result: Any, rejection_func: Any, message: str, **kwargs: Any) -> None:
        if rank == victim and get_args().curr_iteration + 1 == iteration and "KD loss" in message:
            first = self.state is RerunState.INITIAL_RUN
            return validate(self, result, lambda _: first, message, **{**kwargs, "fatal": False})
        return validate(self, result, rejection_func, message, **kwargs)

    RerunStateMachine.validate_result = validate_result


def commit_early(rank: int, words: Sequence[str]) -> None:
    """The fault that committing guards against: the router steps whenever its gradient is there."""
    from megatron_elastic.forward_step import JointStep

    finalize = JointStep.finalize

    def finalize_and_step(self: Any, *args: Any, **kwargs: Any) -> None:
        finalize(self, *args, **kwargs)
        if self.state.trainer is not None:
            self.state.trainer.commit()

    JointStep.finalize = finalize_and_step


def watch(rank: int, words: Sequence[str]) -> None:
    """Prints the text of every training microbatch that a rank reads, and the teacher's mode."""
    import zlib

    from megatron.core.rerun_state_machine import RerunDataIterator
    from megatron.training import get_args

    from megatron_elastic.model import ElasticHybridModel

    read, teach = RerunDataIterator.__next__, ElasticHybridModel._teacher_forward

    def next_(self: Any) -> Any:
        batch = read(self)
        budget = int(batch["budget"][0])
        role = "T" if budget < 0 else str(budget)
        text = zlib.crc32(batch["tokens"].numpy().tobytes())
        again = "again" if self.replaying else "first"
        print(f"watch | read {again} | {text:08x} {role}", flush=True)
        return batch

    def teacher_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        mode = "training" if self.teachers[0].training else "evaluation"
        mine = "training" if self.training else "evaluation"
        print(f"watch | teacher | iteration {get_args().curr_iteration + 1} | {mode} | {mine}", flush=True)
        return teach(self, *args, **kwargs)

    RerunDataIterator.__next__ = next_
    ElasticHybridModel._teacher_forward = teacher_forward


def slow_writer(rank: int, words: Sequence[str], *, seconds: float, copies: bool = True, live: bool = False) -> None:
    """The writer of asynchronous saves waits before it writes the first one, while training goes on.

    Args:
        rank, words: of the rank.
        seconds: that it waits.
        copies: whether the CPU adaptation copies tensors for the writer, as a GPU's copy to the host does.
        live: whether the router's own tensors are given to the writer instead of copies: a fault.
    """
    import time

    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    from megatron_elastic.cpu import adaptation
    from megatron_elastic.model import ElasticHybridModel

    write = FileSystemWriterAsync.write_preloaded_data

    def write_preloaded_data(*args: Any, **kwargs: Any) -> Any:
        if "iter_0000001" in kwargs["write_bucket"][0]:
            time.sleep(seconds)
        return write(*args, **kwargs)

    FileSystemWriterAsync.write_preloaded_data = staticmethod(write_preloaded_data)
    if not copies:
        adaptation._copies = lambda preload: preload
    if live:
        sharded = ElasticHybridModel.sharded_state_dict

        def sharded_state_dict(self: Any, *args: Any, **kwargs: Any) -> Any:
            found = sharded(self, *args, **kwargs)
            for state in self.states:
                for key, tensor in state.tensors().items():
                    found[key].data = tensor
            return found

        ElasticHybridModel.sharded_state_dict = sharded_state_dict


def stand_still(rank: int, words: Sequence[str]) -> None:
    """Optimizers step without learning rate and gradient: weights stay, and Adam's moments decay by their betas."""
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    def without(optimizer: Any, *_: Any) -> None:
        for group in optimizer.param_groups:
            group["lr"] = 0.0
            for parameter in group["params"]:
                parameter.grad.zero_()

    register_optimizer_step_pre_hook(without)


def other_router(rank: int, words: Sequence[str], *, victim: int) -> None:
    """One rank's router is slightly another one after its first step, as after an error of its device."""
    from megatron_elastic.router import RouterTrainer

    commit = RouterTrainer.commit

    def wrong(self: Any) -> bool:
        done = commit(self)
        if done and rank == victim:
            next(self.router.parameters()).data[0, 0] += 1e-6
        return done

    RouterTrainer.commit = wrong  # type: ignore[method-assign]


def other_tokens(rank: int, words: Sequence[str], *, sample: int) -> None:
    """One base sample has another token, as of data that was made anew."""
    from megatron_elastic.distillation.roles import RoleDataset

    read = RoleDataset.__getitem__

    def changed(self: Any, index: int) -> dict[str, Any]:
        found = read(self, index)
        if found["sample"] == sample:
            found["tokens"] = found["tokens"].clone()
            found["tokens"][7] += 1
        return found

    RoleDataset.__getitem__ = changed  # type: ignore[method-assign]


def no_teacher(rank: int, words: Sequence[str]) -> None:
    """A frozen teacher cannot be made."""
    from megatron_elastic.training import _Attach

    def refused(*_: Any) -> Any:
        raise AssertionError("a teacher was made")

    _Attach._teacher = refused  # type: ignore[method-assign]
