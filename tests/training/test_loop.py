"""The loop of a stage, on one that learns a mean: what is logged and when, how it stops, resumes and fails."""

from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.errors import Interrupted, RunError
from ldm_jax.run_folder.checkpoint import Checkpoints, load_latest
from ldm_jax.runtime.clock import Clock
from ldm_jax.runtime.engine import PMAP, make_engine
from ldm_jax.runtime.parallel import parallel_step
from ldm_jax.training import loop
from ldm_jax.training.loop import LateMetrics, initial_state
from ldm_jax.training.optimizer import Optimization, make_optimizer
from ldm_jax.training.state import init_state, update_if_finite

OPTIMIZATION = Optimization(8, 0.1, 0, "constant", 0.99, 0.0, 1e9)
DATA = np.random.default_rng(0).normal(3.0, 1.0, 32).astype(np.float32)


@dataclass(frozen=True)
class MeanStage:
    """The mean of numbers, by the squared error; at step `bad` that is not finite. With `twice` it is doubled."""

    bad: int = -1

    def init(self, rng, start=0.0):
        return init_state({"mean": start + jax.random.normal(rng)}, make_optimizer(OPTIMIZATION))

    def step(self, state, frozen, batch, seed, *, twice=False, axis_name=None):
        loss, grads = jax.value_and_grad(self._loss)(state.params, frozen, batch)
        loss *= 1 + twice
        if axis_name is not None:
            loss, grads = jax.lax.pmean((loss, grads), axis_name)
        state, norm = update_if_finite(state, batch["step"], loss, grads, make_optimizer(OPTIMIZATION), 0.9)
        return state, {"loss": loss, "grad_norm": norm, "index": batch["step"]} | ({"twice": loss} if twice else {})

    def trace(self, state, frozen, batch, seed):
        return {"params": state.params, "x": batch["x"], "loss": self._loss(state.params, frozen, batch)}

    def _loss(self, params, frozen, batch):
        loss = ((params["mean"] + frozen["offset"] - batch["x"]) ** 2).mean()
        return jnp.where(batch["step"] == self.bad, jnp.nan, loss)


class Feed:
    """Eight of the numbers, which live on the device, for each step."""

    def __init__(self):
        self.resident = {"x": DATA}

    def __call__(self, step):
        return {"index": (np.arange(8) + 5 * step).astype(np.int32) % 32, "id": np.arange(8, dtype=np.int32)}


@dataclass
class Recorder:
    """A fake log, interrupt watch and after_step, which records its calls."""

    stop_at: int = -1
    polls: int = 0
    lines: list = field(default_factory=list)
    rewound: list = field(default_factory=list)
    after: list = field(default_factory=list)
    guarded: list = field(default_factory=list)
    accounted: list = field(default_factory=list)
    clock: Clock = field(default_factory=Clock)

    def __call__(self, name, step, **values):
        self.lines.append((name, step, values))

    def rewind(self, name, step):
        self.rewound.append((name, step))

    def account(self, stage, step):
        self.accounted.append((stage, step))

    def stop_requested(self):
        self.polls += 1
        return self.polls == self.stop_at + 1

    def guard(self, active):
        self.guarded.append(active)

    def after_step(self, step, state):
        self.after.append((step, int(state.step)))


def train(
    folder, *, steps=8, stage=MeanStage(), start=0.0, stop_at=-1, variant=lambda step: {}, log_every=2, engine=PMAP
):
    """The state after training, and what was recorded on the way, even if that ended with an error."""
    recorder, state, failure = Recorder(stop_at), None, None
    with Checkpoints(folder, keep=9, identity={"config": "mine"}) as checkpoints:
        try:
            state = loop.train(
                "mean", stage, initial_state(stage.init, 7, start, engine=engine), steps=steps, seed=7, feed=Feed(),
                frozen={"offset": np.float32(0.5)}, checkpoints=checkpoints, log=recorder, watch=recorder,
                log_every=log_every, checkpoint_every=4, variant=variant, after_step=recorder.after_step,
                engine=engine,
            )  # fmt: skip
        except (Interrupted, RunError) as error:
            failure = error
    return state, recorder, failure


