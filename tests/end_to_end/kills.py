"""Kills small runs at seeded moments, resumes them, and compares them with runs that were never stopped.

python -m tests.end_to_end.kills [--seed N]      all twenty moments, with a table (tests/soak.sh)
"""

import argparse
import random
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_elastic.checkpoint import find_checkpoint
from megatron_elastic.errors import CheckpointError
from tests.end_to_end import small_run
from tests.end_to_end.faults import read_counts
from tests.rank_server import RankServer, Run, hook

ROUTER = {"iterations": 4, "warmup": 1, "tolerance": 0.06}
STAGES = [
    {"iterations": 3, "sequence_length": 32, **small_run.STAGE},
    {"iterations": 3, "sequence_length": 64, **small_run.STAGE},
]
"""The router is frozen after iteration 4, inside stage 2."""
LAST = 6
FAULTS = "tests.end_to_end.faults"
KINDS = ("step", "save", "async save", "stage change")


@dataclass(frozen=True)
class Moment:
    """When a run is killed.

    Attributes:
        kind: one of `KINDS`.
        phase: as in `faults`.
        share: of the phase's calls.
        victim: the rank that counts the calls.
        everything: whether all processes die with it.
    """

    kind: str
    phase: str
    share: float
    victim: int
    everything: bool

    @property
    def is_async(self) -> bool:
        """Whether the run saves asynchronously."""
        return self.kind == "async save"


def moments(seed: int) -> list[Moment]:
    """Twenty moments: five of each kind; between them both ranks, one or all processes, both stages."""
    draw = random.Random(seed)
    found = []
    for kind in KINDS:
        for number in range(5):
            iteration = draw.randint(2, LAST)
            phase = {
                "step": f"step {iteration}",
                "save": f"save {iteration}",
                "async save": f"{('save', 'between', 'writer')[number % 3]} {iteration}",
                "stage change": ("end of 1", "begin of 2")[number % 2],
            }[kind]
            everything = phase.startswith("writer") or draw.random() < 0.5
            found.append(Moment(kind, phase, draw.random(), draw.randrange(2), everything))
    # The one moment that a share of calls cannot be trusted to meet: the tracker file is open, and empty.
    found[KINDS.index("save") * 5] = Moment("save", f"tracker {draw.randint(2, LAST)}", 0.0, 0, True)
    return found


def fresh(folder: Path, start: Path, megatron: dict[str, Any] | None = None) -> Path:
    """A folder with text, parent and recipe, and no family."""
    folder.mkdir()
    for name in ("corpus", "sorted"):
        (folder / name).symlink_to((start / name).resolve())
    write_recipe(folder, megatron or {})
    return folder


def write_recipe(folder: Path, megatron: dict[str, Any]) -> None:
    """The recipe of these runs, with flags of Megatron on top."""
    small_run.write_recipe(folder, {**small_run.WITHOUT_WANDB, **megatron}, router=ROUTER, stages=STAGES)


class Reference:
    """A run that was never stopped, every checkpoint kept."""

    def __init__(self, server: RankServer, folder: Path, start: Path, megatron: dict[str, Any]) -> None:
        self.folder = folder
        fresh(folder, start, megatron)
        hooks = [hook(f"{FAULTS}:measure", out=str(folder / "calls")), hook(f"{FAULTS}:watch")]
        self.run = run = server.train(folder, hooks=hooks)
        assert run.status == 0, run.text()[-3000:]
        self.losses, self.rates, self.judged = told(run.text())
        assert sorted(self.losses) == sorted(self.rates) == list(range(1, LAST + 1))
        self.states = {iteration: small_run.state(folder, iteration) for iteration in range(1, LAST + 1)}
        self.calls = [read_counts(folder / "calls", rank) for rank in (0, 1)]


def told(text: str) -> tuple[dict[int, str], dict[int, str], dict[int, str]]:
    """Per iteration: the losses, the learning rate and the evaluation that a run printed."""
    losses, rates, judged = {}, {}, {}
    for line in text.splitlines():
        if "losses of iteration" in line:
            words = line.partition("losses of iteration ")[2]
            losses[int(words.split()[0])] = words.partition("| ")[2]
        elif rate := re.search(r"\] iteration +(\d+)/.*learning rate: (\S+)", line):
            rates[int(rate[1])] = rate[2]
        elif "validation loss at iteration" in line:
            words = line.partition("validation loss at iteration ")[2]
            judged[int(words.split()[0])] = words.partition("| ")[2]
    return losses, rates, judged


@dataclass(frozen=True)
class Outcome:
    """What came of a kill.

    Attributes:
        accepted: iterations whose folders a loader accepts right after the kill.
        newest: iteration that the folder as a whole is accepted at; None where it is refused.
        faults: everything that is not as it must be; empty is good.
    """

    accepted: tuple[int, ...]
    newest: int | None
    faults: tuple[str, ...]


def accepted_checkpoints(folder: Path) -> Iterator[tuple[int, Path]]:
    """Folders of iterations that a loader accepts, by their files."""
    for path in sorted((folder / "family").glob("iter_*")):
        try:
            yield int(path.name.removeprefix("iter_")), find_checkpoint(path)
        except CheckpointError:
            continue


