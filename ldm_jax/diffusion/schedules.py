"""Noise schedules: the tables of a forward process with T timesteps, t = T - 1 the noisiest."""

from collections.abc import Callable

import numpy as np

from ldm_jax.diffusion.process import Process


def linear_betas(T: int, beta_start: float, beta_end: float) -> np.ndarray:
    """beta linear in t, [T] float64 (Ho 2020, section 4, from 1e-4 to 0.02)."""
    return np.linspace(beta_start, beta_end, T, dtype=np.float64)


def scaled_linear_betas(T: int, beta_start: float, beta_end: float) -> np.ndarray:
    """sqrt(beta) linear in t, [T] float64 (Stable Diffusion, from 0.00085 to 0.012). CompVis calls it linear."""
    return np.linspace(beta_start**0.5, beta_end**0.5, T, dtype=np.float64) ** 2


def cosine_betas(T: int, s: float = 0.008, beta_max: float = 0.999) -> np.ndarray:
    """beta [T] of Nichol 2021, eq. 17: alpha_bar = f(t) / f(0), f(t) = cos^2((t/T + s) / (1 + s) pi/2), clipped."""
    f = np.cos((np.arange(T + 1) / T + s) / (1 + s) * np.pi / 2) ** 2
    return np.minimum(1 - f[1:] / f[:-1], beta_max)


BETAS: dict[str, Callable[[int, float, float], np.ndarray]] = {
    "linear": linear_betas,
    "scaled_linear": scaled_linear_betas,
    "cosine": lambda T, beta_start, beta_end: cosine_betas(T),
}


def rectified_flow(T: int) -> Process:
    """alpha = 1 - s, sigma = s, with s = 1/T, 2/T ... 1 (Liu 2022, eq. 1): z_T is pure noise."""
    s = np.arange(1, T + 1) / T
    return Process(1 - s, s)


SCHEDULES = (*BETAS, "rectified_flow")


def make_process(
    schedule: str,
    timesteps: int,
    *,
    beta_start: float = 0.00085,
    beta_end: float = 0.012,
    zero_terminal_snr: bool = False,
) -> Process:
    """The forward process of a noise schedule.

    Args:
      schedule: one of SCHEDULES.
      timesteps: T, at least 1.
      beta_start, beta_end: the first and the last beta of linear and scaled_linear, by default Stable Diffusion's.
      zero_terminal_snr: rescale the betas so that alpha[T - 1] = 0 (Lin 2023), where eps does not determine z0.

    Raises ValueError for unknown schedule, or T or a beta out of range.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")
    if timesteps < 1:
        raise ValueError(f"a schedule needs T >= 1 timesteps, got T = {timesteps}")
    if not 0 < beta_start <= beta_end < 1:
        raise ValueError(f"betas must satisfy 0 < beta_start <= beta_end < 1, got {beta_start} and {beta_end}")
    if schedule == "rectified_flow":
        return rectified_flow(timesteps)
    return process_of_betas(BETAS[schedule](timesteps, beta_start, beta_end), zero_terminal_snr=zero_terminal_snr)


def process_of_betas(beta: np.ndarray, *, zero_terminal_snr: bool = False) -> Process:
    """The variance-preserving process of betas [T] in (0, 1), which may be rescaled by `rescale_zero_terminal_snr`.

    q(z_t | z_{t-1}) = N(sqrt(1 - beta_t) z_{t-1}, beta_t I) (Ho 2020, eq. 2).
    """
    beta = rescale_zero_terminal_snr(beta) if zero_terminal_snr else beta
    return Process.variance_preserving(np.cumprod(1 - beta))


def rescale_zero_terminal_snr(beta: np.ndarray) -> np.ndarray:
    """The betas [T >= 2] with sqrt(alpha_bar) shifted and scaled to end at 0, its first value kept (Lin 2023)."""
    if len(beta) < 2:
        raise ValueError(f"zero terminal SNR needs T >= 2 timesteps, got T = {len(beta)}")
    root = np.sqrt(np.cumprod(1 - np.asarray(beta, np.float64)))
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    alpha_bar = root**2
    return 1 - alpha_bar / np.append(1.0, alpha_bar[:-1])
