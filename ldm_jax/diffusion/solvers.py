"""Solvers of the reverse process by name, and the tables of their coefficients on a process."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np

from ldm_jax.diffusion import multistep, onestep
from ldm_jax.diffusion.flow import EVEN, FlowSpacing
from ldm_jax.diffusion.prediction import coefficient_tables
from ldm_jax.diffusion.process import CLEAN, VARIANCES, Point, Process
from ldm_jax.diffusion.spacing import noise_levels
from ldm_jax.diffusion.tables import Row, Table, tabulate


def make_table(
    solver: str,
    process: Process,
    steps: int,
    *,
    prediction: str = "eps",
    eta: float = 0.0,
    churn: float = 0.0,
    variance: str = "fixed_small",
    spacing: str | Sequence[int] = "leading",
    between: str = "linspace",
    steps_offset: int = 0,
    flow: FlowSpacing = EVEN,
    set_alpha_to_one: bool = True,
    fractional_t: bool = False,
    strength: float = 1.0,
    strength_keeps_steps: bool = False,
    denoising_start: float = 0.0,
    denoising_end: float = 1.0,
) -> Table:
    """The coefficient table of a solver on a forward process.

    Args:
      solver: a key of SOLVERS.
      process: the forward process that the network was trained with; T is its length.
      steps: in [1, T]; network calls but for `heun`, `edm`, `kdpm2` and `kdpm2_a` (2 steps - 1) and `plms` (steps + 1).
      prediction: of the network; only checked against the process, as a table works on z0.
      eta: ddim's fraction of the ancestral noise, in [0, 1]; 0 is deterministic, 1 is ddpm with the small variance.
        tcd's gamma: the fraction of each step's end that is denoised beyond and noised again; the paper has 0.3.
      churn: edm's S_churn, the noise added before each step, divided over the steps; 0 is `heun` in sigma / alpha.
      variance: ddpm's: `fixed_small` is the posterior's, `fixed_large` the forward step's (Ho 2020, section 3.2),
        `learned` is predicted by the network (Nichol 2021, eq. 15).
      spacing, between, steps_offset, flow: of the timesteps, see `spacing.noise_levels`.
      set_alpha_to_one: whether the last row ends on clean data or at timestep 0 (Stable Diffusion's DDIM;
        `final_sigmas_type` "zero" and "sigma_min" in diffusers' DPM-Solver).
      fractional_t: whether the network is meant to be called between the timesteps, as EDM's is: none is rounded then,
        whatever the solver's grid.
      strength: the fraction of the steps that is run, in (0, 1], rounded down as in diffusers; below 1 the first row
        is at a noise level in the middle, for a noised image.
      strength_keeps_steps: lcm and tcd: all steps are run, among that fraction of the timesteps of the distillation.
      denoising_start, denoising_end: the part of the process that is run, fractions of T counted from noise, as in
        diffusers: steps at t >= (1 - denoising_end) T and t < (1 - denoising_start) T. A sampler that ends at 0.8 is in
        the state in which one that starts at 0.8 begins, though without its history.

    Raises:
      ValueError: unknown option, one out of range or of another solver, or a prediction that does not fit the process.
    """
    for name, value, choices in (("solver", solver, SOLVERS), ("variance", variance, VARIANCES)):
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must lie in [0, 1], got {eta}")
    if churn < 0:
        raise ValueError(f"churn must be 0 or more, got {churn}")
    owners = {"variance": (variance, ("ddpm",)), "eta": (eta, ("ddim", "tcd")), "churn": (churn, ("edm",))}
    for name, (value, solvers) in owners.items():
        if value not in (0, "fixed_small") and solver not in solvers:
            raise ValueError(f"{name} is for {' and '.join(solvers)} only, got {name} = {value} with solver {solver!r}")
    coefficient_tables(prediction, process)

    rows = SOLVERS[solver][1]
    options = {"ddpm": {"variance": variance}, "ddim": {"eta": eta}, "edm": {"churn": churn, "process": process}}
    options |= {"heun": {"process": process}}
    options |= {"tcd": {"eta": eta, "process": process}, "kdpm2": {"process": process}, "kdpm2_a": {"process": process}}
    part = strength if strength_keeps_steps else 1.0
    spaced = {"spacing": spacing, "between": between, "steps_offset": steps_offset, "flow": flow}
    points = _levels(solver, process, steps, **spaced, fractional_t=fractional_t, distilled_part=part)
    points = points if strength_keeps_steps else points[first_step(steps, strength) :]
    start, stop = (_count_above(points, process, fraction) for fraction in (denoising_start, denoising_end))
    if start >= stop:
        none = f"of {len(points)} steps none is between denoising_start {denoising_start} and denoising_end"
        raise ValueError(f"{none} {denoising_end}; take more steps")
    last = CLEAN if set_alpha_to_one else process.point(0)
    if np.allclose(points[-1][1:], last[1:], rtol=1e-9, atol=0):  # of uneven levels, which are rounded: no step up
        points[-1] = points[-1]._replace(alpha=last.alpha, sigma=last.sigma)
    levels = [*points, last]
    options["edm"]["stop"] = levels[stop]
    table_rows = list(rows(levels[start:], **options.get(solver, {})))
    if stop < len(points):  # up to the last row that leads to the first level beyond
        reached = [row.reached == points[stop] for row in table_rows]
        table_rows = table_rows[: len(reached) - reached[::-1].index(True)]
    return tabulate(table_rows, len(process))


def _count_above(points: Sequence[Point], process: Process, fraction: float) -> int:
    """The number of noise levels, descending, in a fraction of the process from noise; rounded as in diffusers."""
    lowest = round((1 - fraction) * len(process))
    return sum(point.t >= lowest for point in points) if lowest else len(points)


def _levels(
    solver: str, process: Process, steps: int, *, spacing: str | Sequence[int], fractional_t: bool, **spaced: Any
) -> list[Point]:
    """The noise levels of a solver, from noise to data: see `make_table`, and `noise_levels` for `spaced`."""
    grid = "fractional" if fractional_t else SOLVERS[solver][0]
    return noise_levels(spacing, process, steps, grid=grid, **spaced)


def make_inversion_table(
    process: Process,
    steps: int,
    *,
    solver: str = "ddim",
    spacing: str | Sequence[int] = "leading",
    fractional_t: bool = False,
    **spaced: Any,
) -> Table:
    """The table of DDIM inversion, from data to noise (Song 2021, section 4.3, as Mokady 2022 and diffusers do it).

    It ends at the noise level at which the sampler of the same arguments begins, and goes through all its levels. Each
    row calls the network at the timestep on which it ends, where the sampler would call it. The data count as timestep
    0, or the sampler's last level if that has less noise, as clean data and a z0_hat do not determine eps.

    Arguments and errors: see `make_table`; `spaced` are between, steps_offset and flow.
    """
    points = _levels(solver, process, steps, spacing=spacing, fractional_t=fractional_t, **spaced)[::-1]
    points = [min(process.point(0), points[0], key=lambda point: point.ratio), *points]
    rows = (Row(now._replace(t=after.t), after, onestep.ddim_step(now, after)) for now, after in pairwise(points))
    return tabulate(rows, len(process))


def first_step(steps: int, strength: float) -> int:
    """The index of the first step that is run at a strength, counted as in diffusers."""
    if not 0 < strength <= 1:
        raise ValueError(f"strength must lie above 0 and up to 1, got {strength}")
    done = int(steps * strength)
    if done == 0:
        raise ValueError(f"strength {strength} of {steps} steps runs none; use {int(np.ceil(1 / strength))} or more")
    return steps - done


# Each solver: its grid of timesteps (see `spacing.noise_levels`), and the rows of its table.
SOLVERS: dict[str, tuple[str, Callable[..., Iterator[Row]]]] = {
    "ddpm": ("integer", onestep.ddpm),  # ancestral sampling (Ho 2020), respaced as Nichol 2021 when steps < T
    "ddim": ("integer", onestep.ddim),  # Song 2021
    "plms": ("integer", multistep.plms),  # Liu 2022, as in CompVis' repository
    "euler": ("continuous", onestep.ddim),  # this and the next five as in k-diffusion
    "euler_a": ("continuous", onestep.euler_a),
    "heun": ("continuous", onestep.heun),
    "lms": ("continuous", multistep.lms),
    "kdpm2": ("continuous", onestep.kdpm2),
    "kdpm2_a": ("continuous", onestep.kdpm2_a),
    "edm": ("continuous", onestep.edm),  # the stochastic sampler of Karras 2022
    "dpmpp_2m": ("endpoint", multistep.dpmpp_2m),  # DPM-Solver++ (Lu 2022), second order
    "dpmpp_2m_sde": ("endpoint", partial(multistep.dpmpp_2m, noisy=True)),
    "dpmpp_3m": ("endpoint", multistep.dpmpp_3m),  # and of third order
    "dpmpp_2s": ("endpoint", onestep.dpmpp_2s),
    "deis": ("endpoint", multistep.deis),  # Zhang 2022, second order
    "unipc": ("endpoint", multistep.unipc),  # Zhao 2023, second order with the corrector
    "lcm": ("lcm", onestep.lcm),  # multistep sampling of latent consistency models (Luo 2023)
    "tcd": ("lcm", onestep.tcd),  # and of trajectory consistency models (Zheng 2024)
}
