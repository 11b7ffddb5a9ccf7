"""Prediction targets of a denoiser (eps, v, z0, flow, edm) as coefficients of (alpha, sigma), one row each.

The target is out = on_z0 z0 + on_eps eps, and at z_t = alpha z0 + sigma eps it means
z0 = (z0_skip z_t + z0_out out) / divisor. All that depends on the prediction is this row.

The division is last for precision: solvers that go back to eps multiply the float32 error of z0 by alpha / sigma, on
a cosine schedule up to 156.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ldm_jax.diffusion.process import Process


class Coefficients(NamedTuple):
    """The coefficients of a prediction at some alpha and sigma: NumPy or JAX arrays, or numbers."""

    on_z0: Any
    on_eps: Any
    z0_skip: Any
    z0_out: Any
    divisor: Any


PREDICTIONS: dict[str, Callable[[Any, Any], Coefficients]] = {
    "eps": lambda a, s: Coefficients(0.0, 1.0, 1.0, -s, a),  # Ho 2020
    "v": lambda a, s: Coefficients(-s, a, a, -s, 1.0),  # Salimans & Ho 2022, section 4
    "z0": lambda a, s: Coefficients(1.0, 0.0, 0.0, 1.0, 1.0),
    "flow": lambda a, s: Coefficients(-1.0, 1.0, 1.0, -s, a + s),  # Liu 2022, eq. 1: dz/dt = eps - z0
    "edm": lambda a, s: Coefficients(s, -a, a, s, 1.0),  # Karras 2022, F in eq. 7 for data of variance 1; -v
}


def coefficients(prediction: str, alpha: Any, sigma: Any) -> Coefficients:
    """The coefficients of a prediction; ValueError for an unknown one."""
    if prediction not in PREDICTIONS:
        raise ValueError(f"prediction must be one of {', '.join(PREDICTIONS)}, got {prediction!r}")
    return PREDICTIONS[prediction](alpha, sigma)


def coefficient_tables(prediction: str, process: Process) -> Coefficients:
    """The coefficients of a prediction at each timestep of a process, [T] float64 each.

    Raises:
      ValueError: an unknown prediction, or one that does not determine z0 at some timestep: eps where alpha = 0 (zero
        terminal SNR), v of a process that does not preserve the variance.
    """
    row, recovers = _tables(prediction, process)
    if not recovers.all():
        t = int(np.flatnonzero(~recovers)[-1])
        why = " (zero terminal SNR)" if process.alpha[t] == 0 else ""
        fitting = " or ".join(name for name in PREDICTIONS if _tables(name, process)[1].all())
        raise ValueError(
            f"prediction {prediction!r} does not determine z0 at timestep {t}, where alpha = {process.alpha[t]:.3g} "
            f"and sigma = {process.sigma[t]:.3g}{why}; predict {fitting}, or choose another noise schedule"
        )
    return row


def _tables(prediction: str, process: Process) -> tuple[Coefficients, np.ndarray]:
    """The coefficients at each timestep, and whether they recover z0 there, [T] bool."""
    alpha, sigma = process.alpha, process.sigma
    with np.errstate(divide="ignore", invalid="ignore"):
        row = Coefficients(*(np.broadcast_to(c, alpha.shape) for c in coefficients(prediction, alpha, sigma)))
        on_z0 = (row.z0_skip * alpha + row.z0_out * row.on_z0) / row.divisor
        on_eps = (row.z0_skip * sigma + row.z0_out * row.on_eps) / row.divisor
    return row, np.isclose(on_z0, 1) & np.isclose(on_eps, 0)


def to_z0(prediction: str, output: Any, z_t: Any, alpha: Any, sigma: Any) -> Any:
    """z0 from a network's output at z_t, float32; alpha and sigma broadcast against z_t [B, ...]."""
    row = coefficients(prediction, alpha, sigma)
    return (row.z0_skip * z_t + row.z0_out * output.astype(np.float32)) / row.divisor


def from_z0(prediction: str, z0: Any, z_t: Any, alpha: Any, sigma: Any) -> Any:
    """The network's output from z0 at z_t, float32: the inverse of `to_z0`; sigma must not be 0."""
    row = coefficients(prediction, alpha, sigma)
    return (row.divisor * z0.astype(np.float32) - row.z0_skip * z_t) / row.z0_out
