"""How fast stages are trained and models sample: measured before anything is trained, by steps on made-up examples."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from experiments.frame import Lab
from experiments.untrained import diffusion_start
from ldm_jax.data.feeds import DeviceFeed
from ldm_jax.runtime.parallel import parallel_step, replicate, shard
from ldm_jax.training.from_config import make_autoencoder_stage

SECONDS = {"smoke": 0.1, "cpu": 5.0, "gpu": 2.0}  # that a stage is timed for
EXAMPLES, CLASSES = 1_024, 10  # made up
AT_ONCE = 8  # steps that are not waited for one by one, as in `ldm_jax.training.loop`


class Course(NamedTuple):
    """A stage and what its steps are given."""

    stage: Any  # see `ldm_jax.training.loop.train`
    state: Any  # before the first step
    examples: dict[str, np.ndarray]
    batch_size: int
    frozen: dict[str, Any] = {}  # noqa: RUF012


Task = Callable[[], Callable[[], float]]  # compiles what the function that it gives then times


def measured(lab: Lab, tasks: dict[str, Task]) -> dict[str, float]:
    """Note -> what its task found out, now or before: they compile side by side, and are timed one by one."""
    missing = [note for note in tasks if not lab.knows(note)]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        ready = dict(zip(missing, pool.map(lambda note: tasks[note](), missing)))
    with lab.alone("clock"):
        return {note: lab.once(note, ready.get(note)) for note in tasks}


def images_per_second(lab: Lab, make: Callable[[], Course]) -> Task:
    """Of a stage in training."""
    return lambda: partial(timed, *prepared(make()), SECONDS[lab.budget])


def seconds_per_image(make: Callable[[], Callable[[int], np.ndarray]]) -> Task:
    """Of a function from a seed to images."""

    def task() -> Callable[[], float]:
        sample = make()
        num = len(sample(0))  # compiles
        return lambda: min(seconds(partial(sample, turn)) for turn in (1, 2)) / num

    return task


def seconds(call: Callable[[], Any]) -> float:
    """How long a call takes."""
    start = time.monotonic()
    call()
    return time.monotonic() - start


def prepared(course: Course) -> tuple[Callable[[int], jax.Array], int]:
    """(step(number) -> its loss, compiled; the batch size)."""
    feed = DeviceFeed(course.examples, course.batch_size, 0)
    frozen, resident = replicate(course.frozen), replicate(feed.resident)
    state, compiled = replicate(course.state), parallel_step(course.stage)

    def step(number: int) -> jax.Array:
        nonlocal state
        state, metrics = compiled(state, frozen, resident, shard(feed(number)), np.int32(number), np.uint32(0))
        return metrics["loss"]

    step(0).block_until_ready()
    return step, course.batch_size


def timed(step: Callable[[int], jax.Array], batch_size: int, limit: float) -> float:
    """Images a second over about so many seconds."""
    start, done = time.monotonic(), 1
    while (taken := time.monotonic() - start) < limit:
        for number in range(done, done + AT_ONCE):
            loss = step(number)
        loss.block_until_ready()
        done += AT_ONCE
    return (done - 1) * batch_size / taken


def of_images(stage: Any, shape: tuple[int, int, int], batch_size: int) -> Course:
    """A stage that is trained on images of this shape, with all its parameters at random."""
    init = jax.jit(stage.init, compiler_options={"xla_backend_optimization_level": 0})  # runs once
    return Course(stage, init(jax.random.key(0)), made_up_images(shape), batch_size)


def of_autoencoder(config: ConfigDict) -> Course:
    """Stage 1 of a config, without an adversary."""
    shape = (config.data.image_size, config.data.image_size, config.data.channels)
    return of_images(make_autoencoder_stage(config), shape, config.autoencoder.batch_size)


def of_diffusion(config: ConfigDict) -> Course:
    """Stage 2 of a config, on made-up images or latents."""
    stage, state, frozen = diffusion_start(config, jax.random.key(0))
    height, width, channels = stage.model.latent_shape
    if stage.model.first_stage.module is None:
        examples = made_up_images((height, width, channels))
    else:
        moments = random().normal(size=(EXAMPLES, 1, height, width, 2 * channels)).astype(np.float32)
        examples = {"moments": moments, "label": labels()}
    return Course(stage, state, examples, config.diffusion.batch_size, frozen)


def made_up_images(shape: tuple[int, int, int]) -> dict[str, np.ndarray]:
    return {"x": random().integers(0, 256, (EXAMPLES, *shape), dtype=np.uint8), "label": labels()}


def labels() -> np.ndarray:
    return random().integers(0, CLASSES, EXAMPLES).astype(np.int32)


def random() -> np.random.Generator:
    return np.random.default_rng(0)
