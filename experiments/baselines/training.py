"""Baselines trained for a time by the main job's loop."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments import frame, speed
from experiments.baselines.models import SHAPE, Model
from experiments.frame import Lab
from ldm_jax.data.datasets import load_dataset
from ldm_jax.data.feeds import DeviceFeed
from ldm_jax.run_folder.checkpoint import Checkpoints
from ldm_jax.run_folder.log import Log
from ldm_jax.runtime.interrupt import InterruptWatch
from ldm_jax.training.loop import initial_state, train


def course(lab: Lab, model: Model) -> speed.Course:
    """What its training is timed by."""
    return speed.of_images(model.stage(1_000), SHAPE, lab.batch_size)


def trained_for(lab: Lab, name: str, model: Model, seconds: float, rate: float, seed: int) -> tuple[Any, int]:
    """The state after as many steps as fit into the time at `rate` images a second, and their number; in a folder of
    this name and seed."""
    steps = lab.steps_in(seconds, rate, lab.batch_size)
    return train_baseline(lab, lab.runs / frame.file_name(f"{name} {seed}"), model.stage(steps), steps, seed), steps


def train_baseline(lab: Lab, folder: Path, stage: Any, steps: int, seed: int) -> Any:
    """The state after so many steps on the training images; goes on from the newest checkpoint in `folder`."""
    images = load_dataset("fashion_mnist", lab.config({}).data.train_split, data_dir=lab.data_dir).arrays
    folder.mkdir(parents=True, exist_ok=True)
    frame.forget_programs()
    log, identity = Log(folder, write=True), {"steps": str(steps), "seed": str(seed)}
    with InterruptWatch() as watch, Checkpoints(folder / "baseline", keep=1, identity=identity) as checkpoints:
        try:
            return train(
                "baseline", stage, initial_state(stage.init, seed), steps=steps, seed=seed,
                feed=DeviceFeed(images, lab.batch_size, seed), frozen={}, checkpoints=checkpoints, log=log, watch=watch,
                log_every=50, checkpoint_every=1_000,
            )  # fmt: skip
        finally:
            log.close()


def sampling_params(model: Model, state: Any) -> Any:
    """The averaged parameters of what samples."""
    averaged = jax.device_get(state.ema_params)
    return averaged[model.part] if model.part else averaged


def size(state: Any) -> int:
    """The number of all parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(state.params))


def held_out_bits(lab: Lab, model: Model, params: Any, tested: int) -> float:
    """The mean bits per dim of the first test images."""
    images = load_dataset("fashion_mnist", f"test[:{tested}]", data_dir=lab.data_dir).arrays
    keys, batch = jax.random.split(jax.random.key(0), tested), min(100, tested)
    bits = jax.jit(lambda params, x, label, keys: model.bits(params, x, label, keys))
    parts = [slice(start, start + batch) for start in range(0, tested, batch)]
    return float(np.mean([bits(params, images["x"][p], images["label"][p], keys[p]).mean() for p in parts]))
