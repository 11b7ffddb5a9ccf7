"""A run that was stopped, in whatever way, and started again ends as one that was left alone: to the last bit."""

import shutil
import signal
import time

import jax
import jobs
import numpy as np
import pytest
from damage import array_files, cut, flip_a_bit

from ldm_jax.errors import InputError, RunError
from ldm_jax.evaluation import goodput
from ldm_jax.pipeline.load import load
from ldm_jax.run_folder.checkpoint import load_latest
from ldm_jax.run_folder.log import Log, read_metrics
from ldm_jax.run_folder.snapshots import Snapshots
from ldm_jax.sampling import image_grids


def steps_logged(workdir, stage):
    return [line["step"] for line in read_metrics(workdir / "metrics.jsonl") if line["stage"] == stage]


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_goes_on(one_device_run, tiny_data, tmp_path):
    run = tmp_path / "run"
    # The log only gets its first line once a step is done; it is then in the middle of the stage.
    process = jobs.start(tiny_data, run)
    jobs.stop_when(process, lambda: steps_logged(run, "diffusion"), signal.SIGTERM)
    signalled = time.monotonic()
    output = jobs.finish(process, status=143)
    assert time.monotonic() - signalled < 15
    assert "The same command goes on from there." in output
    assert 0 < load_latest(run / "diffusion")["step"] <= 8
    assert not (run / "samples.npz").exists()

    assert "Done: " in jobs.finish(jobs.start(tiny_data, run))
    jobs.assert_same_training(run, one_device_run)
    assert jobs.losses(run) == jobs.losses(one_device_run)
    for name, array in jobs.samples(one_device_run).items():
        assert (jobs.samples(run)[name] == array).all()


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resume_across_the_start_of_loss_terms(optimizer, tiny_data, tmp_path):
    """From the state of step 2, half trained, when the adversary takes part from step 4 on and LPIPS from step 5 on."""
    changes = (f"--config.autoencoder.optimizer={optimizer}",)
    changes += ("--config.autoencoder.loss.adversarial=0.5", "--config.autoencoder.loss.adversarial_start=4")
    changes += ("--config.autoencoder.loss.perceptual=0.5", "--config.autoencoder.loss.perceptual_size=16")
    changes += ("--config.autoencoder.loss.perceptual_start=5",)
    changes += ("--config.stages=('autoencoder',)", "--config.log_every=1")
    changes += ("--config.checkpoint_every=2", "--config.keep_checkpoints=4")
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert jobs.train_here(tiny_data, whole, *changes) == 0
    shutil.copytree(whole, resumed)
    (resumed / "report.html").unlink()
    for step in (4, 6, 8):
        shutil.rmtree(resumed / "autoencoder" / str(step))
    assert jobs.train_here(tiny_data, resumed, *changes) == 0
    jobs.assert_same_training(resumed, whole, stages=("autoencoder",))
    assert jobs.losses(resumed) == jobs.losses(whole)
    lines = [line for line in read_metrics(whole / "metrics.jsonl") if line["stage"] == "autoencoder"]
    steps = {term: [line["step"] for line in lines if term in line] for term in ("adversarial_weight", "perceptual")}
    # The log counts the steps made: step 4 is the fifth.
    assert steps == {"adversarial_weight": [5, 6, 7, 8], "perceptual": [6, 7, 8]}


@pytest.mark.slow
def test_kill_at_any_moment(one_device_run, tiny_data, tmp_path):
    """SIGKILL in the middle of a save of either stage, and while the latents are written."""
    run = tmp_path / "run"
    often = ("--config.checkpoint_every=1", "--config.sampling.num=0")

    def saving(stage):
        return lambda: any((run / stage).glob("*.orbax-checkpoint-tmp*")) and any((run / stage).glob("[1-9]"))

    for moment in (saving("autoencoder"), lambda: (run / "latents").exists(), saving("diffusion")):
        process = jobs.start(tiny_data, run, *often)
        jobs.stop_when(process, moment, signal.SIGKILL)
        jobs.finish(process, status=-signal.SIGKILL)
    jobs.finish(jobs.start(tiny_data, run, *often))
    jobs.assert_same_training(run, one_device_run)
    assert not list(run.rglob("*.orbax-checkpoint-tmp*"))
    assert steps_logged(run, "diffusion").count(8) == 1
    lines = read_metrics(run / "metrics.jsonl")
    assert [line["step"] for line in lines if line["stage"] == "start"] == [0, 1, 2, 3]
    assert sum(goodput.seconds(lines).values()) == pytest.approx(lines[-1]["time"], rel=0.05)


