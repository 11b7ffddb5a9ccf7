"""What the experiments share: runs that are trained once, rows of results that are kept, tables that are made of them.

results.json is {budget: {row: {"arm", "seed", "seconds", "commit", "device", what was measured ...}}}. A row that is
there is not measured again, and a run that was cut short goes on, so that the same command again resumes. The tables,
the answer and the figure are made of results.json alone: see index.py.
"""

import argparse
import gc
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import matplotlib
from filelock import FileLock
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from configs import fashion_mnist
from ldm_jax import config_rules, job, run_folder, scoring
from ldm_jax.errors import InputError, RunError
from ldm_jax.files import atomic, read_json, write_json
from ldm_jax.xla import configure

matplotlib.use("Agg")  # figures go to files

ROOT = Path(__file__).parent.parent
BUDGETS = ("smoke", "cpu", "gpu")  # seconds, to see that it works; minutes on two cores; hours on a GPU

Row = dict[str, Any]
Rows = dict[str, Row]


def images_per_second(workdir: Path, stage: str, batch_size: int) -> float:
    """How fast a run trained, by when the lines of its log were written.

    All but the last are written when the interval after them has been dispatched; the last follows at once.
    """
    lines = [line for line in run_folder.read_metrics(workdir / "metrics.jsonl") if line["stage"] == stage]
    first, *_, last, _ = (line for line in lines if "loss" in line)
    return (last["step"] - first["step"]) * batch_size / max(last["time"] - first["time"], 0.01)


# Every run of an experiment: trained, but neither drawn from nor scored at its end, which is left to the experiment.
TRAINED_ONLY = {"sampling.num": 0, "sampling.progress_every": 0, "evaluation.bound_examples": 0}
# What minutes on two cores are enough for: a network of a quarter of the main job's size, and many small steps.
SMALLER_UNET = {"unet.block_out_channels": (32, 64), "unet.norm_num_groups": 8}
MINUTES = SMALLER_UNET | {"diffusion.batch_size": 16}
# Networks and steps of a smoke run, which shows that all of it works and nothing else.
SMOKE = {
    "data.train_split": "train[:512]",
    "autoencoder.block_out_channels": (8, 8, 8),
    "autoencoder.norm_num_groups": 4,
    "autoencoder.loss.adversarial": 0.0,
    "autoencoder.steps": 4,
    "unet.block_out_channels": (16,),
    "unet.attention": (True,),
    "unet.norm_num_groups": 8,
    "diffusion.batch_size": 16,
    "diffusion.validation_examples": 64,
}
CHANGES = {"smoke": SMOKE, "cpu": MINUTES, "gpu": {}}  # of configs/fashion_mnist.py
MODEL_STEPS = {"smoke": 2, "cpu": 12_000, "gpu": 50_000}  # of the model that solvers and guidance are tried on


class Lab(NamedTuple):
    """Where an experiment trains, and how much of it there may be."""

    budget: str
    data_dir: str
    runs: Path

    def config(self, changes: dict[str, Any]) -> ConfigDict:
        """configs/fashion_mnist.py as this budget has it, with these fields changed."""
        config = fashion_mnist.get_config().copy_and_resolve_references().unlock()
        config.update_from_flattened_dict(TRAINED_ONLY | CHANGES[self.budget] | {"data.dir": self.data_dir} | changes)
        return config.lock()

    def train(self, name: str, changes: dict[str, Any]) -> Path:
        """The folder of a run with these fields changed; trains it if it is not done.

        Raises:
            SystemExit: it was interrupted.
        """
        config = self.config(changes)
        config_rules.validate(config)
        forget_programs()
        workdir = self.runs / re.sub(r"[^\w.-]+", "_", name)
        with self.alone(workdir.name):
            run_folder.check(workdir, config)
            job.run(config, workdir)
        if not scoring.is_done(workdir, config):
            raise SystemExit(130)
        return workdir

    def on_shared_latents(self, name: str, changes: dict[str, Any]) -> Path:
        """The same, on the autoencoder and the latents that all experiments share."""
        autoencoder = self.train("autoencoder", {"stages": ("autoencoder",)})
        return self.train(name, {"autoencoder.checkpoint": str(autoencoder)} | changes)

    def shared_model(self) -> Path:
        """The run that what needs no training of its own is tried on."""
        return self.on_shared_latents("model", {"diffusion.steps": MODEL_STEPS[self.budget]})

    @property
    def batch_size(self) -> int:
        """Of whatever is trained on pictures or latents, but for autoencoders."""
        return self.config({}).diffusion.batch_size

    def alone(self, name: str) -> FileLock:
        """Held by the one experiment that makes what all share, while others wait for it."""
        self.runs.mkdir(parents=True, exist_ok=True)
        return FileLock(self.runs / f".{name}.lock")

    def steps_in(self, seconds: float, images_per_second: float, batch_size: int) -> int:
        """How many steps fit into a time; in a smoke run two do."""
        return 2 if self.budget == "smoke" else max(1, round(seconds * images_per_second / batch_size))

    def once(self, name: str, measure: Callable[[], float]) -> float:
        """What `measure` said the first time. Steps to fit a time are made of it, and must not change on the way."""
        path = self.runs / "once.json"
        kept = read_json(path) if path.exists() else {}
        if name in kept:
            return kept[name]
        measured = measure()
        with self.alone("once"):
            kept = read_json(path) if path.exists() else {}
            write_json(path, kept | {name: measured})
        return measured


