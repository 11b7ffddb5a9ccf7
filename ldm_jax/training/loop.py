"""The training loop of a stage: one compiled call per step, dispatched ahead of the device.

Metrics are fetched one interval late. A step that is not finite leaves the state unchanged (see `state.update_if`), so
that noticing it late loses nothing.
"""

import math
import time
from collections import deque
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import numpy as np

from ldm_jax.diffusion.random import Stream
from ldm_jax.errors import Interrupted, RunError
from ldm_jax.run_folder.checkpoint import Checkpoints
from ldm_jax.run_folder.log import Log
from ldm_jax.runtime.clock import Clock
from ldm_jax.runtime.engine import PMAP, Engine
from ldm_jax.runtime.interrupt import InterruptWatch
from ldm_jax.runtime.parallel import take

IN_FLIGHT = 8  # steps dispatched ahead: enough to keep the device busy, few enough to stop within seconds


def initial_state(init: Callable[..., Any], seed: int, *arguments: Any, engine: Engine = PMAP) -> Any:
    """The state `init(key, *arguments)` by the key of a run's seed; compiled without optimization, as it runs once."""
    key = jax.random.fold_in(jax.random.key(seed), Stream.INIT)
    return engine.init(init, key, *arguments, compiler_options={"xla_backend_optimization_level": 0})


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
    engine: Engine = PMAP,
    variant: Callable[[int], dict[str, bool]] = lambda step: {},
    begin: Callable[[Any], None] = lambda state: None,
    after_step: Callable[[int, Any], None] = lambda step, state: None,
) -> Any:
    """Trains `stage` from its newest checkpoint, or else from `initial`, to step `steps`; returns the state.

    Args:
      name: of the stage, in the log and in progress lines.
      stage: has step(state, frozen, batch, seed, axis_name) and trace(state, frozen, batch, seed).
      initial: the state before the first step.
      steps, seed: the number of steps, and the seed of the run.
      feed: `feed(step)` -> this process's batch; `feed.resident` -> arrays that are kept on the device.
      frozen: arrays that the step needs and that are not trained.
      checkpoints, log, watch: of the run; log_every, checkpoint_every: steps between its log lines and checkpoints.
      engine: the distribution of the steps over the devices.
      variant: step -> static keyword arguments of `stage.step`, each compiled by itself (`lax.cond` is slow on CPUs).
      begin: called with the state that training goes on from, or that of a training that was complete.
      after_step: called with (number of steps made, state) after each step.

    Raises:
      Interrupted: a signal stopped the run, whose state is saved.
      RunError: a loss or gradient is not finite, or a checkpoint could not be saved.
    """
    restored = checkpoints.restore(initial)
    state = engine.place_params(initial if restored is None else restored)
    start = int(state.step)
    log.rewind(name, start)
    begin(state)
    if start >= steps:
        return state
    frozen, resident = engine.place_params(frozen), engine.place(feed.resident)
    progress, in_flight, compiled = Progress(name, steps), deque(), cache(partial(engine.step, stage))

    def report(last: int, interval: list[dict]) -> None:
        """Logs the means of the metrics of the steps up to `last`; raises RunError if one is not finite."""
        for step, values in zip(range(last - len(interval), last), interval):
            if not all(np.isfinite(value) for value in values.values()):
                _fail(name, stage, state, frozen, resident, feed, step, seed, checkpoints, engine)
        means = {key: float(np.mean([values[key] for values in interval])) for key in interval[0]}
        log(name, last, **means, examples_per_second=progress.rate)
        progress.print(last, means["loss"])

    metrics = LateMetrics(report)
    log.account("setup", start)
    for step in range(start, steps):
        if watch.stop_requested():
            metrics.end_interval(step)
            metrics.flush()
            _save(name, step, state, checkpoints, log)
            checkpoints.wait()
            raise Interrupted(f"stopped at step {step} of stage {name!r}, which is saved")
        batch, run_step = _next(feed, step, in_flight, log.clock), compiled(**variant(step))
        state, values = run_step(state, frozen, resident, engine.shard_batch(batch), np.int32(step), np.uint32(seed))
        watch.guard(True)
        metrics.add(values)
        in_flight.append(values["loss"])
        if len(in_flight) > IN_FLIGHT:
            in_flight.popleft().block_until_ready()
        done = step + 1
        progress.count(len(batch["id"]) * jax.process_count())
        if done % log_every == 0 or done == steps:
            metrics.end_interval(done)
        if done % checkpoint_every == 0 or done == steps:
            metrics.flush()
            _save(name, done, state, checkpoints, log)
        after_step(done, state)
    metrics.flush()
    _wait(checkpoints, log.clock)
    watch.guard(False)
    return state