def saved(folder):
    return sorted(int(path.name) for path in folder.glob("[0-9]*"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with all checkpoints, and what was recorded."""
    folder = tmp_path_factory.mktemp("whole")
    state, recorder, failure = train(folder)
    assert failure is None and int(state.step) == 8
    return folder, recorder


def assert_same(folder, other):
    one, two = load_latest(folder), load_latest(other)
    assert one.keys() == two.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], two[name], err_msg=name)


def test_a_stage_is_trained_logged_and_saved(whole):
    folder, recorder = whole
    assert saved(folder) == [4, 8]
    assert recorder.rewound == [("mean", 0)]
    assert recorder.after == [(step, step) for step in range(1, 9)]
    assert recorder.guarded == [True] * 8 + [False]
    assert [(name, step) for name, step, _ in recorder.lines] == [("mean", step) for step in (2, 4, 6, 8)]
    assert [values["index"] for _, _, values in recorder.lines] == [0.5, 2.5, 4.5, 6.5]  # the means of two steps
    losses = [values["loss"] for _, _, values in recorder.lines]
    assert losses[-1] < losses[0] and all("examples_per_second" in values for _, _, values in recorder.lines)


def test_another_engine_takes_over_half_way_and_back(whole, tmp_path, four_devices):
    fsdp = make_engine("fsdp")
    for steps, engine in ((3, PMAP), (6, fsdp), (8, PMAP)):
        state, recorder, _ = train(tmp_path, steps=steps, engine=engine, log_every=1)
        assert int(state.step) == recorder.lines[-1][1] == steps
    one, two = load_latest(whole[0]), load_latest(tmp_path)
    for name in one:
        np.testing.assert_allclose(one[name], two[name], rtol=1e-5, err_msg=name)
    _, recorder, failure = train(tmp_path / "stopped", engine=fsdp, stop_at=3)
    assert isinstance(failure, Interrupted) and saved(tmp_path / "stopped") == [3]
    _, recorder, failure = train(tmp_path / "failed", stage=MeanStage(bad=5), engine=fsdp)
    assert isinstance(failure, RunError) and "not finite at step 5 (seed 7); the first tensor" in str(failure)
    assert saved(tmp_path / "failed") == [4, 5]


def test_the_last_interval_may_be_shorter(tmp_path):
    _, recorder, _ = train(tmp_path, steps=8, log_every=3)
    assert [(step, values["index"]) for _, step, values in recorder.lines] == [(3, 1.0), (6, 4.0), (8, 6.5)]


def test_a_half_trained_state_is_resumed_whatever_the_initial_one(whole, tmp_path):
    train(tmp_path, steps=4)
    assert saved(tmp_path) == [4]
    _, recorder, _ = train(tmp_path, start=100.0)
    assert recorder.rewound == [("mean", 4)]
    assert [step for _, step, _ in recorder.lines] == [6, 8]
    assert_same(tmp_path, whole[0])
    state, recorder, _ = train(tmp_path)  # there is nothing more to do
    assert int(state.step) == 8 and recorder.lines == recorder.after == []


def test_an_interrupted_stage_saves_and_logs_all_that_is_done(whole, tmp_path):
    _, recorder, failure = train(tmp_path, stop_at=3)
    assert isinstance(failure, Interrupted) and "stopped at step 3 of stage 'mean', which is saved" in str(failure)
    assert saved(tmp_path) == [3]
    assert [(step, values["index"]) for _, step, values in recorder.lines] == [(2, 0.5), (3, 2.0)]
    train(tmp_path)
    assert_same(tmp_path, whole[0])


def test_interrupted_before_its_first_step_it_is_saved_too(tmp_path):
    _, recorder, failure = train(tmp_path, stop_at=0)
    assert isinstance(failure, Interrupted) and recorder.lines == []
    assert saved(tmp_path) == [0]


def test_a_step_that_is_not_finite_ends_the_stage_at_the_state_before(whole, tmp_path):
    """Found out late, as metrics are; the state waits at the step that failed."""
    state, recorder, failure = train(tmp_path, stage=MeanStage(bad=5))
    assert state is None and isinstance(failure, RunError)
    assert "stage 'mean': the loss or its gradient is not finite at step 5 (seed 7); the first tensor" in str(failure)
    assert "that is not: loss." in str(failure)
    assert saved(tmp_path) == [4, 5]
    assert [step for _, step, _ in recorder.lines] == [2, 4]
    train(tmp_path)  # once it is mended, it ends as one that never failed
    assert_same(tmp_path, whole[0])


def test_the_arguments_of_a_variant_are_compiled_in(tmp_path):
    _, recorder, _ = train(tmp_path, steps=4, variant=lambda step: {"twice": step >= 2}, log_every=1)
    assert ["twice" in values for _, _, values in recorder.lines] == [False, False, True, True]
    stage = MeanStage()
    assert parallel_step(stage, twice=True) is parallel_step(MeanStage(), twice=True)
    assert len({parallel_step(stage), parallel_step(stage, twice=True), parallel_step(stage, twice=False)}) == 3


def test_the_initial_state_is_that_of_the_run_s_seed():
    def mean(seed, start=0.0):
        return float(initial_state(MeanStage().init, seed, start).params["mean"])

    assert mean(0) == mean(0) != mean(1)
    np.testing.assert_allclose(mean(0, 5.0), mean(0) + 5.0, rtol=1e-6)
    expected = jax.random.normal(jax.random.fold_in(jax.random.key(3), 0))
    np.testing.assert_allclose(mean(3), expected, rtol=1e-6)


def test_metrics_are_reported_one_interval_late():
    seen = []
    metrics = LateMetrics(lambda last, interval: seen.append((last, [values["loss"] for values in interval])))
    add = lambda loss: metrics.add({"loss": jnp.float32(loss)})  # noqa: E731
    for loss in (1, 2):
        add(loss)
    metrics.end_interval(2)
    assert seen == []
    add(3)
    assert seen == []
    metrics.end_interval(3)
    assert seen == [(2, [1, 2])]
    metrics.flush()
    assert seen == [(2, [1, 2]), (3, [3])]
    assert all(isinstance(loss, np.ndarray) for _, losses in seen for loss in losses)  # on the host
    metrics.flush()
    metrics.end_interval(3)  # of no steps: nothing to report
    metrics.flush()
    assert len(seen) == 2


def test_metrics_that_were_reported_with_an_error_are_not_reported_again():
    def report(calls, last, interval):
        calls.append(last)
        raise RunError("not finite")

    calls = []
    metrics = LateMetrics(partial(report, calls))
    metrics.add({"loss": jnp.float32(1)})
    metrics.end_interval(1)
    with pytest.raises(RunError):
        metrics.flush()
    metrics.flush()
    assert calls == [1]
