"""Recipes: a `megatron:` section of Megatron's own flags and an `elastic:` section, checked before anything runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_elastic.budget import Selection
from megatron_elastic.curriculum import (
    TEACHERS,
    Calibration,
    DistillationLoss,
    Evaluation,
    PretrainRun,
    Stage,
    TeacherCache,
    section,
)
from megatron_elastic.errors import RecipeError
from megatron_elastic.family import Family
from megatron_elastic.flags import flag_faults, model_shape
from megatron_elastic.layout import ModelShape
from megatron_elastic.parallel import Ranks, interleaving_faults, length_fault, ranks_of
from megatron_elastic.planning import nearest
from megatron_elastic.precision import (
    QUANTISED,
    TEACHER_PRECISIONS,
    UNQUANTISED,
    Precision,
    precision_of,
    skipped_end_fault,
)
from megatron_elastic.recipe_family import parse_family, parse_selections
from megatron_elastic.router import RouterConfig
from megatron_elastic.tiles import tile_faults, tile_of, token_faults

__all__ = [
    "Calibration",
    "DistillationLoss",
    "Evaluation",
    "PretrainRun",
    "Recipe",
    "Stage",
    "load_recipe",
    "parse_recipe",
]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A checked recipe.

    Attributes:
        megatron: Megatron's flags, without dashes in front.
        pretrain: how the parent is trained, None where it exists already.
        family: shape, choices and budgets.
        selections: given shapes, one a budget, or empty where a router learns them.
        stages: the curriculum.
        router: its hyperparameters, None where selections are given.
        parent: checkpoint of the (sorted) parent.
        teacher: checkpoint of the frozen teacher, of the parent's shapes and vocabulary; the parent's own by default.
        teacher_precision: `bf16` or `fp8`: whether the frozen teacher's linear layers are quantised as the students'.
        budget_mode: `joint` (every budget on every batch) or `sampled` (one budget drawn for every microbatch).
        save: where the family is saved.
        train_data, validation_data: data prefixes.
        temperature: of the KD softmax.
        loss: divergence from the teacher, and what is added to it.
        teacher_cache: where the teacher's most probable tokens are kept; None: it runs for every step.
    """

    megatron: Mapping[str, Any]
    pretrain: PretrainRun | None
    family: Family
    selections: tuple[Selection, ...]
    stages: tuple[Stage, ...]
    router: RouterConfig | None
    parent: str
    teacher: str
    save: str
    train_data: str
    validation_data: str
    temperature: float
    loss: DistillationLoss
    budget_mode: str
    teacher_precision: str
    save_interval: int
    evaluation: Evaluation
    calibration: Calibration
    teacher_cache: TeacherCache | None = None
    source: str = "recipe"

    @property
    def precision(self) -> Precision | None:
        """FP8 of the students, or None."""
        return precision_of(self.megatron)

    @property
    def roles(self) -> int:
        """Microbatches that each base microbatch becomes in training: teachers, and every budget or a drawn one."""
        return 2 if self.budget_mode == "sampled" else self.evaluation_roles

    @property
    def teachers(self) -> int:
        """Teachers that every base microbatch is run by: two where budgets of one stage follow different ones.

        The same in all stages: Megatron's learning rate follows the number of samples, and counts them by role.
        """
        names = [budget.name for budget in self.family.budgets]
        return max(len(set(stage.teachers(names))) for stage in self.stages)

    @property
    def evaluation_roles(self) -> int:
        """Microbatches that each base microbatch becomes in evaluation: teachers and every budget."""
        return len(self.family.budgets) + self.teachers

    def stage_of(self, iteration: int) -> int:
        """Number (from 1) of the stage that makes the step after `iteration` steps; one past the last when all are."""
        passed = 0
        for number, stage in enumerate(self.stages, start=1):
            passed += stage.iterations
            if iteration < passed:
                return number
        return len(self.stages) + 1

    def iterations_before(self, stage: int) -> int:
        """Optimizer steps of the stages before `stage` (from 1)."""
        return sum(s.iterations for s in self.stages[: stage - 1])

    def base_samples_before(self, stage: int) -> int:
        """Base samples consumed by the stages before `stage` (from 1)."""
        return sum(s.iterations * s.global_batch_size for s in self.stages[: stage - 1])

    @property
    def iterations(self) -> int:
        """Optimizer steps of all stages."""
        return self.iterations_before(len(self.stages) + 1)

    @property
    def base_tokens(self) -> int:
        """Tokens of text that all stages read (each counted once, however many budgets learn from it)."""
        return sum(s.iterations * s.global_batch_size * s.sequence_length for s in self.stages)