def _next(feed: Any, step: int, in_flight: deque, clock: Clock) -> Any:
    """The batch of a step; the time counts as spent on data if the device had nothing left to do at its end."""
    with clock.spend("data", hidden=lambda: bool(in_flight) and not in_flight[-1].is_ready()):
        return feed(step)


def _save(name: str, step: int, state: Any, checkpoints: Checkpoints, log: Log) -> None:
    """Starts to save the state; accounts for the seconds since the last checkpoint."""
    jax.block_until_ready(state)  # saving waits for the steps in flight, whose time is not its own
    with log.clock.spend("checkpoint"):
        checkpoints.save(state)
    log.account(name, step)


def _wait(checkpoints: Checkpoints, clock: Clock) -> None:
    with clock.spend("checkpoint"):
        checkpoints.wait()


class LateMetrics:
    """A queue of metrics on the device, in intervals that are fetched and reported one interval late."""

    def __init__(self, report: Callable[[int, list[dict]], None]) -> None:
        self._report, self._interval, self._complete = report, [], None

    def add(self, metrics: dict[str, jax.Array]) -> None:
        """Appends the metrics of a step to the current interval, without waiting for them."""
        self._interval.append(metrics)

    def end_interval(self, last: int) -> None:
        """Ends the interval at step `last`, and reports the previous one."""
        self.flush()
        self._complete = (last, self._interval) if self._interval else None
        self._interval = []

    def flush(self) -> None:
        """Reports the complete interval, if there is one."""
        if self._complete:
            (last, interval), self._complete = self._complete, None
            self._report(last, jax.device_get(interval))


class Progress:
    """The progress lines of a stage: step, loss, examples per second, time left; one per five seconds at most."""

    def __init__(self, name: str, steps: int) -> None:
        self.name, self.steps, self.rate = name, steps, 0.0
        self._printed, self._marks = time.monotonic(), deque(maxlen=200)

    def count(self, examples: int) -> None:
        """Counts a dispatched step of `examples`; `rate` is the examples per second of the last 200 steps."""
        self._marks.append((time.monotonic(), examples))
        if seconds := self._marks[-1][0] - self._marks[0][0]:
            self.rate = sum(n for _, n in list(self._marks)[1:]) / seconds

    def print(self, step: int, loss: float) -> None:
        """Prints a line, unless one was printed in the last five seconds."""
        now = time.monotonic()
        if jax.process_index() or (now - self._printed < 5.0 and step < self.steps):
            return
        seconds = self._marks[-1][0] - self._marks[0][0]
        left = (self.steps - step) * seconds / max(len(self._marks) - 1, 1)
        line = f"{self.name:>12} {step:>7,}/{self.steps:,}  loss {loss:.4f}  {self.rate:,.0f} images/s"
        print(f"{line}  {math.floor(left / 60)}:{left % 60:02.0f} left", flush=True)
        self._printed = now


def _fail(name, stage, state, frozen, resident, feed, step, seed, checkpoints, engine) -> None:
    """Saves the last finite state, names the first tensor of the step that is not finite, and raises RunError."""
    checkpoints.save(state)
    checkpoints.wait()
    state, frozen, resident = jax.device_get((*engine.gather((state, frozen)), resident))
    batch = take(resident, feed(step)) | {"step": np.int32(step)}
    first = first_nonfinite(stage.trace(state, frozen, batch, np.uint32(seed)))
    raise RunError(
        f"stage {name!r}: the loss or its gradient is not finite at step {step} (seed {seed}); the first tensor "
        f"that is not: {first or 'none, when computed again'}. The state before it is saved; the same command with a "
        f"lower --config.{name}.learning_rate goes on from there"
    )


def first_nonfinite(tensors: Any, name: str = "") -> str | None:
    """The path of the first tensor that is not finite in nested dicts and tuples, in their order, or None."""
    if isinstance(tensors, dict):
        found = (first_nonfinite(value, f"{name}/{key}" if name else key) for key, value in tensors.items())
        return next(filter(None, found), None)
    if isinstance(tensors, (tuple, list)):
        return next(filter(None, (first_nonfinite(value, name) for value in tensors)), None)
    return name if tensors is not None and not np.all(np.isfinite(np.asarray(tensors, np.float64))) else None