def wrong_checkpoints(folder: Path, reference: Reference, faults: list[str]) -> tuple[tuple[int, ...], int | None]:
    """Compares what a loader accepts with the uninterrupted run's; what differs is added to `faults`."""
    accepted = []
    for iteration, _ in accepted_checkpoints(folder):
        try:
            found = small_run.state(folder, iteration)
        except CheckpointError:
            continue  # refused when it is read
        accepted.append(iteration)
        differing = small_run.different(found, reference.states[iteration])
        if differing:
            faults.append(f"iteration {iteration} is accepted and wrong: {differing[:3]}")
    try:
        newest = int(find_checkpoint(folder / "family").name.removeprefix("iter_"))
    except CheckpointError:
        return tuple(accepted), None
    if newest not in accepted:
        faults.append(f"the folder is accepted at iteration {newest}, which is not")
    return tuple(accepted), newest


def kill(server: RankServer, folder: Path, moment: Moment, reference: Reference) -> Run:
    """Runs to the moment."""
    kind, _, iteration = moment.phase.partition(" ")
    if kind == "tracker":
        how = hook(f"{FAULTS}:kill_in_tracker", iteration=int(iteration))
    else:
        calls = 200 if kind == "writer" else reference.calls[moment.victim][moment.phase]
        how = hook(
            f"{FAULTS}:kill", victim=moment.victim, phase=moment.phase, calls=max(1, int(calls * moment.share)),
            everything=moment.everything,
        )  # fmt: skip
    return server.train(folder, hooks=[how])


def kill_and_resume(server: RankServer, folder: Path, moment: Moment, reference: Reference) -> Outcome:
    """One moment: kills a fresh run there, looks at what it left, resumes it and compares it with the reference."""
    fresh(folder, reference.folder, {"async-save": True} if moment.is_async else {})
    faults: list[str] = []
    killed = kill(server, folder, moment, reference)
    if killed.status == 0:
        faults.append("the run was not killed")
    losses, rates, judged = told(killed.text())
    accepted, newest = wrong_checkpoints(folder, reference, faults)
    resumed = server.train(folder)
    if resumed.status:
        faults.append(f"resuming ends with status {resumed.status}: {resumed.text()[-500:]}")
        return Outcome(accepted, newest, tuple(faults))
    for mine, theirs in zip((losses, rates, judged), told(resumed.text()), strict=True):
        faults += [f"{n}: {mine[n]}, then {theirs[n]}" for n in set(mine) & set(theirs) if mine[n] != theirs[n]]
        mine.update(theirs)
    # A stage whose last checkpoint was saved is done: the evaluation after it is not made again.
    judged = {**{iteration: reference.judged[iteration] for iteration in set(reference.judged) - {LAST}}, **judged}
    for name, mine, theirs in (
        ("losses", losses, reference.losses), ("learning rates", rates, reference.rates),
        ("evaluations", judged, reference.judged),
    ):  # fmt: skip
        if mine != theirs:
            faults.append(f"{name}: {mine}, never stopped: {theirs}")
    differing = small_run.different(small_run.state(folder), reference.states[LAST])
    if differing:
        faults.append(f"the end differs: {differing[:3]}")
    return Outcome(accepted, newest, tuple(faults))


def main() -> int:
    """Every moment, one after the other, as a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1, help="draws the moments (default 1)")
    parser.add_argument("--keep", type=Path, help="folder to work in, and to leave")
    arguments = parser.parse_args()
    work = arguments.keep or Path(tempfile.mkdtemp(prefix="megatron-elastic-soak-"))
    failed = 0
    try:
        (work / "start").mkdir(parents=True)
        small_run.prepare(work / "start", router=ROUTER)
        with RankServer() as server:
            references = {
                kind: Reference(server, work / f"straight-{kind}", work / "start", {"async-save": kind} if kind else {})
                for kind in (False, True)
            }
            print("  # kind          phase         share  rank  dead  accepted after the kill  newest  resumed")
            for number, moment in enumerate(moments(arguments.seed), 1):
                folder = work / f"run-{number}"
                start = time.monotonic()
                outcome = kill_and_resume(server, folder, moment, references[moment.is_async])
                dead = "all" if moment.everything else "one"
                told_accepted = ",".join(map(str, outcome.accepted)) or "none"
                print(
                    f"{number:3} {moment.kind:13} {moment.phase:13} {moment.share:5.2f}  {moment.victim:4}  {dead:4}  "
                    f"{told_accepted:23}  {outcome.newest or '-':>6}  {'; '.join(outcome.faults) or 'bit for bit'} "
                    f"({time.monotonic() - start:.0f} s)",
                    flush=True,
                )
                failed += bool(outcome.faults)
                if arguments.keep is None:
                    shutil.rmtree(folder)
    finally:
        if arguments.keep is None:
            shutil.rmtree(work)
    print(f"{failed} of {number} moments failed" if failed else f"all {number} moments: bit for bit")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
