"""Weights & Biases, an optional logger of the values in metrics.jsonl (config.wandb)."""

import importlib.util
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm_jax.errors import InputError, RunError
from ldm_jax.runtime.files import atomic

ID = "wandb_id"  # in the run folder: the id of its W&B run, which a resumed run resumes


def check(project: str) -> None:
    """Raises InputError if config.wandb is a project, "PROJECT" or "ENTITY/PROJECT", and wandb is not installed."""
    spec = importlib.util.find_spec("wandb") if project else None
    if project and (spec is None or spec.origin is None):  # without origin: a folder wandb/ of offline runs
        raise InputError(
            f"config.wandb is {project!r}, and there is no package wandb: pip install wandb, or leave the field empty"
        )


class WandbLog:
    """The W&B run of a run folder. WANDB_MODE=offline writes to the run folder's wandb/, for `wandb sync` later.

    A value is STAGE/NAME, and its step STAGE/step: stages count their steps by themselves, W&B's own only rise.
    """

    def __init__(self, project: str, workdir: Path, config: Mapping[str, Any]) -> None:
        import wandb

        if not (workdir / ID).exists():
            with atomic(workdir / ID) as temporary:
                temporary.write_text(secrets.token_hex(4))
        entity, _, name = project.rpartition("/")
        run = {"id": (workdir / ID).read_text().strip(), "resume": "allow", "name": workdir.name}
        try:
            self._run = wandb.init(project=name, entity=entity or None, dir=workdir, config=dict(config), **run)
        except Exception as error:  # no account, no network
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise RunError(
                f"config.wandb is {project!r}, and W&B did not start ({reason}): `wandb login`, or WANDB_MODE=offline"
            ) from error
        self._stages: set[str] = set()

    def __call__(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Logs the values of a line."""
        if stage not in self._stages:
            self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
            self._stages.add(stage)
        self._run.log({f"{stage}/step": step} | {f"{stage}/{name}": value for name, value in values.items()})

    def close(self) -> None:
        """Ends this process's part of the W&B run."""
        self._run.finish()
