"""Imports go down only: every module of the package is walked against the table of layers."""

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

PACKAGE = "megatron_elastic"
ROOT = Path(__file__).resolve().parents[2] / PACKAGE

# The trunk: a module imports its own level and lower ones.
LEVELS = {
    "errors": 0,
    "axes": 0,
    "signals": 0,
    "layout": 1,
    "flags": 1,
    "curriculum": 1,
    "parallel": 1,
    "budget": 2,
    "latency": 1,
    "cost_model": 2,
    "family": 2,
    "masks": 3,
    "decision": 3,
    "planning": 3,
    "router": 3,
    "metadata": 3,
    "recipe_family": 3,
    "config": 3,
    "ops": 4,
    "checkpoint": 4,
    "layers": 5,
    "specs": 5,
    "model": 5,
    "batch": 6,
    "distillation": 6,
    "parents": 6,
    "schedule": 6,
    "wandb_run": 1,
    "forward_step": 7,
    "loss_checks": 7,
    "loss_log": 7,
    "metrics": 7,
    "training": 7,
}
# Beside the trunk: the highest trunk level that each may import; nothing in the trunk imports them.
BESIDE = {
    "recipe_checks": 4,
    "asked": 4,
    "dry_run": 7,
    "corpus": 4,
    "documents": 4,
    "extraction": 4,
    "hf": 4,
    "report": 4,
    "sorting": 4,
    "standalone": 7,
    "evaluation": 7,
    "importance": 7,
}
# What adapts the engine: imports the errors alone, and is imported from where the engine is.
ENGINE = {"cpu", "megatron_compat"}
ENGINE_LEVEL = 5
TOP = {"cli", "quickstart", "__main__"}

# `import` of these works with torch alone: they are read, tested and used on machines without the engine.
TORCH_ONLY = {name for name, level in LEVELS.items() if level <= 4} | {
    "corpus",
    "documents",
    "extraction",
    "hf",
    "sorting",
}
TORCH_ONLY_PACKAGES = {"torch", "numpy", "yaml"} | set(sys.stdlib_module_names)
TRAINING_IMPORTERS = {"training", "dry_run"}
TRAINING_IMPORTERS |= {"forward_step", "loss_checks", "metrics", "evaluation", "importance", "standalone"}
TRAINING_IMPORTERS |= ENGINE
# The model's configuration and builder are registered under megatron.training.models: that part is open to the model.
MODELS_IMPORTERS = {"model"}


class Import(NamedTuple):
    source: str
    """The importing module, dotted, inside the package."""
    target: str
    """The imported module, dotted, with its package."""
    line: int
    on_import: bool
    """Whether it runs when the importing module is imported, rather than in a function or for a type checker."""


def walk(node: ast.AST, on_import: bool = True) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, on_import
        else:
            lazy = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            lazy = lazy or (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test))
            yield from walk(child, on_import and not lazy)