def test_what_follows_a_checkpoint_is_made_up_for(tiny_data, tmp_path, monkeypatch, capsys):
    """Of a process that is killed between its last checkpoint and the snapshot, the preview or the validation."""
    changes = (jobs.NO_ATTENTION, "--config.sampling.num=0", "--config.sampling.progress_every=4")
    changes += ("--config.diffusion.ema_sigma_rels=(0.1,)", "--config.diffusion.ema_snapshot_every=4")
    assert jobs.train_here(tiny_data, tmp_path / "whole", *changes) == 0
    preview, snapshot, line = (image_grids, "save_png"), (Snapshots, "save"), (Log, "__call__")
    for stage, (owner, name) in (
        ("autoencoder", preview), ("diffusion", snapshot), ("diffusion", preview), ("diffusion", line)
    ):  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, failing_at_the_end(getattr(owner, name)))
            assert jobs.train_here(tiny_data, tmp_path / "run", *changes) == 1
        assert "it ends here" in capsys.readouterr().err
        assert load_latest(tmp_path / "run" / stage)["step"] == 8
    assert jobs.train_here(tiny_data, tmp_path / "run", *changes) == 0
    one, other = (validations(tmp_path / run) for run in ("whole", "run"))
    assert one == other and [step for step, *_ in one] == [4, 8]
    for folder in ("progress", "ema_snapshots"):
        one, other = ({path.name for path in (tmp_path / run / folder).iterdir()} for run in ("whole", "run"))
        assert one == other
    for file in (tmp_path / "whole" / "progress").iterdir():
        assert file.read_bytes() == (tmp_path / "run" / "progress" / file.name).read_bytes()


def failing_at_the_end(function):
    """`function`, which fails for step 8: of a snapshot, of a file's name, or of a validation's line."""

    def fail(*args, **values):
        validated = any(name.startswith("validation_") for name in values)
        if 8 in args[1:2] or (validated and 8 in args) or any("_000008" in str(arg) for arg in args):
            raise RunError("it ends here")
        return function(*args, **values)

    return fail


def validations(run):
    """The validation lines of diffusion, without their times."""
    lines = [line for line in read_metrics(run / "metrics.jsonl") if line["stage"] == "diffusion"]
    lines = [line for line in lines if any(name.startswith("validation_") for name in line)]
    return [(line.pop("step"), line.pop("time") * 0, line) for line in lines]


@pytest.fixture
def run_copy(trained_run, tmp_path):
    """The trained run, to be damaged."""
    return shutil.copytree(trained_run, tmp_path / "run")


@pytest.mark.parametrize("damage", [cut, flip_a_bit])
def test_a_damaged_newest_checkpoint_is_not_read(damage, run_copy):
    for path in array_files(run_copy / "diffusion" / "8"):
        damage(path)
    assert load_latest(run_copy / "diffusion")["step"] == 4  # for sample and evaluate: the one before


def test_a_damaged_newest_checkpoint_is_put_aside(run_copy, trained_run, tiny_data, capsys):
    for path in array_files(run_copy / "diffusion" / "8"):
        flip_a_bit(path)
    assert jobs.train_here(tiny_data, run_copy, "--config.sampling.num=0") == 0
    output = capsys.readouterr().out
    assert "8 is damaged" in output
    assert "going back to the one before" in output
    assert (run_copy / "diffusion" / "damaged.8").is_dir()
    jobs.assert_same_training(run_copy, trained_run)
    assert jobs.losses(run_copy) == jobs.losses(trained_run)


def test_the_model_of_an_earlier_checkpoint(trained_run):
    (newest, params), steps, earlier = load(trained_run), {}, {}
    for up_to in (4, 7, 8):
        model, earlier[up_to] = load(trained_run, step=up_to)
        steps[up_to] = model.origin.step
    assert newest.origin.step == 8 and steps == {4: 4, 7: 4, 8: 8}

    def apart(one, other):
        pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
        return max(float(np.abs(a - b).max()) for a, b in pairs)

    assert apart(earlier[8], params) == apart(earlier[4], earlier[7]) == 0
    assert apart(earlier[4]["denoiser"], params["denoiser"]) > 0
    assert apart(earlier[4]["first_stage"], params["first_stage"]) == 0
    with pytest.raises(InputError, match="no readable checkpoint"):
        load(trained_run, step=3)


def test_a_finished_run_says_so(trained_run, tiny_data, capsys):
    before = (trained_run / "metrics.jsonl").read_text()
    assert jobs.train_here(tiny_data, trained_run) == 0
    assert "All is done: " in capsys.readouterr().out
    assert (trained_run / "metrics.jsonl").read_text() == before


@pytest.mark.slow
def test_a_change_of_sampling_samples_again_without_training(run_copy, trained_run, tiny_data):
    assert jobs.train_here(tiny_data, run_copy, "--config.sampling.steps=2", "--config.sampling.num=12") == 0
    jobs.assert_same_training(run_copy, trained_run)
    assert steps_logged(run_copy, "diffusion") == steps_logged(trained_run, "diffusion")
    assert jobs.samples(run_copy)["images"].shape == (12, 8, 8, 1)


@pytest.mark.slow
def test_damaged_samples_are_sampled_again(run_copy, trained_run, tiny_data):
    cut(run_copy / "samples.npz")
    (run_copy / "report.html").unlink()
    assert jobs.train_here(tiny_data, run_copy) == 0
    for name, array in jobs.samples(trained_run).items():
        assert (jobs.samples(run_copy)[name] == array).all()
