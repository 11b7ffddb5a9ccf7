"""Training of the baselines for an equal time, by the main job's training loop."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments import runner, speed
from experiments.baselines.models import SHAPE, Model
from experiments.runner import Workspace
from ldm_jax.data.datasets import load_dataset
from ldm_jax.data.feeds import DeviceFeed
from ldm_jax.run_folder.checkpoint import Checkpoints
from ldm_jax.run_folder.log import Log
from ldm_jax.runtime.interrupt import InterruptWatch
from ldm_jax.training.loop import initial_state, train


def training_setup(workspace: Workspace, model: Model) -> speed.TrainingSetup:
    """The setup that the training of a baseline is timed with."""
    return speed.image_setup(model.stage(1_000), SHAPE, workspace.batch_size)


def trained_for(
    workspace: Workspace, name: str, model: Model, seconds: float, rate: float, seed: int
) -> tuple[Any, int]:
    """Trains for the number of steps that fit into `seconds` at `rate` images per second, in a folder of this name and
    seed; returns the state and the number of steps."""
    steps = workspace.steps_in(seconds, rate, workspace.batch_size)
    return train_baseline(
        workspace, workspace.runs / runner.file_name(f"{name} {seed}"), model.stage(steps), steps, seed
    ), steps


def train_baseline(workspace: Workspace, folder: Path, stage: Any, steps: int, seed: int) -> Any:
    """The state after `steps` on the training images; resumes from the newest checkpoint in `folder`."""
    images = load_dataset("fashion_mnist", workspace.config({}).data.train_split, data_dir=workspace.data_dir).arrays
    folder.mkdir(parents=True, exist_ok=True)
    runner.clear_compiled_programs()
    log, identity = Log(folder, write=True), {"steps": str(steps), "seed": str(seed)}
    with InterruptWatch() as watch, Checkpoints(folder / "baseline", keep=1, identity=identity) as checkpoints:
        try:
            return train(
                "baseline", stage, initial_state(stage.init, seed), steps=steps, seed=seed,
                feed=DeviceFeed(images, workspace.batch_size, seed), frozen={}, checkpoints=checkpoints, log=log,
                watch=watch, log_every=50, checkpoint_every=1_000,
            )  # fmt: skip
        finally:
            log.close()


def sampling_params(model: Model, state: Any) -> Any:
    """The EMA parameters of the network that samples."""
    ema_params = jax.device_get(state.ema_params)
    return ema_params[model.part] if model.part else ema_params


def num_params(state: Any) -> int:
    """The number of parameters of all networks."""
    return sum(leaf.size for leaf in jax.tree.leaves(state.params))


def test_bits(workspace: Workspace, model: Model, params: Any, num: int) -> float:
    """The mean bits per dim of the first `num` test images."""
    images = load_dataset("fashion_mnist", f"test[:{num}]", data_dir=workspace.data_dir).arrays
    keys, batch = jax.random.split(jax.random.key(0), num), min(100, num)
    bits = jax.jit(lambda params, x, label, keys: model.bits(params, x, label, keys))
    parts = [slice(start, start + batch) for start in range(0, num, batch)]
    return float(np.mean([bits(params, images["x"][p], images["label"][p], keys[p]).mean() for p in parts]))
