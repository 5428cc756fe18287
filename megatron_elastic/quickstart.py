"""The whole job in one folder: text, parent, family, standalone models, baselines, evaluations, report.

Every step's result is written at once or continued from its own checkpoints, so the result itself says that the step is
done: a second run goes on where the first one stopped.
"""

import contextlib
import fcntl
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import yaml

from megatron_elastic.checkpoint import TRACKER, find_checkpoint, read_metadata
from megatron_elastic.cli import launch, options, position
from megatron_elastic.cli.launch import command_line, run_children, run_ranks
from megatron_elastic.cli.pretrain import pretrain
from megatron_elastic.cli.sort import sort
from megatron_elastic.cli.train import train
from megatron_elastic.config import Recipe, load_recipe, parse_recipe
from megatron_elastic.corpus import build_corpus
from megatron_elastic.errors import CheckpointError, ElasticError, RecipeError
from megatron_elastic.extraction import cut, extract_budget
from megatron_elastic.flags import shape_flags
from megatron_elastic.metadata import Metadata
from megatron_elastic.report import write_json, write_report, write_text
from megatron_elastic.report.facts import RANDOM_SEEDS
from megatron_elastic.sorting import random_orders

RECIPE = Path("recipe.yaml")
LOGS = Path("logs")
SCORES = Path("scores.pt")
BASELINES = Path("baselines")
EVALUATIONS = Path("evaluations")
MINIMUM_VALIDATION_TOKENS = 50_000
EVALUATED_TOKENS = 51_200
"""Validation tokens that every loss of the report is measured on, where the corpus has as many."""

PLACES = {"parent": "sorted", "save": "family", "train_data": "corpus/train", "validation_data": "corpus/validation"}
"""Paths of the elastic section, which the report's readers rely on."""


@dataclass(frozen=True)
class Step:
    """One step: what it is called, what it leaves behind, whether it is done, and how it is done."""

    name: str
    outputs: tuple[Path, ...]
    done: Callable[[], bool]
    run: Callable[[], object]


def find_recipe() -> Path:
    """The quickstart's recipe: beside the package in a clone, inside it where it was installed.

    Raises:
        ElasticError: in neither place.
    """
    package = Path(__file__).resolve().parent
    for folder in (package / "recipes", package.parent / "recipes"):
        if (folder / "quickstart.yaml").is_file():
            return folder / "quickstart.yaml"
    raise ElasticError("recipes/quickstart.yaml is not installed: give one with --recipe FILE")


def adapted(text: str, ranks: int) -> str:
    """A recipe's text for a number of ranks: tensor parallelism 2 where they are even, else 1; all else stays."""
    size = 2 if ranks % 2 == 0 else 1
    head, elastic, rest = text.partition("\nelastic:")
    before, mark, pretrain_section = head.partition("\npretrain:")
    line = re.compile(r"^(\s+tensor-model-parallel-size:\s*)\d+", re.MULTILINE)
    return line.sub(rf"\g<1>{size}", before) + mark + pretrain_section + elastic + rest


def check_places(recipe: Recipe) -> None:
    """Refuses a recipe whose paths are not those of a quickstart's folder.

    Raises:
        RecipeError: with every path that differs.
    """
    given = {"parent": recipe.parent, "save": recipe.save, "train_data": recipe.train_data}
    given["validation_data"] = recipe.validation_data
    faults = [
        f"elastic.{key}: {given[key]!r} must be {place!r} in a quickstart"
        for key, place in PLACES.items()
        if given[key] != place
    ]
    if recipe.pretrain is None or recipe.pretrain.save != "parent":
        faults.append("pretrain.save: must be 'parent' in a quickstart")
    if recipe.megatron.get("tokenizer-model") != "corpus/tokenizer":
        faults.append("megatron.tokenizer-model: must be 'corpus/tokenizer' in a quickstart")
    if faults:
        raise RecipeError(faults, recipe.source)


def _whole(*checkpoints: Path) -> Callable[[], bool]:
    return lambda: all((checkpoint / TRACKER).exists() for checkpoint in checkpoints)


