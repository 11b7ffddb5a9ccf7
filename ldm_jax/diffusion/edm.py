"""EDM (Karras 2022): its noise levels and preconditioning as a variance-preserving process and a prediction.

The paper has x = y + sigma n and D(x; sigma) = c_skip x + c_out F(c_in x; c_noise) (eq. 7). With z0 = y / sigma_data,
of variance 1, the network's input is z_t = c_in x = alpha z0 + sigma eps, where sigma / alpha is the paper's sigma over
sigma_data; D / sigma_data is z0_hat; and F is the prediction `edm`, or v if c_out has the other sign.
"""

import math
from typing import NamedTuple

import numpy as np
from jax import Array

from ldm_jax.diffusion.process import Process


class EDM(NamedTuple):
    """The noise levels of an EDM model: T = `timesteps` of them, evenly spaced in log sigma.

    Samplers call the network between them too, as its input c_noise is a number.
    """

    sigma_min: float
    sigma_max: float
    sigma_data: float  # standard deviation of the data
    timesteps: int  # 2 or more

    @property
    def process(self) -> Process:
        """The process of z0 = y / sigma_data."""
        ratio = np.geomspace(self.sigma_min, self.sigma_max, self.timesteps) / self.sigma_data
        return Process(1 / np.hypot(1, ratio), ratio / np.hypot(1, ratio))

    def c_noise(self, t: Array) -> Array:
        """log(sigma) / 4 at timesteps t of any shape, perhaps fractional: what the network is conditioned on."""
        lowest, highest = math.log(self.sigma_min), math.log(self.sigma_max)
        return (lowest + (highest - lowest) / (self.timesteps - 1) * t) / 4
