"""The trained parts of a run folder, read back: the averaged parameters, the autoencoder, the scale of its latents."""

from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from ldm_jax import run_folder
from ldm_jax.training.checkpoint import load_latest, subtree, unflatten

SCALE = "scale.json"  # beside the checkpoints of the autoencoder


def averaged(flat: dict[str, np.ndarray], like: Any, where: Path) -> dict[str, Any]:
    """The averaged parameters of a stage's checkpoint, in the structure of `like`."""
    ema_params = {name.removeprefix("ema_params/"): a for name, a in flat.items() if name.startswith("ema_params/")}
    return unflatten(ema_params, like, where=str(where))


def load_first_stage(path: Path, config: ConfigDict) -> dict[str, Any]:
    """{"autoencoder", "shift", "scale"} of a run folder; pixel space has no parameters, shift 0 and scale 1."""
    if config.autoencoder.kind == "none":
        channels = config.data.channels
        return {"autoencoder": {}, "shift": np.zeros(channels, np.float32), "scale": np.ones(channels, np.float32)}
    shift, scale, _ = load_scale(path)
    return {"autoencoder": load_autoencoder_params(path), "shift": shift, "scale": scale}


def load_autoencoder_params(path: Path) -> dict[str, Any]:
    """The averaged parameters of a run folder's autoencoder; raises InputError if it has none."""
    return subtree(load_latest(path / "autoencoder"), "ema_params/autoencoder")


def load_scale(path: Path) -> tuple[np.ndarray, np.ndarray, str]:
    """The latents' shift and scale, each [c], of a run folder, and what they were measured on."""
    stored = run_folder.read_json(path / "autoencoder" / SCALE, "shift", "scale", "measured_on")
    return np.asarray(stored["shift"], np.float32), np.asarray(stored["scale"], np.float32), stored["measured_on"]


def save_scale(path: Path, shift: np.ndarray, scale: np.ndarray, *, measured_on: str) -> None:
    """Stores the latents' shift and scale, each [c], with the autoencoder."""
    values = {"shift": shift.tolist(), "scale": scale.tolist(), "measured_on": measured_on}
    run_folder.write_json(path / "autoencoder" / SCALE, values)
