"""The forward process q(z_t | z0) = N(alpha_t z0, sigma_t^2 I) (Kingma 2021, eq. 1) as float64 tables on the host.

Variance-preserving diffusion has alpha^2 + sigma^2 = 1, where alpha^2 is the alpha_bar of Ho 2020; rectified flow
(Liu 2022) has alpha + sigma = 1. Solvers, losses, guidance and likelihoods work on any (alpha, sigma).
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

# Of the reverse step p(z_s | z_t): the posterior's, the forward step's, or predicted, between these (Nichol 2021).
VARIANCES = ("fixed_small", "fixed_large", "learned")


class Point(NamedTuple):
    """A noise level of a sampler in float64: z = alpha z0 + sigma eps at timestep t, which may be fractional."""

    t: float
    alpha: float
    sigma: float

    @property
    def ratio(self) -> float:
        """sigma / alpha, the noise on z / alpha, which Karras 2022 calls sigma."""
        with np.errstate(divide="ignore"):
            return np.divide(self.sigma, self.alpha)

    @property
    def half_log_snr(self) -> float:
        """lambda = log(alpha / sigma) (Lu 2022)."""
        with np.errstate(divide="ignore"):
            return np.log(np.divide(self.alpha, self.sigma))


CLEAN = Point(0.0, 1.0, 0.0)


@dataclass(frozen=True, eq=False)
class Process:
    """A forward process of T timesteps; equal and hashed by value, so that it can be a static argument.

    Attributes:
      alpha: [T] float64, the weight of z0; falling with t.
      sigma: [T] float64, the weight of eps; rising with t.
    """

    alpha: np.ndarray
    sigma: np.ndarray

    def __post_init__(self) -> None:
        for name in ("alpha", "sigma"):
            table = np.array(getattr(self, name), np.float64)
            table.flags.writeable = False
            object.__setattr__(self, name, table)
        if self.alpha.ndim != 1 or self.alpha.shape != self.sigma.shape or not len(self.alpha):
            raise ValueError(f"alpha and sigma must be of one shape [T], got {self.alpha.shape} and {self.sigma.shape}")

    @classmethod
    def variance_preserving(cls, alpha_bar: np.ndarray) -> "Process":
        """The process of Ho 2020, eq. 4, from its table alpha_bar [T] in [0, 1)."""
        alpha_bar = np.asarray(alpha_bar, np.float64)
        return cls(np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar))

    def __len__(self) -> int:
        return len(self.alpha)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Process) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple[bytes, bytes]:
        return self.alpha.tobytes(), self.sigma.tobytes()

    def point(self, t: int) -> Point:
        """The noise level of timestep t."""
        return Point(float(t), float(self.alpha[t]), float(self.sigma[t]))

    @property
    def is_flow(self) -> bool:
        """Whether this is rectified flow: alpha + sigma = 1 at every timestep (Liu 2022, eq. 1)."""
        return bool(np.allclose(self.alpha + self.sigma, 1, rtol=0, atol=1e-9))

    def time_of(self, ratio: np.ndarray) -> np.ndarray:
        """Fractional timesteps of ratios sigma / alpha, any shape, clipped to [0, T - 1].

        By linear interpolation of the logarithm; of rectified flow of sigma, which is linear in t.
        """
        with np.errstate(divide="ignore"):
            if self.is_flow:
                return np.interp(1 / (1 + 1 / np.asarray(ratio)), self.sigma, np.arange(len(self)))
            return np.interp(np.log(ratio), np.log(self.sigma) - np.log(self.alpha), np.arange(len(self)))

    def between(self, t: float, ratio: float) -> Point:
        """The noise level with this sigma / alpha at a fractional timestep, scaled as its neighbours are.

        Of rectified flow the scale is exact: alpha + sigma = 1.
        """
        size = np.add if self.is_flow else np.hypot
        scale = np.interp(t, np.arange(len(self)), size(self.alpha, self.sigma))
        if np.isinf(ratio):
            return Point(float(t), 0.0, float(scale))
        return Point(float(t), float(scale / size(1, ratio)), float(scale * ratio / size(1, ratio)))


def forward_step(alpha_t, sigma_t, alpha_s, sigma_s) -> tuple[np.ndarray, np.ndarray]:
    """(alpha_ts, variance) of the forward step q(z_t | z_s) = N(alpha_ts z_s, variance I) (Kingma 2021, eq. 21 to 23).

    float64, elementwise. Between neighbouring timesteps the variance is the beta_t of Ho 2020, eq. 2.
    """
    alpha_ts = alpha_t / alpha_s
    return alpha_ts, sigma_t**2 - alpha_ts**2 * sigma_s**2


def posterior(alpha_t, sigma_t, alpha_s, sigma_s) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(on_z0, on_z, variance) of the posterior q(z_s | z_t, z0) = N(on_z0 z0 + on_z z_t, variance I) for s < t.

    Kingma 2021, eq. 25; Ho 2020, eq. 7; with skipped timesteps, Nichol 2021, section 4. float64, elementwise.
    """
    alpha_ts, beta = forward_step(alpha_t, sigma_t, alpha_s, sigma_s)
    return alpha_s * beta / sigma_t**2, alpha_ts * sigma_s**2 / sigma_t**2, beta * sigma_s**2 / sigma_t**2


def neighbours(process: Process) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The levels (alpha_t, sigma_t, alpha_{t-1}, sigma_{t-1}), [T] each; t - 1 of t = 0 is clean data: 1 and 0."""
    before = np.append(1.0, process.alpha[:-1]), np.append(0.0, process.sigma[:-1])
    return process.alpha, process.sigma, *before