def module_name(root: Path, path: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def imports(root: Path) -> Iterator[Import]:
    modules = {module_name(root, path): path for path in sorted(root.rglob("*.py"))}
    for source, path in modules.items():
        for node, on_import in walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            else:
                base = node.module or ""
                if node.level:
                    inside = [PACKAGE, *source.split(".")]
                    keep = len(inside) - node.level + (path.name == "__init__.py")
                    base = ".".join([*inside[:keep], *([base] if base else [])])
                # `from package import module` imports the module; `from module import name` does not.
                targets = [
                    f"{base}.{alias.name}"
                    if f"{base}.{alias.name}".removeprefix(f"{PACKAGE}.") in modules or base == "megatron"
                    else base
                    for alias in node.names
                ]
            for target in dict.fromkeys(targets):
                yield Import(source, target, node.lineno, on_import)


def head(dotted: str) -> str:
    return dotted.split(".")[0]


def inner_fault(source: str, target: str) -> str | None:
    """Say why the part `source` of the package may not import the part `target`; None if it may."""
    if source == target or target in {"errors", PACKAGE, "__init__"} or source in TOP:
        return None
    if target in TOP:
        return "the command line is imported by nothing"
    if source in ENGINE:
        return None if target in ENGINE else "what adapts the engine imports the errors alone"
    reach = LEVELS.get(source, BESIDE.get(source, -1))
    if target in ENGINE:
        return None if reach >= ENGINE_LEVEL else f"only level {ENGINE_LEVEL} and higher may touch the engine"
    if target in BESIDE:
        return None if source in BESIDE else "what stands beside the trunk is imported by nothing in it"
    return None if LEVELS[target] <= reach else f"level {reach} imports level {LEVELS[target]}: imports go down only"


def outer_fault(found: Import) -> str | None:
    """Say why the package may not import this module of another one; None if it may."""
    source = head(found.source)
    if found.target == "megatron.training" or found.target.startswith("megatron.training."):
        models = found.target.startswith("megatron.training.models") and source in MODELS_IMPORTERS
        if source not in TRAINING_IMPORTERS and not models:
            return f"megatron.training is imported by {', '.join(sorted(TRAINING_IMPORTERS))} only"
    if source in TORCH_ONLY and found.on_import and head(found.target) not in TORCH_ONLY_PACKAGES:
        return "this module imports with torch alone; import it inside the function that needs it"
    return None


def faults(root: Path) -> list[str]:
    result = []
    known = {*LEVELS, *BESIDE, *ENGINE, *TOP, "__init__"}
    parts = {head(module_name(root, path)) for path in root.rglob("*.py")}
    result += [f"{part}: in no layer; add it to this table" for part in sorted(parts - known)]
    graph: dict[str, set[str]] = {}
    for found in imports(root):
        if head(found.target) == PACKAGE:
            target = found.target.removeprefix(PACKAGE).removeprefix(".") or "__init__"
            if {head(found.source), head(target)} <= known:
                fault = inner_fault(head(found.source), head(target))
            else:
                fault = None
            if found.on_import and target != found.source:
                graph.setdefault(found.source, set()).add(target)
        else:
            fault = outer_fault(found)
        if fault:
            result.append(f"{found.source}:{found.line} imports {found.target}: {fault}")
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        result.append(f"import cycle: {' -> '.join(error.args[1])}")
    return result


def test_imports_go_down_only() -> None:
    assert faults(ROOT) == []


def test_the_walk_sees_the_package() -> None:
    seen = list(imports(ROOT))
    assert any(found.target == f"{PACKAGE}.errors" for found in seen)
    # A lazy import is seen, and known to be lazy.
    assert any(found.source == "corpus" and head(found.target) == "megatron" and not found.on_import for found in seen)


def package(root: Path, **files: str) -> Path:
    for name, text in {"__init__": "", "errors": "", **files}.items():
        path = root / PACKAGE / f"{name.replace('__in__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root / PACKAGE


def test_a_clean_package_has_no_fault(tmp_path: Path) -> None:
    root = package(
        tmp_path,
        axes="from megatron_elastic.errors import ElasticError",
        masks="import torch\nfrom megatron_elastic import axes\n",
        ops__in__norm="from ..masks import soft\n",
        evaluation="from megatron_elastic.training import x\nimport megatron.training\n",
        training="from megatron.training import pretrain\nfrom megatron_elastic.megatron_compat import x\n",
        megatron_compat="from megatron_elastic.errors import ElasticError\n",
        cli__in__main="from megatron_elastic import evaluation\n",
        corpus="def f():\n    from megatron.core import y\n",
    )
    assert faults(root) == []


def only(found: list[str], text: str) -> bool:
    return len(found) == 1 and text in found[0]


def test_each_rule_is_enforced(tmp_path: Path) -> None:
    def broken(case: str, **files: str) -> list[str]:
        return faults(package(tmp_path / case, **files))

    assert only(broken("up", axes="from megatron_elastic import masks", masks=""), "imports go down only")
    assert only(broken("lazy_up", axes="def f():\n    import megatron_elastic.masks", masks=""), "imports go down only")
    assert only(broken("relative", axes="from . import masks", masks=""), "imports go down only")
    assert only(broken("nested", ops__in__a="from ..layers.b import x", layers__in__b=""), "imports go down only")
    assert only(
        broken("cycle", masks="import megatron_elastic.router", router="import megatron_elastic.masks"), "cycle"
    )
    assert only(broken("unknown", helpers=""), "in no layer")
    assert only(broken("beside", training="import megatron_elastic.report", report=""), "beside the trunk")
    assert only(broken("reach", report="import megatron_elastic.model", model=""), "imports go down only")
    assert only(broken("cli", report="import megatron_elastic.cli.x", cli__in__x=""), "command line")
    assert only(broken("engine", sorting="import megatron_elastic.cpu.x", cpu__in__x=""), "may touch the engine")
    assert only(broken("adapts", cpu__in__x="import megatron_elastic.axes", axes=""), "errors alone")
    assert only(broken("core", extraction="from megatron.core import x"), "torch alone")
    assert only(broken("guarded", masks="try:\n    import megatron.core\nexcept ImportError:\n    pass"), "torch alone")
    assert only(broken("training", layers__in__a="def f():\n    from megatron import training"), "megatron.training")
    assert only(broken("models", model="from megatron.training.arguments import x"), "megatron.training")
    assert broken("model", model="from megatron.training.models.hybrid import HybridModelConfig") == []
