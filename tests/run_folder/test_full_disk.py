"""A full disk, whatever is being written: one line that names the file, status 1; with room again the run goes on."""

import errno
import os
import shutil
from pathlib import Path

import jobs
import numpy as np
import pytest
from PIL import Image

AT_THE_END = ("samples.npz", "samples.png", "evaluation.json", "report.html")  # after the training
NO_SPACE = "No space left on device"
JSON = ("config.json", "data.json", "scale.json", "evaluation.json")  # written by Path.write_text


def fail(*_, **__):
    raise OSError(errno.ENOSPC, NO_SPACE)


def fail_for(name, write):
    """`write`, a method of Path, which fails for temporary files of this name."""
    return lambda path, *args, **options: (fail if name in path.name else write)(path, *args, **options)


def break_writes(monkeypatch, what):
    """Makes the writes of `what` fail as on a full disk."""
    if what in (*JSON, "report.html"):
        monkeypatch.setattr(Path, "write_text", fail_for(what, Path.write_text))
    elif what == "metrics.jsonl":
        monkeypatch.setattr(Path, "open", fail_for(what, Path.open))
    elif what == "checkpoint":
        full = shutil.disk_usage("/")._replace(free=1000)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    else:
        module, name = {
            "moments.npy": (os, "posix_fallocate"),
            "samples.npz": (np, "savez_compressed"),
            ".png": (Image.Image, "save"),
        }[what]
        monkeypatch.setattr(module, name, fail)


@pytest.mark.slow
@pytest.mark.parametrize(
    "what", [*JSON, "metrics.jsonl", "checkpoint", "moments.npy", "samples.npz", ".png", "report.html"]
)
def test_a_full_disk_is_said_in_one_line(what, tiny_data, trained_run, tmp_path, capfd):
    run = tmp_path / "run"
    if any(what in name for name in AT_THE_END):
        shutil.copytree(trained_run, run)
        for name in AT_THE_END:
            (run / name).unlink()
    with pytest.MonkeyPatch.context() as monkeypatch:
        break_writes(monkeypatch, what)
        assert jobs.train_here(tiny_data, run) == 1
    other = ("sampling:", "a covariance is singular")  # the progress bar; a warning about so few samples
    lines = [line for line in capfd.readouterr().err.splitlines() if line and not any(word in line for word in other)]
    assert len(lines) == 1 and lines[0].startswith("train: ") and NO_SPACE in lines[0], lines
    assert str(run) in lines[0] and (what == "checkpoint" or what in lines[0])
    assert jobs.train_here(tiny_data, run) == 0
    jobs.assert_same_training(run, trained_run)
    np.testing.assert_array_equal(jobs.samples(run)["images"], jobs.samples(trained_run)["images"])
    assert (run / "report.html").exists()