def forget_programs() -> None:
    """Lets go of what XLA has compiled: the maps of memory that Linux gives a process end after a dozen runs."""
    jax.clear_caches()
    gc.collect()


class Experiment(NamedTuple):
    """One question. `table` and `answer` see only what results.json has of the largest budget that there is."""

    folder: Path
    question: str
    plan: Callable[[str], list[tuple[str, int]]]  # budget -> (arm, seed) of every row
    measure: Callable[[Lab, str, int], Row]
    table: Callable[[Rows], str]  # in Markdown
    answer: Callable[[Rows], str]  # in a sentence or two
    draw: Callable[[Rows], Figure]

    @property
    def name(self) -> str:
        """That of its folder."""
        return self.folder.name


def run(experiment: Experiment, doc: str) -> None:
    """The command line: measures what is not there yet, then makes the tables and the figure anew."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", choices=BUDGETS, default="cpu")
    parser.add_argument("--data_dir", default="data", help="where prepared data sets lie")
    parser.add_argument("--runs", type=Path, default=Path("runs/experiments"), help="where the runs go")
    parser.add_argument("--out", type=Path, help="where the results go; default: beside run.py, of smoke to --runs")
    args = parser.parse_args()
    configure(fast_compile=args.budget == "smoke")
    lab = Lab(args.budget, args.data_dir, args.runs / args.budget)
    smoke = lab.runs / "results" / experiment.name
    out = args.out or (smoke if args.budget == "smoke" else experiment.folder)
    try:
        rows = measure_all(experiment, lab, out / "results.json")
    except (InputError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    with atomic(out / "figure.png") as temporary:
        # Without the version of matplotlib in it, so that the same results make the same file.
        experiment.draw(rows).savefig(temporary, format="png", dpi=110, metadata={"Software": None})
    print(f"\n{experiment.table(rows)}\n\n{experiment.answer(rows)}")


def measure_all(experiment: Experiment, lab: Lab, path: Path) -> Rows:
    """Measures every row that results.json at `path` lacks, and keeps each as soon as it is there."""
    results = read_json(path) if path.exists() else {}
    rows = results.setdefault(lab.budget, {})
    for arm, seed in experiment.plan(lab.budget):
        name = f"{arm}, seed {seed}"
        if name not in rows:
            print(f"\n{experiment.name}: {name}", flush=True)
            start = time.monotonic()
            measured = experiment.measure(lab, arm, seed)
            rows[name] = {"arm": arm, "seed": seed, **measured, "seconds": round(time.monotonic() - start, 1),
                          "commit": commit(), "device": job.describe_device()}  # fmt: skip
            write_json(path, results)
    return rows


def commit() -> str:
    """Which version of this repository measures; "unknown" outside of git, with a + if files have been changed."""

    def git(*command: str) -> str:
        found = subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=False)
        return found.stdout.strip() if found.returncode == 0 else ""

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "ldm_jax", "configs", "experiments/*.py")
    return (git("rev-parse", "--short=12", "HEAD") or "unknown") + ("+" if changed else "")