class Job:
    """The steps of one run; paths are relative to its folder, which is the working directory."""

    def __init__(self, recipe: Recipe, ranks: int, text: Path | None) -> None:
        self.recipe, self.ranks, self.text = recipe, ranks, text
        self.names = [budget.name for budget in recipe.family.budgets]
        self.smaller = self.names[1:]
        self.scratch = BASELINES / "scratch" / self.names[-1]
        self.scratch_run = BASELINES / "scratch-training" / self.names[-1]

    def untrained(self, name: str) -> Path:
        """The selection of a budget, cut from the sorted parent."""
        return BASELINES / "untrained" / name

    def random(self, name: str, seed: int) -> Path:
        """The selection of a budget, cut from a randomly ordered parent."""
        return BASELINES / "random" / f"{name}-{seed}"

    @cached_property
    def family(self) -> Metadata:
        """The trained family's description."""
        path = find_checkpoint(self.recipe.save)
        found = read_metadata(path)
        if found is None:
            raise CheckpointError(f"{path}: not a family (no description inside)")
        return found

    def steps(self) -> list[Step]:
        """All steps, in order."""
        recipe = self.recipe
        assert recipe.pretrain is not None
        iterations, family, sorted_parent = recipe.pretrain.iterations, Path(recipe.save), Path(recipe.parent)
        budgets = [Path("budgets") / name for name in self.names]
        cuts = [self.untrained(name) for name in self.smaller]
        cuts += [self.random(name, seed) for name in self.smaller for seed in RANDOM_SEEDS]
        corpus, parent, jobs = Path("corpus"), Path("parent"), self.evaluations()
        evaluated = tuple(EVALUATIONS / f"{name}.json" for name in jobs)
        return [
            Step(
                "corpus: real text into tokens", (corpus / "corpus.json",), (corpus / "corpus.json").exists, self.corpus
            ),
            Step(
                f"pretrain: a parent, {iterations} steps",
                (parent / TRACKER,),
                lambda: position.tracked(parent) >= iterations,
                lambda: pretrain(RECIPE, self.ranks),
            ),
            Step("rank: importance on calibration text", (SCORES,), SCORES.exists, self.rank),
            Step(
                "sort: the parent into block order",
                (sorted_parent,),
                _whole(sorted_parent),
                lambda: sort(RECIPE, parent, SCORES, sorted_parent),
            ),
            Step(
                f"train: {len(self.names)} budgets at once, {recipe.iterations} steps",
                (family / TRACKER,),
                lambda: position.tracked(family) >= recipe.iterations,
                lambda: train(RECIPE, self.ranks),
            ),
            Step("extract: every budget, standalone", tuple(budgets), _whole(*budgets), self.extract),
            Step("cut: untrained and randomly ordered baselines", tuple(cuts), _whole(*cuts), self.cuts),
            Step(
                f"train from scratch: the shape of {self.names[-1]}, on the same text",
                (self.scratch_run / TRACKER, self.scratch),
                _whole(self.scratch),
                self.train_scratch,
            ),
            Step(f"evaluate: {len(jobs)} models", evaluated, lambda: all(p.exists() for p in evaluated), self.evaluate),
            Step("report: tables and plots", (), lambda: False, lambda: write_report(Path("."))),
        ]

    def corpus(self) -> None:
        """Text into tokens."""
        build_corpus(
            Path("corpus"),
            self.text,
            vocab_size=int(self.recipe.megatron["vocab-size"]),
            minimum_validation_tokens=MINIMUM_VALIDATION_TOKENS,
            progress=options.bars(),
        )

    def rank(self) -> None:
        """Importance, in a process of its own: Megatron's groups do not outlive it."""
        words = ["rank", RECIPE, "--checkpoint", "parent", "--out", SCORES]
        run_children([command_line(*words)], what="ranking", log=LOGS / "rank.log")

    def extract(self) -> None:
        """Every budget that is not extracted yet."""
        for name in self.names:
            if not _whole(Path("budgets") / name)():
                made = extract_budget(self.recipe.save, name, Path("budgets") / name)
                print(f"  {name}: {made['parameters']:,} parameters", flush=True)

    def _cut(self, source: str, out: Path, name: str, seed: int | None = None) -> None:
        if _whole(out)():
            return
        family = self.recipe.family
        cut(
            source,
            out,
            shape=family.shape,
            ffn_blocks=family.ffn_blocks,
            expert_blocks=family.expert_blocks,
            flags=self.recipe.megatron,
            selection=self.family.selection_of(name),
            orders=None if seed is None else random_orders(family.layout, seed),
        )

    def cuts(self) -> None:
        """The same shapes without training: from the sorted parent, and from randomly ordered ones."""
        for name in self.smaller:
            self._cut(self.recipe.parent, self.untrained(name), name)
            for seed in RANDOM_SEEDS:
                self._cut("parent", self.random(name, seed), name, seed)

    def train_scratch(self) -> None:
        """The smallest budget's shape with cross entropy on the family's text; then without its optimizer."""
        name, stages = self.names[-1], self.recipe.stages
        first = self.recipe.stage_of(position.settled(self.scratch_run, self.recipe.megatron))
        for number in range(first, len(stages) + 1):
            words = ["_scratch", RECIPE, "--stage", number, "--budget", name, "--save", self.scratch_run]
            log = LOGS / f"scratch-stage-{number}.log"
            begin, end = position.tracked(self.scratch_run), self.recipe.iterations_before(number + 1)
            with position.stops(self.scratch_run, begin, end, self.recipe.iterations_before(len(stages) + 1)):
                run_ranks(words, ranks=self.ranks, what=f"stage {number} from scratch", log=log)
        shape = self.family.selection_of(name).submodel(self.recipe.family.shape)
        cut(
            self.scratch_run,
            self.scratch,
            shape=shape,
            ffn_blocks=self.recipe.family.ffn_blocks,
            flags=shape_flags(shape, self.recipe.megatron),
            selection=self.family.selection_of(name),
        )

    def evaluations(self) -> dict[str, dict[str, str | None]]:
        """Name of each evaluation -> its checkpoint and budget."""
        found: dict[str, tuple[Path | str, str | None]] = {"parent": ("parent", None)}
        for name in self.names:
            found[f"family-{name}"] = (self.recipe.save, name)
            found[f"extracted-{name}"] = (Path("budgets") / name, None)
        for name in self.smaller:
            found[f"untrained-{name}"] = (self.untrained(name), None)
            for seed in RANDOM_SEEDS:
                found[f"random-{name}-{seed}"] = (self.random(name, seed), None)
        found[f"scratch-{self.names[-1]}"] = (self.scratch, None)
        return {name: {"checkpoint": str(path), "budget": budget} for name, (path, budget) in found.items()}

    def evaluate(self) -> None:
        """Every model on the same tokens; side by side on the CPU, where one process uses one core."""
        plan = {
            "data": self.recipe.validation_data,
            "tokens": EVALUATED_TOKENS,
            "sequence_length": self.recipe.stages[-1].sequence_length,
            "out": str(EVALUATIONS),
            "jobs": self.evaluations(),
        }
        write_json(EVALUATIONS / "plan.json", plan)
        parts = 1 if launch.gpu_count() else min(2, len(os.sched_getaffinity(0)))
        words = ["_evaluate_all", EVALUATIONS / "plan.json", "--parts", parts, "--part"]
        commands = [command_line(*words, part) for part in range(parts)]
        run_children(commands, what="evaluation", log=LOGS / "evaluate.log")


