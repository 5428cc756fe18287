"""The run in Weights & Biases that belongs to a folder of checkpoints: one, through stops, stages and the report."""

import json
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_elastic.errors import ElasticError

RUN_FILE = "wandb_run.json"
"""Inside the checkpoint folder: which run the checkpoints there belong to."""


def offline_without_account() -> Mapping[str, str]:
    """What keeps wandb from asking for an account where there is none: nothing where the user has chosen a mode."""
    has_account = "WANDB_API_KEY" in os.environ or Path("~/.netrc").expanduser().exists()
    return {} if has_account or "WANDB_MODE" in os.environ else {"WANDB_MODE": "offline"}


def _known(save: str | Path) -> dict[str, str]:
    try:
        found: dict[str, str] = json.loads((Path(save) / RUN_FILE).read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ElasticError(
            f"{Path(save) / RUN_FILE} is damaged ({error}): remove it, and what follows is logged as a new run"
        ) from error
    return found


def join(flags: Mapping[str, Any], save: str | Path, job_type: str) -> None:
    """Lets the `wandb.init` to come go on with this folder's run, or begin it; for the rank that Megatron logs on.

    The run's name, project and entity are Megatron's flags. What the user has put into wandb's own variables
    (`WANDB_RUN_ID`, `WANDB_RESUME`, `WANDB_RUN_GROUP`, `WANDB_JOB_TYPE`) stays.

    Args:
        flags: Megatron's, of the recipe; without `wandb-project` there is nothing to do.
        save: checkpoint folder.
        job_type: what kind of run of the group it is.

    Raises:
        ElasticError: the folder's record is damaged.
    """
    if not flags.get("wandb-project"):
        return
    known = _known(save)
    run = os.environ.get("WANDB_RUN_ID") or known.get("id") or secrets.token_hex(4)
    if known.get("id") != run:
        path = Path(save) / RUN_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(json.dumps({"id": run, "job_type": job_type}) + "\n", "utf-8")
        temporary.replace(path)
    os.environ["WANDB_RUN_ID"] = run
    os.environ.setdefault("WANDB_RESUME", "allow")
    os.environ.setdefault("WANDB_RUN_GROUP", str(flags.get("wandb-exp-name") or flags["wandb-project"]))
    os.environ.setdefault("WANDB_JOB_TYPE", job_type)


def publish(
    flags: Mapping[str, Any],
    save: str | Path,
    *,
    folder: str | Path,
    summary: Mapping[str, float],
    files: Sequence[Path],
    checkpoints: Mapping[str, Path],
) -> bool:
    """Adds a finished run's report and submodels to its run: files as an artifact, checkpoints by reference.

    Args:
        flags: Megatron's, of the recipe.
        save: checkpoint folder of the run.
        folder: that relative paths of the flags are in.
        summary: values for the run's summary.
        files: of the report.
        checkpoints: name -> extracted checkpoint.

    Returns:
        Whether there is a run to add to.

    Raises:
        ElasticError: wandb cannot be reached.
    """
    known = _known(save)
    if not flags.get("wandb-project") or not known:
        return False
    import wandb

    os.environ.update(offline_without_account())
    name = str(flags.get("wandb-exp-name") or flags["wandb-project"])
    try:
        with wandb.init(
            project=flags["wandb-project"],
            entity=flags.get("wandb-entity"),
            name=name,
            id=known["id"],
            resume="allow",
            group=os.environ.get("WANDB_RUN_GROUP", name),
            job_type=os.environ.get("WANDB_JOB_TYPE", known.get("job_type")),
            dir=str(Path(folder) / str(flags.get("wandb-save-dir") or Path(save) / "wandb")),
        ) as run:
            run.summary.update(dict(summary))
            report = wandb.Artifact(f"{name}-report", type="report")
            for path in files:
                report.add_file(str(path), name=str(path.relative_to(folder)))
            run.log_artifact(report)
            for budget, path in checkpoints.items():
                model = wandb.Artifact(f"{name}-{budget}", type="model", metadata={"budget": budget})
                model.add_reference(path.resolve().as_uri(), checksum=False)
                run.log_artifact(model)
    except wandb.Error as error:
        raise ElasticError(
            f"the report is written, but wandb did not take it: {error}. Run `megatron-elastic report` again, or with "
            "WANDB_MODE=offline"
        ) from error
    return True
