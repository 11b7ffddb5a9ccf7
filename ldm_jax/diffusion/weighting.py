"""Loss weightings over timesteps, as float64 tables on the host."""

from collections.abc import Callable

import numpy as np

from ldm_jax.diffusion.prediction import coefficient_tables
from ldm_jax.diffusion.process import Process

# (SNR [T], d z0 / d out [T], gamma) -> the weight [T] of the squared error of the network's output. A weight w of the
# squared error of z0 is w (d z0 / d out)^2 here.
WEIGHTINGS: dict[str, Callable[[np.ndarray, np.ndarray, float], np.ndarray]] = {
    "uniform": lambda snr, dz0, gamma: np.ones(len(snr)),
    "min_snr": lambda snr, dz0, gamma: np.minimum(snr, gamma) * dz0**2,  # Hang 2023, section 3.4
}


def loss_weights(weighting: str, prediction: str, process: Process, gamma: float = 5.0) -> np.ndarray:
    """The weight of each timestep's squared error of the output, [T] float64.

    min_snr clips the SNR at gamma > 0 (Hang 2023 recommend 5).
    Raises ValueError for unknown weighting, gamma <= 0, or as `prediction.coefficient_tables`.
    """
    row = coefficient_tables(prediction, process)
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting must be one of {', '.join(WEIGHTINGS)}, got {weighting!r}")
    if weighting == "min_snr" and gamma <= 0:
        raise ValueError(f"min_snr needs gamma > 0, got {gamma}")
    return WEIGHTINGS[weighting]((process.alpha / process.sigma) ** 2, row.z0_out / row.divisor, gamma)
