"""A run goes on for more steps, or at another learning rate, exactly from its last checkpoint."""

import shutil
from unittest import mock

import jobs
import numpy as np
import pytest
from test_bad_input import contents, fails

from ldm_jax import job, train
from ldm_jax.errors import InputError, RunError
from ldm_jax.run_folder.checkpoint import Checkpoints, load_latest
from ldm_jax.run_folder.lock import locked
from ldm_jax.runtime.files import read_json

MORE = "--config.diffusion.steps=12"


@pytest.fixture
def run(trained_run, tmp_path):
    return shutil.copytree(trained_run, tmp_path / "run")


@pytest.mark.slow
def test_more_steps_end_as_a_run_of_so_many(tiny_data, tmp_path, capsys):
    """With a constant learning rate; of a decaying one, the decay is that of the new number of steps."""
    run, constant = tmp_path / "run", "--config.diffusion.decay=constant"
    assert jobs.train_here(tiny_data, run, constant) == 0
    assert jobs.train_here(tiny_data, run, constant, MORE) == 0
    assert "All is done" not in capsys.readouterr().out
    assert load_latest(run / "diffusion")["step"] == 12
    whole = tmp_path / "whole"
    assert jobs.train_here(tiny_data, whole, constant, MORE) == 0
    jobs.assert_same_training(run, whole)
    for name, array in jobs.samples(whole).items():
        np.testing.assert_array_equal(jobs.samples(run)[name], array)
    assert read_json(run / "data.json")["earlier"][-1]["diffusion.steps"] == 8
    capsys.readouterr()
    assert jobs.train_here(tiny_data, run, constant, MORE) == 0
    assert "All is done" in capsys.readouterr().out


@pytest.mark.slow
def test_another_learning_rate_goes_on_from_the_checkpoint(run, trained_run, tiny_data, tmp_path):
    """Twice, and interrupted in between: the checkpoints of the run before are read each time."""
    changes = [MORE, "--config.diffusion.learning_rate=1e-4"]
    assert jobs.train_here(tiny_data, run, *changes) == 0
    again = shutil.copytree(run, tmp_path / "again")
    shutil.rmtree(again / "diffusion" / "12")
    (again / "report.html").unlink()
    assert jobs.train_here(tiny_data, again, *changes) == 0  # from step 8, whose note is of the first learning rate
    jobs.assert_same_training(again, run, stages=("diffusion",))
    before, after = (load_latest(folder / "diffusion", step) for folder, step in ((trained_run, 8), (run, 8)))
    np.testing.assert_array_equal(before["params/unet/conv_in/bias"], after["params/unet/conv_in/bias"])
    assert jobs.train_here(tiny_data, run, "--config.diffusion.steps=14", "--config.diffusion.learning_rate=1e-5") == 0
    assert load_latest(run / "diffusion")["step"] == 14
    assert len(read_json(run / "data.json")["earlier"]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("where", ["config.json", "data.json", "print_estimate", "sample_run", "write_report"])
def test_a_continued_run_that_ends_early_goes_on(where, run, tiny_data, monkeypatch):
    """Wherever it ends: at first the folder has the scores and the report of the shorter training."""
    write, end_early = job.write_json, mock.Mock(side_effect=RunError("the end"))
    with monkeypatch.context() as patched:
        if where.endswith(".json"):
            patched.setattr(
                job, "write_json", lambda path, value: (end_early if path.name == where else write)(path, value)
            )
        else:
            patched.setattr(job, where, end_early)
        assert jobs.train_here(tiny_data, run, MORE) == 1
    assert jobs.train_here(tiny_data, run, MORE) == 0
    assert load_latest(run / "diffusion")["step"] == 12
    assert read_json(run / "evaluation.json")["recipe"]["step"] == 12
    assert [fields["diffusion.steps"] for fields in read_json(run / "data.json")["earlier"]] == [8]


REFUSED = {
    "fewer steps than are made": (["--config.diffusion.steps=4"], "config.diffusion.steps is 4; 8 are made"),
    "an autoencoder that others are built on": (
        ["--config.autoencoder.steps=12"],
        "config.autoencoder.steps cannot change once diffusion is trained",
    ),
    "its learning rate": (["--config.autoencoder.learning_rate=0.1"], "cannot change once diffusion is trained"),
    "another field": ([MORE, "--config.diffusion.ema_decay=0.5"], "diffusion.ema_decay: 0.999 -> 0.5"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_train_refuses(case, run, tiny_data, capsys):
    changes, words = REFUSED[case]
    before = contents(run)
    assert words in fails(train.main, jobs.flags(tiny_data, run, *changes), capsys)
    assert contents(run) == before


@pytest.mark.slow
def test_an_autoencoder_alone_goes_on(tiny_data, tmp_path):
    alone = ("--config.stages=('autoencoder',)", "--config.autoencoder.steps=4")
    assert jobs.train_here(tiny_data, tmp_path / "run", *alone) == 0
    assert jobs.train_here(tiny_data, tmp_path / "run", alone[0], "--config.autoencoder.steps=8") == 0
    assert load_latest(tmp_path / "run" / "autoencoder")["step"] == 8
    cards = read_json(tmp_path / "run" / "evaluation.json")["autoencoder"]
    assert {"rFD-VGG16", "PSNR"} < cards.keys()
    assert "The autoencoder alone" in (tmp_path / "run" / "report.html").read_text()


def test_checkpoints_of_an_earlier_identity(tmp_path):
    state = {"step": np.int32(3), "a": np.arange(3.0)}
    with Checkpoints(tmp_path / "c", keep=1, identity={"config": "old"}) as checkpoints:
        checkpoints.save(state)
    with Checkpoints(tmp_path / "c", keep=1, identity={"config": "new"}, earlier=[{"config": "old"}]) as checkpoints:
        assert checkpoints.restore(state)["step"] == 3
    with (
        Checkpoints(tmp_path / "c", keep=1, identity={"config": "new"}, earlier=[{"config": "x"}]) as checkpoints,
        pytest.raises(InputError, match="belongs to another run: its config is 'old', not 'new'"),
    ):
        checkpoints.restore(state)


@pytest.mark.slow
def test_one_process_trains_a_run_at_a_time(run, tiny_data, capsys):
    """The holder is named; the lock of a process that ended is free."""
    (run / "report.html").unlink()
    with locked(run):
        line = fails(train.main, jobs.flags(tiny_data, run), capsys)
    assert f"--workdir={run} is in use by process " in line and "choose another --workdir" in line
    assert not (run / "report.html").exists()
    assert jobs.train_here(tiny_data, run) == 0
    (run / ".lock").write_text("process 1 on another, since 2020")  # left by one that was killed
    (run / "report.html").unlink()
    assert jobs.train_here(tiny_data, run) == 0


def test_a_lock_alone_is_no_run(tiny_data, tmp_path):
    """As a process leaves it that is killed at its very start."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").touch()
    assert jobs.train_here(tiny_data, tmp_path / "run", "--config.stages=('autoencoder',)", "--dry_run=true") == 0


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["cut", "of another number", "no array"])
def test_damaged_cached_latents_are_encoded_anew(damage, run, trained_run, tiny_data):
    shutil.rmtree(run / "diffusion")
    (run / "report.html").unlink()
    for path in (run / "latents").glob("*.moments.npy"):
        if damage == "cut":
            path.write_bytes(path.read_bytes()[:-100])
        elif damage == "no array":
            path.write_bytes(b"nonsense")
        else:
            np.save(path, np.load(path)[:-1])
    assert jobs.train_here(tiny_data, run) == 0
    jobs.assert_same_training(run, trained_run)
