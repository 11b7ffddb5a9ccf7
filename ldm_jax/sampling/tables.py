"""What a trained model draws with: its generator, compiled once, and its solver tables."""

from typing import Any

from ml_collections import ConfigDict

from ldm_jax.diffusion.solvers import make_inversion_table, make_table
from ldm_jax.diffusion.tables import Table, with_resampling
from ldm_jax.errors import InputError
from ldm_jax.pipeline import from_config as pipeline_from_config
from ldm_jax.pipeline import model as pipeline_model
from ldm_jax.pipeline.model import Trained


def defaults_of(model: Trained, sampler: str) -> dict[str, Any]:
    """What `sampler` is told unless the user says otherwise: the config's if it is the config's own sampler."""
    sampling = model.config.sampling
    own = {name: sampling[name] for name in ("spacing", "eta", "churn", "variance")}
    if sampler == sampling.sampler:
        return own
    plain = {"eta": 0.0, "churn": 0.0, "variance": "fixed_small"}
    options = pipeline_model.scheduler_of(model.pretrained, sampler).options if model.pretrained else {}
    return own | plain | {name: value for name, value in options.items() if name in own}


def table_of(model: Trained, **choices: Any) -> Table:
    """The solver table of a trained model; choices and errors as in `build_table`."""
    if not model.pretrained:
        return build_table(model.config, **choices)
    sampler, steps, resample, jump = (choices.pop(name) for name in ("sampler", "steps", "resample", "jump"))
    return _resampled(pipeline_model.scheduler_of(model.pretrained, sampler).table(steps, **choices), resample, jump)


def build_table(config: ConfigDict, *, resample: int = 1, jump: int = 1, **changes: object) -> Table:
    """The solver table of `config.sampling`, with `changes`: `sampler` and arguments of `make_table`.

    `resample` and `jump` are RePaint's: see `with_resampling`.

    Raises:
      InputError: a combination that the solver does not take.
    """
    names = ("sampler", "steps", "eta", "churn", "variance", "spacing")
    fields = {name: config.sampling[name] for name in names} | changes
    if fields["variance"] == "learned" and config.diffusion.variance != "learned":
        raise InputError(
            "sampling: variance learned needs a model trained with --config.diffusion.variance=learned; this one's is "
            "fixed, choose fixed_small or fixed_large"
        )
    try:
        table = make_table(
            fields.pop("sampler"),
            pipeline_from_config.build_process(config),
            fields.pop("steps"),
            prediction=config.diffusion.prediction,
            **fields,
        )
    except ValueError as error:
        raise InputError(f"sampling: {error}") from error
    return _resampled(table, resample, jump)


def _resampled(table: Table, times: int, jump: int) -> Table:
    try:
        return table if times == 1 else with_resampling(table, times, jump)
    except ValueError as error:
        raise InputError(f"sampling: {error}") from error


def inversion_table_of(model: Trained, steps: int, spacing: str) -> Table:
    """The table that leads from clean latents to their noise in `steps` steps of DDIM; raises InputError."""
    if model.pretrained:
        process = pipeline_model.scheduler_of(model.pretrained).process
    else:
        process = pipeline_from_config.build_process(model.config)
    try:
        return make_inversion_table(process, steps, spacing=spacing)
    except ValueError as error:
        raise InputError(f"inversion: {error}") from error
