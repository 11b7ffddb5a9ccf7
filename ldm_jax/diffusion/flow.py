"""The noise levels of rectified flow at which samplers call the network, between its timesteps (Esser 2024).

With T timesteps the training has z_t = (1 - s) z0 + s eps at s = 1/T, 2/T ... 1, which are t = 0 ... T - 1, so that
t = T s - 1. Samplers may stand between them. diffusers' networks are conditioned on T s, which is t + 1.
"""

from dataclasses import dataclass

import numpy as np

from ldm_jax.diffusion.process import Point
from ldm_jax.diffusion.uneven import uneven_levels


def shifted(s: np.ndarray, shift: float) -> np.ndarray:
    """Noise levels s in [0, 1], of any shape, moved to more noise by a shift above 1 (Esser 2024, eq. 23)."""
    return shift * s / (1 + (shift - 1) * s)


@dataclass(frozen=True)
class FlowSpacing:
    """The noise levels of a sampler of rectified flow, as diffusers' schedulers place them.

    Attributes:
      ramp: even steps from noise to data: `flow_match` from 1 to 1/T, which is shifted before and after, `unipc` from
        1 - 1e-6, `dpm` from 1 - 1/T; the last two leave out their ends, near data.
      shift: see `shifted`; above 0.
      terminal: the last level, to which all are stretched away from 1; None = where it is.
      uneven: a spacing of `uneven.uneven_levels` between the first level and the last, in s; None = as above.
      whole_t: whether the network's timestep T s is rounded down.
    """

    ramp: str = "flow_match"
    shift: float = 1.0
    terminal: float | None = None
    uneven: str | None = None
    whole_t: bool = False

    def levels(self, T: int, steps: int) -> list[Point]:
        """The noise levels, descending, of T timesteps; ValueError for one step that must end on `terminal`."""
        s = shifted(self._ramp(T, steps), self.shift)
        if self.terminal is not None:
            if steps == 1:
                raise ValueError(f"noise levels from 1 to the terminal {self.terminal} are 2 steps or more, got 1")
            s = 1 - (1 - s) / ((1 - s[-1]) / (1 - self.terminal))
        if self.ramp == "unipc" and s[0] > 1 - 1e-6:
            s[0] -= 1e-6  # lambda = log(alpha / sigma) is finite
        s = s if self.uneven is None else uneven_levels(self.uneven, s[0], s[-1], steps)
        t = np.floor(T * s) if self.whole_t else T * s
        return [Point(float(at) - 1, float(1 - level), float(level)) for at, level in zip(t, s)]

    def _ramp(self, T: int, steps: int) -> np.ndarray:
        if self.ramp == "flow_match":
            return np.linspace(1, shifted(1 / T, self.shift), steps)
        even = np.linspace(1, 1 / T, steps + 1)
        return even[:-1] if self.ramp == "unipc" else (1 - even)[:0:-1]  # each rounded as in diffusers


EVEN = FlowSpacing()  # 1, ..., 1/T in even steps