KNOWN_KEYS = (
    *("parent", "save", "train_data", "validation_data", "ffn_blocks", "axes", "budgets", "selections", "router"),
    *("stages", "temperature", "loss", "save_interval", "evaluation", "calibration", "teacher", "budget_mode"),
    *("heterogeneous", "depth_ranking", "expert_blocks", "deployment", "latency_table", "teacher_precision"),
    "teacher_cache",
)
BUDGET_MODES = ("joint", "sampled")
REQUIRED_KEYS = ("parent", "save", "train_data", "validation_data", "axes", "budgets", "stages")


def _stages(raw: Any, budgets: int, ranks: Ranks, world_size: int | None, faults: list[str]) -> tuple[Stage, ...]:
    if not isinstance(raw, list) or not raw:
        faults.append(f"elastic.stages: {raw!r} must be a list of stages")
        return ()
    made = [section(Stage, entry, f"elastic.stages[{number}]", faults) for number, entry in enumerate(raw)]
    for number, stage in enumerate(made):
        if stage is None:
            continue
        name = f"elastic.stages[{number}]"
        for key in ("iterations", "sequence_length", "global_batch_size", "micro_batch_size"):
            if getattr(stage, key) < 1:
                faults.append(f"{name}.{key}: {getattr(stage, key)} must be at least 1")
        if fault := length_fault(stage.sequence_length, ranks):
            faults.append(f"{name}.{fault}")
        step = stage.micro_batch_size * max(1, (world_size or ranks.copy) // ranks.copy)
        if step and stage.global_batch_size % step:
            faults.append(
                f"{name}.global_batch_size: {stage.global_batch_size} must be a multiple of micro_batch_size x "
                f"data-parallel size = {step}: roles are dealt in groups of that size"
            )
        kinds = list(stage.teacher.values()) if isinstance(stage.teacher, Mapping) else [stage.teacher]
        unknown = [kind for kind in kinds if kind not in TEACHERS]
        faults.extend(f"{name}.teacher: {kind!r} must be one of {list(TEACHERS)}" for kind in unknown)
        weights = stage.weights
        numbers = isinstance(weights, tuple) and all(isinstance(w, int | float) and w >= 0 for w in weights)
        if budgets and (not numbers or len(weights) != budgets or abs(sum(weights) - 1.0) > 1e-6):
            faults.append(f"{name}.weights: {weights!r} must be {budgets} numbers, one a budget, that sum to 1")
    return tuple(stage for stage in made if stage is not None)


def _pretrain(
    raw: Any, megatron: Mapping[str, Any], shape: ModelShape | None, world_size: int | None, faults: list[str]
) -> PretrainRun | None:
    run = section(PretrainRun, raw, "pretrain", faults)
    if run is None:
        return None
    if not isinstance(run.save, str) or not run.save:
        faults.append(f"pretrain.save: {run.save!r} must be a folder")
    if not isinstance(run.megatron, Mapping):
        faults.append(f"pretrain.megatron: {run.megatron!r} must be a mapping of Megatron's flags")
        return None
    for key in ("iterations", "sequence_length", "global_batch_size", "micro_batch_size"):
        if getattr(run, key) < 1:
            faults.append(f"pretrain.{key}: {getattr(run, key)} must be at least 1")
    merged = {**megatron, **run.megatron}
    old, found = flag_faults(megatron), list[str]()
    other = model_shape(merged, found)
    found = [fault for fault in (*flag_faults(merged), *found) if fault not in old]
    if shape is not None:
        faults.extend(f"pretrain.{fault}" for fault in found)
    if shape is not None and other is not None and other != shape:
        faults.append(
            "pretrain.megatron: changes the model that the section megatron describes (its vocabulary's padding counts)"
        )
    ranks = ranks_of(merged, [])
    if shape is not None:
        split = shape.context_parallel_faults([shape.full.get("mamba_heads", 0)], ranks.tp, ranks.cp)
        faults.extend(f"pretrain.megatron: {fault}" for fault in split)
    if fault := length_fault(run.sequence_length, ranks):
        faults.append(f"pretrain.{fault}")
    tile = tile_of(merged)
    if tile is not None and shape is not None:
        full = tile_faults(shape, shape.orders(1), shape.choices, ranks, tile)
        faults.extend(f"pretrain.megatron: {axis}: FP8 refuses {what}" for axis, what in full)
        split_tokens = bool(merged.get("sequence-parallel"))
        faults.extend(token_faults({"pretrain": run.stage}, ranks, split=split_tokens, tile=tile))
    step = run.micro_batch_size * max(1, (world_size or ranks.copy) // ranks.copy)
    if step and run.global_batch_size % step:
        faults.append(
            f"pretrain.global_batch_size: {run.global_batch_size} must be a multiple of micro_batch_size x "
            f"data-parallel size = {step}"
        )
    return run


def _single(elastic: Mapping[str, Any], faults: list[str]) -> dict[str, Any]:
    """The settings of the elastic section that stand alone."""
    found: dict[str, Any] = {}
    for key in ("parent", "save", "train_data", "validation_data", "teacher"):
        found[key] = elastic.get(key, elastic.get("parent", "") if key == "teacher" else "")
        if key in elastic and (not isinstance(found[key], str) or not found[key]):
            faults.append(f"elastic.{key}: {found[key]!r} must be a path")
    temperature = elastic.get("temperature", 1.0)
    if not isinstance(temperature, int | float) or isinstance(temperature, bool) or temperature <= 0:
        faults.append(f"elastic.temperature: {temperature!r} must be a number above 0")
    mode = elastic.get("budget_mode", "joint")
    if mode not in BUDGET_MODES:
        faults.append(f"elastic.budget_mode: {mode!r} must be one of {list(BUDGET_MODES)}")
    of_teacher = elastic.get("teacher_precision", UNQUANTISED)
    if of_teacher not in TEACHER_PRECISIONS:
        faults.append(f"elastic.teacher_precision: {of_teacher!r} must be one of {list(TEACHER_PRECISIONS)}")
    interval = elastic.get("save_interval", 1000)
    if not isinstance(interval, int) or isinstance(interval, bool) or interval < 1:
        faults.append(f"elastic.save_interval: {interval!r} must be a whole number, at least 1")
    return {
        **found,
        "temperature": temperature,
        "save_interval": interval,
        "budget_mode": mode,
        "teacher_precision": of_teacher,
    }


def _teacher_cache(
    raw: Any, stages: Sequence[Stage], vocabulary: int | None, faults: list[str]
) -> TeacherCache | None:
    if raw is None:
        return None
    cache = section(TeacherCache, raw, "elastic.teacher_cache", faults)
    if cache is None:
        return None
    most = cache.top_k if vocabulary is None else vocabulary - 1
    if not 1 <= cache.top_k <= most:
        faults.append(
            f"elastic.teacher_cache.top_k: {cache.top_k} must lie between 1 and {most}, one less than the vocabulary: "
            "what is not kept is one entry"
        )
    for number, stage in enumerate(stages):
        if "trainable" in (stage.teacher.values() if isinstance(stage.teacher, Mapping) else [stage.teacher]):
            faults.append(
                f"elastic.stages[{number}].teacher: trainable, and elastic.teacher_cache is given: a teacher that "
                "changes with every step cannot be read from a cache; use `teacher: frozen`, or no cache"
            )
    return cache


def _reachable(family: Family, tolerance: float, faults: list[str]) -> None:
    if len(family.choices["depth"]) > 1 and not family.depth_ranking:
        return  # which layers a choice of depth skips is not known before the parent is ranked
    for budget in family.budgets:
        selection = nearest(family, budget.fraction, budget.unit)
        reached = family.selection_cost(selection, budget.unit) / family.full_cost(budget.unit)
        if abs(reached / budget.fraction - 1.0) > tolerance:
            faults.append(
                f"elastic.budgets.{budget.name}: no selection comes within {tolerance:.1%} of {budget.fraction:.3f} of "
                f"the parent's {budget.unit}; the nearest has {reached:.4f} ({selection.as_dict()}): add choices"
            )


def _router(elastic: Mapping[str, Any], stages: Sequence[Stage] | None, faults: list[str]) -> RouterConfig | None:
    """The router's settings; `stages` is None where they are at fault and cannot be compared with."""
    if "selections" in elastic:
        if "router" in elastic:
            faults.append("elastic.router: with elastic.selections no router is built; remove one of the two")
        return None
    router = section(RouterConfig, elastic.get("router", {}), "elastic.router", faults)
    if isinstance(elastic.get("axes"), Mapping) and all(
        isinstance(choices, list) and len(choices) < 2 for choices in elastic["axes"].values()
    ):
        faults.append("elastic.router: no axis has more than one choice, so there is nothing to learn: add choices")
    if router is not None and stages is not None and router.iterations > sum(stage.iterations for stage in stages):
        faults.append(f"elastic.router.iterations: {router.iterations} exceeds the stages' iterations")
    return router


def parse_recipe(raw: Any, *, world_size: int | None = None, source: str = "recipe") -> Recipe:
    """Checks a recipe whole.

    Args:
        raw: what the YAML file holds.
        world_size: ranks of the run, for the data-parallel size; None where it is not known, and not checked.
        source: name for messages.

    Raises:
        RecipeError: with every fault found.
    """
    faults: list[str] = []
    if not isinstance(raw, Mapping):
        raise RecipeError([f"{type(raw).__name__} where a mapping with `megatron` and `elastic` is expected"], source)
    for key in sorted(set(raw) - {"megatron", "pretrain", "elastic"}, key=str):
        faults.append(f"{key}: unknown section; known are megatron, pretrain, elastic")
    megatron, elastic = raw.get("megatron"), raw.get("elastic")
    if not isinstance(megatron, Mapping) or not isinstance(elastic, Mapping):
        raise RecipeError([*faults, "the sections `megatron` and `elastic` are both required, as mappings"], source)
    for key in sorted(set(elastic) - set(KNOWN_KEYS), key=str):
        faults.append(f"elastic.{key}: unknown key; known are {list(KNOWN_KEYS)}")
    faults.extend(f"elastic.{key}: required" for key in REQUIRED_KEYS if key not in elastic)
    faults.extend(flag_faults(megatron))
    shape = model_shape(megatron, faults)
    ranks = ranks_of(megatron, faults)
    if world_size is not None and world_size % ranks.copy:
        faults.append(f"megatron: TP x PP x CP = {ranks.copy} does not divide the {world_size} rank(s) of this run")
    given = elastic.get("budgets")
    budgets = len(given) if isinstance(given, list) else 0
    before = len(faults)
    stages = _stages(elastic.get("stages"), budgets, ranks, world_size, faults)
    named = [str(entry.get("name")) for entry in given or () if isinstance(entry, Mapping)] if budgets else []
    for number, stage in enumerate(stages):
        if isinstance(stage.teacher, Mapping):
            faults.extend(
                f"elastic.stages[{number}].teacher.{name}: no budget; there are {named}"
                for name in stage.teacher
                if name not in named
            )
    judged = budgets + max((len(set(stage.teachers(named))) for stage in stages), default=1)
    roles = {"training": 2 if elastic.get("budget_mode") == "sampled" else judged, "evaluation": judged}
    interleaving_faults(megatron, stages, roles, max(1, (world_size or ranks.copy) // ranks.copy), faults)
    router = _router(elastic, stages if len(faults) == before else None, faults)
    tile = tile_of(megatron)
    if tile is not None:
        named_stages = {f"elastic.stages[{number}]": stage for number, stage in enumerate(stages)}
        faults.extend(token_faults(named_stages, ranks, split=bool(megatron.get("sequence-parallel")), tile=tile))
    family = None if shape is None else parse_family(elastic, shape, ranks, faults, tile)
    selections: tuple[Selection, ...] = ()
    if family is not None and "selections" in elastic:
        selections = parse_selections(elastic["selections"], family, faults)
    elif family is not None:
        _reachable(family, router.tolerance if router else 0.02, faults)
    if family is not None and not faults:
        skipped = {*family.ever_skipped, *(number for selection in selections for number in selection.skipped)}
        fault = skipped_end_fault(precision_of(megatron), skipped, len(family.shape.pattern))
        faults.extend([] if fault is None else [f"elastic.axes.depth: {fault}"])
    pretrain = None if raw.get("pretrain") is None else _pretrain(raw["pretrain"], megatron, shape, world_size, faults)
    single = _single(elastic, faults)
    if single["teacher_precision"] == QUANTISED and not megatron.get("fp8-format"):
        faults.append("elastic.teacher_precision: 'fp8' is the students' FP8: give megatron.fp8-format and fp8-recipe")
    evaluation = section(Evaluation, elastic.get("evaluation", {}), "elastic.evaluation", faults)
    calibration = section(Calibration, elastic.get("calibration", {}), "elastic.calibration", faults)
    loss = section(DistillationLoss, elastic.get("loss", {}), "elastic.loss", faults)
    cache = _teacher_cache(elastic.get("teacher_cache"), stages, shape.vocab if shape else None, faults)
    if faults or family is None or evaluation is None or calibration is None or loss is None:
        raise RecipeError(faults, source)
    return Recipe(
        megatron=dict(megatron),
        pretrain=pretrain,
        family=family,
        selections=selections,
        stages=stages,
        router=router,
        evaluation=evaluation,
        calibration=calibration,
        loss=loss,
        teacher_cache=cache,
        source=source,
        **single,
    )


def load_recipe(path: str | Path, *, world_size: int | None = None) -> Recipe:
    """Reads and checks a recipe file.

    Raises:
        RecipeError: the file is missing or not YAML, or the recipe has faults.
    """
    try:
        raw = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError([f"cannot be read: {error}"], str(path)) from error
    return parse_recipe(raw, world_size=world_size, source=str(path))
