"""The memory of a run's training steps, and how long they take, estimated before it starts.

Each stage's last step is compiled, and a few steps are measured, as training calls them, so that nothing compiles
twice; the measured steps have parameters of zeros and change nothing.
"""

import time
from collections import Counter
from typing import Any

import jax
import numpy as np

from ldm_jax.run_folder.layout import checkpoint_steps
from ldm_jax.runtime.memory import device_memory
from ldm_jax.training.compiled_step import GB, step_memory
from ldm_jax.training.from_config import autoencoder_terms
from ldm_jax.training.run import Run, make_feed
from ldm_jax.training.stage_inputs import StageInputs, stage_inputs

FEW = 500  # steps: a shorter training is not worth measuring
MEASURED = 4  # steps


def print_estimate(run: Run) -> None:
    """Prints the memory and the duration of the stages of a run that are not trained yet.

    No memory on several hosts, and no duration of few steps.
    """
    made = {name: max(checkpoint_steps(run.workdir / name), default=0) for name in run.config.stages}
    left = {name: max(0, run.config[name].steps - made[name]) for name in made}
    if not any(left.values()):
        return
    stages = [inputs for inputs in stage_inputs(run) if left[inputs.name]]
    if jax.process_count() == 1:  # pmap on several hosts does not compile for shapes
        _print_memory({inputs.name: step_memory(run, inputs) for inputs in stages})
    if run.config.init_from or sum(left.values()) < FEW:
        return
    seconds = {inputs.name: _seconds(run, inputs, made[inputs.name]) for inputs in stages}
    parts = ", ".join(f"{name} {_duration(value)}" for name, value in seconds.items())
    if jax.process_index() == 0 and seconds:
        print(f"Training takes about {_duration(sum(seconds.values()))} ({parts}), by {MEASURED} steps of each stage; "
              "then come samples and scores", flush=True)  # fmt: skip


def _print_memory(needed: dict[str, int]) -> None:
    """Prints the memory of each stage's step on a device, and what is too much."""
    if not needed:
        return
    parts, limit = ", ".join(f"{name} {size / GB:.2f} GB" for name, size in needed.items()), device_memory()
    line = f"Memory: training needs {max(needed.values()) / GB:.2f} GB of {limit / GB:.1f} GB on each device ({parts})"
    too_much = "; that is too much: --compile_for=local lists it by kind, and what to change"
    print(line + too_much * (max(needed.values()) > limit), flush=True)


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _seconds(run: Run, inputs: StageInputs, done: int) -> float:
    """The duration of the steps of a stage that are left."""
    config, steps = run.config, run.config[inputs.name].steps
    if inputs.name != "autoencoder":
        return (steps - done) * _seconds_per_step(run, inputs)
    parts = Counter(tuple(autoencoder_terms(config, step).items()) for step in range(done, steps))
    return sum(n * _seconds_per_step(run, inputs, **dict(terms)) for terms, n in parts.items())


def _seconds_per_step(run: Run, inputs: StageInputs, **variant: bool) -> float:
    """The duration of a step, by MEASURED of them after one that compiles."""
    engine, feed = run.engine, make_feed(run, inputs.source, run.config[inputs.name].batch_size)
    step, state = engine.step(inputs.stage, **variant), engine.place_params(_zeros(inputs.state()))
    frozen, resident, seed = (
        engine.place_params(_zeros(inputs.frozen)),
        engine.place(feed.resident),
        np.uint32(run.config.seed),
    )
    state, metrics = step(state, frozen, resident, engine.shard_batch(feed(0)), np.int32(0), seed)
    jax.block_until_ready((state, metrics))
    start = time.monotonic()
    for index in range(MEASURED):
        state, metrics = step(state, frozen, resident, engine.shard_batch(feed(index)), np.int32(index), seed)
    jax.block_until_ready((state, metrics))
    return (time.monotonic() - start) / MEASURED


def _zeros(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), tree)
