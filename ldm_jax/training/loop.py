"""The loop of a training stage: one compiled call a step, and nothing that waits for the device but by lagging behind.

Metrics are fetched one interval late. A step that was not finite froze the state (see `state.keep_if`), so finding out
late loses nothing.
"""

import math
import sys
import time
from collections import deque
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import numpy as np

from ldm_jax.errors import RunError
from ldm_jax.run_folder.checkpoint import Checkpoints
from ldm_jax.run_folder.log import Log
from ldm_jax.runtime.interrupt import Interrupted, InterruptWatch
from ldm_jax.runtime.parallel import parallel_step, replicate, shard, take

IN_FLIGHT = 8  # steps the host may run ahead of the device: enough to hide it, few enough to stop within seconds


def train(
    name: str,
    stage: Any,
    *,
    steps: int,
    seed: int,
    feed: Any,
    frozen: dict[str, Any],
    checkpoints: Checkpoints,
    log: Log,
    watch: InterruptWatch,
    log_every: int,
    checkpoint_every: int,
    initial: Any = None,
    variant: Callable[[int], dict[str, bool]] = lambda step: {},
    after_step: Callable[[int, Any], None] = lambda step, state: None,
) -> Any:
    """Trains `stage` from its newest checkpoint, or from the start, to step `steps`; returns the state.

    Args:
      name: of the stage, in the log and on the screen.
      stage: has init(rng), step(state, frozen, batch, seed, axis_name) and trace(state, frozen, batch, seed).
      steps: where to stop; a checkpoint is there then.
      seed: the run's seed.
      feed: `feed(step)` -> this process's batch; `feed.resident` -> arrays that live on the device.
      frozen: arrays the step needs that do not learn.
      checkpoints, log, watch: where progress is kept, told, and cut short.
      log_every: steps between lines of the log.
      checkpoint_every: steps between checkpoints.
      initial: the state to begin from; None: one that `stage.init` draws.
      variant: of a step's number, the keyword arguments of `stage.step` that are compiled in. Each variant is a program
        of its own, as XLA's CPU compiler makes gradients inside a `lax.cond` many times slower.
      after_step: called with (steps made, state) after each step: samples while training.

    Raises:
      Interrupted: after saving, if the run was asked to stop.
      RunError: a loss or gradient was not finite, or a checkpoint could not be saved.
    """
    state = initial
    if state is None:
        # Run once, so the compiler need not try hard: it takes a third of the time this way.
        init = jax.jit(stage.init, compiler_options={"xla_backend_optimization_level": 0})
        state = init(jax.random.fold_in(jax.random.key(seed), 0))
    restored = checkpoints.restore(state)
    state = replicate(state if restored is None else restored)
    start = int(state.step)
    log.rewind(name, start)
    if start >= steps:
        return state
    frozen, resident = replicate(frozen), replicate(feed.resident)
    step = cache(lambda **compiled_in: parallel_step(partial(stage.step, **compiled_in)))
    interval, in_flight, progress = [], deque(), Progress(name, steps)
    unread: tuple[int, list] | None = None

    def read(entry: tuple[int, list] | None) -> None:
        """Fetches an interval's metrics, logs their means, and stops the run if one is not finite."""
        if entry is None:
            return
        last, metrics = entry
        metrics = jax.device_get(metrics)
        for number, values in zip(range(last - len(metrics), last), metrics):
            if not all(np.isfinite(value) for value in values.values()):
                _fail(name, stage, state, frozen, resident, feed, number, seed, checkpoints)
        means = {key: float(np.mean([values[key] for values in metrics])) for key in metrics[0]}
        log(name, last, **means, examples_per_second=progress.rate)
        progress.show(last, means["loss"])

    for number in range(start, steps):
        if watch.asked(number):
            in_flight.clear()
            read((number, interval) if interval else None)
            checkpoints.save(state)
            checkpoints.wait()
            raise Interrupted(f"stopped at step {number} of stage {name!r}, which is saved")
        batch = feed(number)
        one_step = step(**variant(number))
        state, metrics = one_step(state, frozen, resident, shard(batch), np.int32(number), np.uint32(seed))
        watch.guard(True)
        interval.append(metrics)
        in_flight.append(metrics["loss"])
        if len(in_flight) > IN_FLIGHT:
            in_flight.popleft().block_until_ready()
        done = number + 1
        progress.count(done, len(batch["id"]) * jax.process_count())
        if done % log_every == 0 or done == steps:
            read(unread)
            unread, interval = (done, interval), []
        if done % checkpoint_every == 0 or done == steps:
            read(unread)
            unread = None
            checkpoints.save(state)
        after_step(done, state)
    read(unread)
    checkpoints.wait()
    watch.guard(False)
    return state


class Progress:
    """The line that tells where a stage is, at most every few seconds."""

    def __init__(self, name: str, steps: int) -> None:
        self.name, self.steps, self.rate = name, steps, 0.0
        self._shown, self._marks = time.monotonic(), deque(maxlen=200)

    def count(self, done: int, examples: int) -> None:
        """Notes that step `done` of `examples` was dispatched; the rate is that of the last steps."""
        self._marks.append((time.monotonic(), examples))
        (first, _), (last, _) = self._marks[0], self._marks[-1]
        if last > first:
            self.rate = sum(n for _, n in list(self._marks)[1:]) / (last - first)

    def show(self, done: int, loss: float) -> None:
        """Prints the line, unless one was printed in the last five seconds."""
        now = time.monotonic()
        if jax.process_index() or (now - self._shown < 5.0 and done < self.steps):
            return
        (first, _), (last, _) = self._marks[0], self._marks[-1]
        left = (self.steps - done) * (last - first) / max(len(self._marks) - 1, 1)
        print(
            f"{self.name:>12} {done:>7,}/{self.steps:,}  loss {loss:.4f}  {self.rate:,.0f} images/s  "
            f"{math.floor(left / 60)}:{left % 60:02.0f} left"
        )
        sys.stdout.flush()
        self._shown = now


def _fail(name, stage, state, frozen, resident, feed, number, seed, checkpoints) -> None:
    """Saves the last finite state, names the first tensor of the step that is not finite, and raises RunError."""
    checkpoints.save(state)
    checkpoints.wait()
    state, frozen, resident = jax.device_get((state, frozen, resident))
    batch = take(resident, feed(number)) | {"step": np.int32(number)}
    first = first_nonfinite(stage.trace(state, frozen, batch, np.uint32(seed)))
    raise RunError(
        f"stage {name!r}: the loss or its gradient is not finite at step {number} (seed {seed}); the first tensor "
        f"that is not: {first or 'none, when computed again'}. The state before that step is saved; a lower learning "
        "rate may help"
    )


def first_nonfinite(tensors: Any, name: str = "") -> str | None:
    """The path of the first tensor with a NaN or an infinity, in the order in which the dicts were filled."""
    if isinstance(tensors, dict):
        found = (first_nonfinite(value, f"{name}/{key}" if name else key) for key, value in tensors.items())
        return next((path for path in found if path), None)
    if isinstance(tensors, (tuple, list)):
        return next((path for path in (first_nonfinite(value, name) for value in tensors) if path), None)
    return name if tensors is not None and not np.all(np.isfinite(np.asarray(tensors, np.float64))) else None