def _refuse_stale(steps: list[Step], number: int, out: Path) -> None:
    """A step that has still to run, before results that were made from it: those would not fit."""
    later = [path for step in steps[number + 1 :] for path in step.outputs if path.exists()]
    if later:
        listed = ", ".join(str(out / path) for path in later)
        name = steps[number].name.split(":")[0]
        raise ElasticError(
            f"{name} is not done in {out}, but results that follow from it exist: {listed}. Remove them to make them "
            "anew, or choose another --out"
        )


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Keeps a second run out of the same folder."""
    with (out / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ElasticError(f"another quickstart runs in {out}: wait for it, or choose another --out") from error
        yield


def _prepare(out: Path, recipe: Path, ranks: int) -> Recipe:
    """Checks the recipe for these ranks and puts it into the folder.

    Raises:
        RecipeError: it has faults.
        ElasticError: the folder is another recipe's.
    """
    try:
        text = recipe.read_text("utf-8")
        wanted = adapted(text, ranks)
        checked = parse_recipe(yaml.safe_load(wanted), world_size=ranks, source=str(recipe))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError([f"cannot be read: {error}"], str(recipe)) from error
    check_places(checked)
    out.mkdir(parents=True, exist_ok=True)
    kept = out / RECIPE
    if kept.exists() and adapted(kept.read_text("utf-8"), ranks) != wanted:
        raise ElasticError(
            f"{kept} differs from {recipe}, and what is in {out} was made from it: choose another --out, or go on with "
            f"it by --recipe {kept}"
        )
    if not kept.exists() or kept.read_text("utf-8") != wanted:
        write_text(kept, wanted)
    return load_recipe(kept, world_size=ranks)


def quickstart(out: Path, *, ranks: int | None = None, recipe: Path | None = None, text: Path | None = None) -> None:
    """Does what is not done yet in a folder.

    Args:
        out: the folder; made where it is missing.
        ranks: processes; None is 2, or 1 where there is one GPU.
        recipe: another one than the quickstart's.
        text: a text folder; None is what comes with this Python.

    Raises:
        RecipeError: the recipe has faults.
        ElasticError: a step failed, or the folder holds something else.
    """
    ranks = ranks or min(2, launch.gpu_count() or 2)
    launch.check_ranks(ranks)
    if out.exists() and not out.is_dir():
        raise ElasticError(f"--out {out} is a file: give a folder")
    checked = _prepare(out, recipe or find_recipe(), ranks)
    text = None if text is None else text.resolve()
    begin = time.monotonic()
    with _alone(out), contextlib.chdir(out):
        steps = Job(checked, ranks, text).steps()
        for number, step in enumerate(steps):
            label = f"[{number + 1}/{len(steps)}] {step.name}"
            if step.done():
                print(f"{label}: done already", flush=True)
                continue
            _refuse_stale(steps, number, out)
            print(label, flush=True)
            start = time.monotonic()
            step.run()
            print(f"{label.split(' ')[0]} done in {time.monotonic() - start:.0f} s", flush=True)
    print(
        f"{out / 'report.md'} and {out / 'report.json'} are written; {time.monotonic() - begin:.0f} s in all",
        flush=True,
    )
