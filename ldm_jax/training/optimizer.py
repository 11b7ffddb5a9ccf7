"""The optimizers of the training stages: AdamW, and Muon for the kernels of the hidden layers."""

from functools import lru_cache
from typing import Any, NamedTuple

import jax
import optax
from optax import GradientTransformation
from optax.contrib import MuonDimensionNumbers, muon

OPTIMIZERS = ("adamw", "muon")
ENDS = ("conv_in", "conv_out")  # the first and last layers, whose kernels AdamW updates
MUON_RMS = 0.2  # root mean square of a kernel's update, per learning rate: about that of AdamW (Liu 2025, section 2.2)


class Optimization(NamedTuple):
    """The optimizer, clipping by the global gradient norm, and the learning rate schedule with linear warm-up."""

    steps: int  # of the whole learning rate schedule
    learning_rate: float
    warmup_steps: int
    decay: str  # of the learning rate after warm-up: constant or cosine
    adam_b2: float
    weight_decay: float
    clip_norm: float
    optimizer: str = "adamw"  # or "muon"


@lru_cache(maxsize=32)
def make_optimizer(optimization: Optimization) -> GradientTransformation:
    """The optimizer; equal arguments give the same object.

    AdamW (Loshchilov & Hutter 2019) has beta1 = 0.9. Muon (Jordan 2024) updates the kernels of all layers but the first
    and the last by their orthogonalized momentum, of beta 0.95; AdamW updates all other parameters. With Muon both have
    Nesterov momentum.

    Raises:
      ValueError: for an unknown optimizer or decay.
    """
    if optimization.optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer is {optimization.optimizer!r}; it must be one of {', '.join(OPTIMIZERS)}")
    rate, decay = _learning_rate(optimization), optimization.weight_decay
    adam = {"b1": 0.9, "b2": optimization.adam_b2}
    if optimization.optimizer == "adamw":
        update = optax.adamw(rate, **adam, eps=1e-8, weight_decay=decay)
    else:
        update = muon(
            rate,
            weight_decay=decay,
            adam_weight_decay=decay,
            consistent_rms=MUON_RMS,
            muon_weight_dimension_numbers=hidden_kernels,
            **{f"adam_{name}": value for name, value in adam.items()},
        )
    return optax.chain(optax.clip_by_global_norm(optimization.clip_norm), update)


def _learning_rate(optimization: Optimization) -> optax.Schedule:
    """The learning rate by step."""
    rate, warmup = optimization.learning_rate, optimization.warmup_steps
    if optimization.decay == "cosine":
        return optax.warmup_cosine_decay_schedule(0.0, rate, warmup, max(optimization.steps, warmup + 1))
    if optimization.decay == "constant":
        # Not optax.warmup_constant_schedule, which with 0 warm-up steps stays at 0.
        return optax.join_schedules([optax.linear_schedule(0.0, rate, warmup), optax.constant_schedule(rate)], [warmup])
    raise ValueError(f"decay is {optimization.decay!r}; it must be 'constant' or 'cosine'")


def hidden_kernels(params: Any) -> Any:
    """Which parameters Muon updates: a tree with, for these, the axes of inputs and outputs, and None for the others.

    A kernel [..., C, D] is a matrix of D rows for it: all axes but the last are of inputs.
    """

    def axes(path: tuple, leaf: Any) -> MuonDimensionNumbers | None:
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        if names[-1:] != ["kernel"] or leaf.ndim < 2 or any(name in ENDS for name in names):
            return None
        return MuonDimensionNumbers(tuple(range(leaf.ndim - 1)), leaf.ndim - 1)

    return jax.tree_util.tree_map_with_path(axes, params)
