"""Small jobs of fine-tuning, in this process, and their data."""

import signal
import subprocess
import sys

import jax
import jobs
from PIL import Image

from ldm_jax import command_line, train

CAPTIONS = ("low", "lower", "low low", "wool")


def write_pictures(folder):
    """Eight small images of one colour each, and four captions."""
    folder.mkdir(parents=True)
    for i in range(8):
        Image.new("RGB", (20, 16), (30 * i, 255 - 30 * i, 100)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(CAPTIONS[i % 4])
    return folder


def flags(home, run, *changes):
    """Those of a job in the folder `home`, HOME in `changes`, with pictures/ and model/; the last of a kind counts."""
    given = {
        "--config": "configs/finetune.py",
        "--workdir": home / run,
        "--config.init_from": home / "model",
        "--config.data.path": home / "pictures",
        "--config.data.dir": home / "data",
        "--config.data.image_size": 16,
        "--config.diffusion.steps": 4,
        "--config.diffusion.batch_size": 4,
        "--config.diffusion.warmup_steps": 0,
        "--config.diffusion.learning_rate": 1e-3,
        "--config.diffusion.validation_examples": 8,
        "--config.evaluation.batch_size": 8,
        "--config.sampling.prompts": "('low','wool')",
        "--config.sampling.num": 2,
        "--config.sampling.steps": 2,
        "--config.sampling.batch_size": 8,
        "--config.sampling.progress_every": 0,
        "--config.log_every": 1,
    }
    given |= dict(change.replace("HOME", str(home)).split("=", 1) for change in changes)
    return [f"{name}={value}" for name, value in given.items()]


def fine_tune(home, run, *changes):
    """Runs it, and returns the exit status."""
    return command_line.run(train.main, ["train", *flags(home, run, *changes)])


def flags_from_run(base, data, workdir, *changes, config="finetune"):
    """The command of a job that starts from the run `base`, on the data set "tiny" in `data`."""
    fields = [f"data.dir={data}", "data.name=tiny", "data.image_size=8", "data.channels=1", "data.train_split=train"]
    fields += ["diffusion.steps=4", "diffusion.batch_size=8", "diffusion.learning_rate=1e-3"]
    fields += ["diffusion.warmup_steps=0", "diffusion.validation_examples=8", "evaluation.batch_size=8"]
    fields += ["sampling.num=4", "sampling.batch_size=8", "log_every=1", f"init_from={base}", *changes]
    return ["train", f"--config=configs/{config}.py", f"--workdir={workdir}", *(f"--config.{f}" for f in fields)]


def leaves(tree):
    return jax.tree.leaves(tree)


# A process that is killed once step 3 of 4 is done, which is not in the last checkpoint.
KILLED = """
import os, signal, sys
from ldm_jax import command_line, train
from ldm_jax.run_folder import log as run_folder_log
write = run_folder_log.Log.__call__
def write_and_die(log, stage, step, **values):
    write(log, stage, step, **values)
    if (stage, step) == ("diffusion", 3):
        os.kill(os.getpid(), signal.SIGKILL)
run_folder_log.Log.__call__ = write_and_die
command_line.run(train.main, sys.argv)
"""


def fine_tune_and_kill(home, run, *changes):
    """A job that ends so."""
    command = [sys.executable, "-c", KILLED, *flags(home, run, *changes)]
    environment = jobs.environment(devices=jax.device_count())
    killed = subprocess.run(command, env=environment, cwd=jobs.ROOT, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
