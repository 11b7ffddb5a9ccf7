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

from ldm_jax.diffusion.random import Stream
from ldm_jax.errors import RunError
from ldm_jax.run_folder.checkpoint import Checkpoints
from ldm_jax.run_folder.log import Log
from ldm_jax.runtime.interrupt import Interrupted, InterruptWatch
from ldm_jax.runtime.parallel import parallel_step, replicate, shard, take

IN_FLIGHT = 8  # steps the host may run ahead of the device: enough to hide it, few enough to stop within seconds


def initial_state(init: Callable[..., Any], seed: int, *arguments: Any) -> Any:
    """The state that `init(rng, *arguments)` makes of a run's seed; run once, it is compiled without optimization."""
    compiled = jax.jit(init, compiler_options={"xla_backend_optimization_level": 0})
    return compiled(jax.random.fold_in(jax.random.key(seed), Stream.INIT), *arguments)


def train(
    name: str,
    stage: Any,
    initial: Any,
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
    variant: Callable[[int], dict[str, bool]] = lambda step: {},
    after_step: Callable[[int, Any], None] = lambda step, state: None,
) -> Any:
    """Trains `stage` from its newest checkpoint, or from the initial state, to step `steps`; returns the state.

    Args:
      name: of the stage, in the log and on the screen.
      stage: has step(state, frozen, batch, seed, axis_name) and trace(state, frozen, batch, seed).
      initial: the state before the first step.
      steps: where to stop; a checkpoint is there then.
      seed: the run's seed.
      feed: `feed(step)` -> this process's batch; `feed.resident` -> arrays that live on the device.
      frozen: arrays that the step needs and that are not trained.
      checkpoints, log, watch: where progress is kept and logged, and what interrupts it.
      log_every: steps between lines of the log.
      checkpoint_every: steps between checkpoints.
      variant: step index -> the keyword arguments of `stage.step` that are compiled in. Each variant is a program of
        its own, as XLA's CPU compiler makes gradients inside a `lax.cond` many times slower.
      after_step: called with (steps made, state) after each step: samples while training.

    Raises:
      Interrupted: after saving, if the run was interrupted.
      RunError: a loss or gradient was not finite, or a checkpoint could not be saved.
    """
    restored = checkpoints.restore(initial)
    state = replicate(initial if restored is None else restored)
    start = int(state.step)
    log.rewind(name, start)
    if start >= steps:
        return state
    frozen, resident = replicate(frozen), replicate(feed.resident)
    progress, in_flight, compiled = Progress(name, steps), deque(), cache(partial(parallel_step, stage))

    def report(last: int, interval: list[dict]) -> None:
        """Logs the means of an interval's metrics, and stops the run if one is not finite."""
        for step, values in zip(range(last - len(interval), last), interval):
            if not all(np.isfinite(value) for value in values.values()):
                _fail(name, stage, state, frozen, resident, feed, step, seed, checkpoints)
        means = {key: float(np.mean([values[key] for values in interval])) for key in interval[0]}
        log(name, last, **means, examples_per_second=progress.rate)
        progress.show(last, means["loss"])

    metrics = LateMetrics(report)
    for step in range(start, steps):
        if watch.asked(step):
            metrics.end_interval(step)
            metrics.flush()
            checkpoints.save(state)
            checkpoints.wait()
            raise Interrupted(f"stopped at step {step} of stage {name!r}, which is saved")
        batch, run_step = feed(step), compiled(**variant(step))
        state, values = run_step(state, frozen, resident, shard(batch), np.int32(step), np.uint32(seed))
        watch.guard(True)
        metrics.add(values)
        in_flight.append(values["loss"])
        if len(in_flight) > IN_FLIGHT:
            in_flight.popleft().block_until_ready()
        done = step + 1
        progress.count(done, len(batch["id"]) * jax.process_count())
        if done % log_every == 0 or done == steps:
            metrics.end_interval(done)
        if done % checkpoint_every == 0 or done == steps:
            metrics.flush()
            checkpoints.save(state)
        after_step(done, state)
    metrics.flush()
    checkpoints.wait()
    watch.guard(False)
    return state


class LateMetrics:
    """The metrics of steps, on the device, whose intervals are fetched and reported one late."""

    def __init__(self, report: Callable[[int, list[dict]], None]) -> None:
        self._report, self._interval, self._complete = report, [], None

    def add(self, metrics: dict[str, jax.Array]) -> None:
        """Keeps the metrics of a step, without waiting for them."""
        self._interval.append(metrics)

    def end_interval(self, last: int) -> None:
        """Ends an interval at step `last`, and reports the one before."""
        self.flush()
        self._complete = (last, self._interval) if self._interval else None
        self._interval = []

    def flush(self) -> None:
        """Reports the complete interval, if there is one."""
        if self._complete:
            (last, interval), self._complete = self._complete, None
            self._report(last, jax.device_get(interval))


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


def _fail(name, stage, state, frozen, resident, feed, step, seed, checkpoints) -> None:
    """Saves the last finite state, names the first tensor of the step that is not finite, and raises RunError."""
    checkpoints.save(state)
    checkpoints.wait()
    state, frozen, resident = jax.device_get((state, frozen, resident))
    batch = take(resident, feed(step)) | {"step": np.int32(step)}
    first = first_nonfinite(stage.trace(state, frozen, batch, np.uint32(seed)))
    raise RunError(
        f"stage {name!r}: the loss or its gradient is not finite at step {step} (seed {seed}); the first tensor "
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
