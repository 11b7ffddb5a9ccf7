"""The solver table of a recipe on a model."""

from ldm_jax.diffusion import solvers
from ldm_jax.diffusion.tables import Table, with_resampling
from ldm_jax.errors import InputError
from ldm_jax.pipeline.model import LatentDiffusion
from ldm_jax.sampling.recipe import NO_EDIT, Edit, Solving

LEVELS = ("between", "steps_offset", "flow", "fractional_t")  # options of a solver that place its noise levels


def make_table(
    model: LatentDiffusion,
    solving: Solving,
    edit: Edit = NO_EDIT,
    *,
    denoising_start: float = 0.0,
    denoising_end: float = 1.0,
) -> Table:
    """The table of a solver's steps on a model, with the strength and the resampling of an edit.

    The part of the process from `denoising_start` to `denoising_end` is run: see `solvers.make_table`.

    Raises InputError for a sampler that the model does not have, or a combination that the solver does not take.
    """
    solver = model.defaults.solver(solving.sampler)
    if solving.variance == "learned" and not model.learned_variance:
        raise InputError(
            "sampling: variance learned needs a model trained with --config.diffusion.variance=learned; this one's is "
            "fixed, choose fixed_small or fixed_large"
        )
    off = {"eta": (solving.eta, 0), "threshold": (solving.threshold, 0), "resample": (edit.resample, 1)}
    for name, (value, without) in off.items() if model.mean_flow else ():
        if value != without:
            wrong = f"sampling: {name} is {value}; it must be {without} for a MeanFlow model"
            raise InputError(f"{wrong}, which follows the flow over the whole interval of a step")
    own = {name: getattr(solving, name) for name in ("eta", "churn", "variance")}
    own["spacing"] = _spacing(solving)
    part = {"denoising_start": denoising_start, "denoising_end": denoising_end}
    options = {"prediction": model.prediction, "strength": edit.strength, **part, **solver.options, **own}
    try:
        table = solvers.make_table(solving.sampler, solver.process, solving.steps, **options)
        return table if edit.resample == 1 else with_resampling(table, edit.resample, edit.resample_jump)
    except ValueError as error:
        raise InputError(f"sampling: {error}") from error


def inversion_table(model: LatentDiffusion, solving: Solving) -> Table:
    """The table of DDIM inversion, from clean latents to the noise that a recipe's sampler begins from.

    It has the sampler's noise levels. Raises InputError as `make_table`.
    """
    solver = model.defaults.solver(solving.sampler)
    options = {name: solver.options[name] for name in LEVELS if name in solver.options}
    options |= {"solver": solving.sampler, "spacing": _spacing(solving)}
    try:
        return solvers.make_inversion_table(solver.process, solving.steps, **options)
    except ValueError as error:
        raise InputError(f"inversion: {error}") from error


def _spacing(solving: Solving) -> str | tuple[int, ...]:
    return solving.spacing if isinstance(solving.spacing, str) else tuple(solving.spacing)
