"""Speed of training and sampling, measured before any training by steps on random examples."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from experiments.runner import Workspace
from experiments.untrained import diffusion_start
from ldm_jax.data.feeds import DeviceFeed
from ldm_jax.runtime.parallel import parallel_step, replicate, shard
from ldm_jax.training.from_config import make_autoencoder_stage

SECONDS = {"smoke": 0.1, "minutes": 5.0, "cpu": 5.0, "gpu": 2.0}  # of timed training
EXAMPLES, CLASSES = 1_024, 10  # of the random data
STEPS_IN_FLIGHT = 8  # dispatched before waiting for the last, as in `ldm_jax.training.loop`


class TrainingSetup(NamedTuple):
    """A training stage with its initial state and examples."""

    stage: Any  # see `ldm_jax.training.loop.train`
    state: Any  # initial
    examples: dict[str, np.ndarray]
    batch_size: int
    frozen: dict[str, Any] = {}  # noqa: RUF012


Timing = Callable[[], Callable[[], float]]  # compiles, then returns a function that measures


def measure_speeds(workspace: Workspace, timings: dict[str, Timing]) -> dict[str, float]:
    """Name -> speed, measured now or stored earlier: all compile in parallel, then run one after the other."""
    missing = [name for name in timings if not workspace.is_cached(name)]
    with ThreadPoolExecutor(STEPS_IN_FLIGHT) as pool:
        ready = dict(zip(missing, pool.map(lambda name: timings[name](), missing)))
    with workspace.lock("clock"):
        return {name: workspace.cached(name, ready.get(name)) for name in timings}


def images_per_second(workspace: Workspace, make: Callable[[], TrainingSetup]) -> Timing:
    """Images per second of a stage in training."""
    return lambda: partial(time_steps, *compile_step(make()), SECONDS[workspace.budget])


def seconds_per_image(make: Callable[[], Callable[[int], np.ndarray]]) -> Timing:
    """Seconds per image of the function sample(seed) -> images that `make` returns."""

    def compile_sample() -> Callable[[], float]:
        sample = make()
        num = len(sample(0))  # compiles
        return lambda: min(time_call(partial(sample, seed)) for seed in (1, 2)) / num

    return compile_sample


def time_call(call: Callable[[], Any]) -> float:
    """The seconds that a call takes."""
    start = time.monotonic()
    call()
    return time.monotonic() - start


def compile_step(setup: TrainingSetup) -> tuple[Callable[[int], jax.Array], int]:
    """The compiled training step, step(number) -> loss, and the batch size."""
    feed = DeviceFeed(setup.examples, setup.batch_size, 0)
    frozen, resident = replicate(setup.frozen), replicate(feed.resident)
    state, compiled = replicate(setup.state), parallel_step(setup.stage)

    def step(number: int) -> jax.Array:
        nonlocal state
        state, metrics = compiled(state, frozen, resident, shard(feed(number)), np.int32(number), np.uint32(0))
        return metrics["loss"]

    step(0).block_until_ready()
    return step, setup.batch_size


def time_steps(step: Callable[[int], jax.Array], batch_size: int, limit: float) -> float:
    """Images per second of a training step, over about `limit` seconds."""
    start, done = time.monotonic(), 1
    while (taken := time.monotonic() - start) < limit:
        for number in range(done, done + STEPS_IN_FLIGHT):
            loss = step(number)
        loss.block_until_ready()
        done += STEPS_IN_FLIGHT
    return (done - 1) * batch_size / taken


def image_setup(stage: Any, shape: tuple[int, int, int], batch_size: int) -> TrainingSetup:
    """Setup of a stage trained on images of this shape [H, W, C], with random parameters."""
    init = jax.jit(stage.init, compiler_options={"xla_backend_optimization_level": 0})  # runs once
    return TrainingSetup(stage, init(jax.random.key(0)), random_images(shape), batch_size)


def autoencoder_setup(config: ConfigDict) -> TrainingSetup:
    """Setup of the autoencoder stage of a config, without discriminator."""
    shape = (config.data.image_size, config.data.image_size, config.data.channels)
    return image_setup(make_autoencoder_stage(config), shape, config.autoencoder.batch_size)


def diffusion_setup(config: ConfigDict) -> TrainingSetup:
    """Setup of the diffusion stage of a config, on random images or latents."""
    stage, state, frozen = diffusion_start(config, jax.random.key(0))
    height, width, channels = stage.model.latent_shape
    if stage.model.first_stage.module is None:
        examples = random_images((height, width, channels))
    else:
        moments = rng().normal(size=(EXAMPLES, 1, height, width, 2 * channels)).astype(np.float32)
        examples = {"moments": moments, "label": random_labels()}
    return TrainingSetup(stage, state, examples, config.diffusion.batch_size, frozen)


def random_images(shape: tuple[int, int, int]) -> dict[str, np.ndarray]:
    return {"x": rng().integers(0, 256, (EXAMPLES, *shape), dtype=np.uint8), "label": random_labels()}


def random_labels() -> np.ndarray:
    return rng().integers(0, CLASSES, EXAMPLES).astype(np.int32)


def rng() -> np.random.Generator:
    return np.random.default_rng(0)
