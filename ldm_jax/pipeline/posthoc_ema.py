"""The parameters of post-hoc EMA: an average of any length from the snapshots of a run's power function averages."""

from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from ldm_jax.diffusion.posthoc_ema import Average, reconstruction
from ldm_jax.errors import InputError
from ldm_jax.run_folder.checkpoint import ema_params, load_at
from ldm_jax.run_folder.snapshots import FIELD
from ldm_jax.run_folder.store import SNAPSHOTS, checkpoint_steps
from ldm_jax.runtime.terminal import warn

LARGE_ERROR = 0.1  # of the weights, above which a warning is printed


def posthoc_ema(path: Path, config: ConfigDict, flat: dict[str, np.ndarray], like: Any, sigma_rel: float) -> Any:
    """The average of length `sigma_rel` of a run's training up to the checkpoint `flat`, in the structure of `like`.

    One of `config.diffusion.ema_sigma_rels` is in the checkpoint; others are sums of these and the snapshots before it.
    Prints the error of the sum's weights. Raises InputError if the run has no such averages, or a snapshot is damaged.
    """
    where, step, stored = path / "diffusion", int(flat["step"]), config.diffusion.ema_sigma_rels
    if not stored or not any(name.startswith(f"{FIELD}/") for name in flat):
        raise InputError(
            f"--ema_sigma_rel={sigma_rel:g}: --model={path} has no power function averages; train with "
            "--config.diffusion.ema_sigma_rels=(0.05,0.1)"
        )
    if sigma_rel in stored:
        return ema_params(flat, like, where, f"{FIELD}/{sigma_rel}/")
    steps = _steps(path, config.diffusion.ema_snapshot_every, step)
    times, lengths = np.repeat([*steps, step], len(stored)), np.tile(stored, len(steps) + 1)
    coefficients, error = reconstruction(Average(times, lengths), Average(step, sigma_rel))
    by_step = coefficients.reshape(-1, len(stored))
    total: dict[str, np.ndarray] = {}
    for each, weights in zip([*steps, step], by_step):
        _add(total, flat if each == step else _snapshot(path, each), dict(zip(stored, weights)))
    line = f"EMA of sigma_rel {sigma_rel:g} from {len(times)} averages; the error of its weights is {error:.2g}"
    if error > LARGE_ERROR:
        stored_lengths = ", ".join(f"{each:g}" for each in stored)
        warn(f"warning: {line}: sigma_rel is far from those of the run, {stored_lengths}, or snapshots are few")
    else:
        print(line, flush=True)
    return ema_params(total, like, where, "")


def _steps(path: Path, every: int, step: int) -> list[int]:
    """The steps of the snapshots before a checkpoint's `step`; prints a line if some are missing."""
    folder = path / SNAPSHOTS
    steps = sorted(each for each in checkpoint_steps(folder) if each < step)
    if missing := [each for each in range(every, step, every) if each not in steps]:
        first = f"{len(missing)} of {len(range(every, step, every))} snapshots are missing, the first is {missing[0]}"
        warn(f"warning: in {folder} {first}; the EMA is of the others")
    return steps


def _snapshot(path: Path, step: int) -> dict[str, np.ndarray]:
    """The snapshot of a step, name -> float16; raises InputError if it is damaged, or has values beyond float16."""
    others = "without that folder the EMA is made of the others"
    try:
        flat = load_at(path / SNAPSHOTS, step)
    except InputError as error:
        raise InputError(f"--ema_sigma_rel: {error}; {others}") from error
    if large := next((name for name, array in flat.items() if not np.isfinite(array).all()), None):
        raise InputError(f"--ema_sigma_rel: {path / SNAPSHOTS / str(step)}: {large} is beyond float16; {others}")
    return flat


def _add(total: dict[str, np.ndarray], flat: dict[str, np.ndarray], weights: dict[float, float]) -> None:
    """Adds the averages of a snapshot or a checkpoint, times their weights, to the float32 sums by name."""
    for sigma_rel, weight in weights.items():
        prefix = f"{FIELD}/{sigma_rel}/"
        for name, array in flat.items():
            if name.startswith(prefix):
                term = np.float32(weight) * array.astype(np.float32)
                name = name.removeprefix(prefix)
                total[name] = total[name] + term if name in total else term
