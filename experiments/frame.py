"""What the experiments share: runs that are trained once, rows of results that are kept, tables that are made of them.

results.json is {budget: {row: {"arm", "seed", "seconds", "commit", "device", what was measured ...}}}. A row that is
there is not measured again, and a run that was cut short goes on, so that the same command again resumes. Rows are
shared out among several processes (workers.py), as each takes one that no other has taken. The tables, the answer and
the figure are made of results.json alone: see index.py.
"""

import argparse
import gc
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import matplotlib
from filelock import FileLock, Timeout
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from configs import fashion_mnist
from experiments import workers
from ldm_jax import job
from ldm_jax.config import rules as config_rules
from ldm_jax.errors import InputError, RunError
from ldm_jax.evaluation import scoring
from ldm_jax.run_folder import layout as run_folder_layout
from ldm_jax.runtime.files import atomic, read_json, write_json
from ldm_jax.runtime.interrupt import Interrupted
from ldm_jax.runtime.xla import configure

matplotlib.use("Agg")  # figures go to files

ROOT = Path(__file__).parent.parent
BUDGETS = ("smoke", "cpu", "gpu")  # seconds, to see that it works; minutes on two cores; minutes on a large GPU
WORKERS = {"smoke": 1, "cpu": 2, "gpu": 4}  # on a CPU two with a core each get more done than one with both

Row = dict[str, Any]
Rows = dict[str, Row]


# Every run of an experiment: trained, but neither drawn from nor scored at its end, which is left to the experiment.
TRAINED_ONLY = {"sampling.num": 0, "sampling.progress_every": 0, "evaluation.vlb_examples": 0}
# Autoencoders that are good enough to compare what comes after them.
SHORT_AUTOENCODER = {"autoencoder.steps": 1_200, "autoencoder.loss.adversarial_start": 600}
LONGER_AUTOENCODER = {"autoencoder.steps": 2_000, "autoencoder.loss.adversarial_start": 1_000}
# What minutes on two cores are enough for: a network of a quarter of the main job's size, many small steps, a third of
# the pictures.
SMALLER_UNET = {"unet.block_out_channels": (32, 64), "unet.norm_num_groups": 8}
MINUTES = SHORT_AUTOENCODER | SMALLER_UNET | {"diffusion.batch_size": 16, "data.train_split": "train[:20000]"}
# Networks and steps of a smoke run, which shows that all of it works and nothing else.
SMOKE = {
    "data.train_split": "train[:512]",
    "data.test_split": "test[:100]",
    "autoencoder.block_out_channels": (8, 8, 8),
    "autoencoder.norm_num_groups": 4,
    "autoencoder.loss.adversarial": 0.0,
    "autoencoder.steps": 4,
    "unet.block_out_channels": (16,),
    "unet.attention": (False,),
    "unet.norm_num_groups": 8,
    "diffusion.batch_size": 16,
    "diffusion.validation_examples": 64,
    "sampling.steps": 4,
}
# What a GPU is busy with; checkpoints of so short a run at its end.
LARGER_BATCHES = LONGER_AUTOENCODER | {"diffusion.batch_size": 128, "checkpoint_every": 2_000}
CHANGES = {"smoke": SMOKE, "cpu": MINUTES, "gpu": LARGER_BATCHES}  # of configs/fashion_mnist.py
MODEL_STEPS = {"smoke": 2, "cpu": 5_000, "gpu": 8_000}  # of the model that solvers and guidance are tried on


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
        workdir = self.runs / file_name(name)
        with self.alone(workdir.name):
            run_folder_layout.check(workdir, config)
            job.run(config, workdir)
        if not scoring.is_done(workdir, config):
            raise SystemExit(workers.INTERRUPTED)
        return workdir

    def shared_autoencoder(self) -> Path:
        """The run whose autoencoder and latents most experiments share."""
        return self.train("autoencoder", {"stages": ("autoencoder",)})

    def on_shared_latents(self, name: str, changes: dict[str, Any]) -> Path:
        """The same as `train`, on these latents."""
        return self.train(name, {"autoencoder.checkpoint": str(self.shared_autoencoder())} | changes)

    def shared_model(self) -> Path:
        """The run that what needs no training of its own is tried on."""
        return self.on_shared_latents("model", {"diffusion.steps": MODEL_STEPS[self.budget]})

    @property
    def batch_size(self) -> int:
        """Of whatever is trained on pictures or latents, but for autoencoders."""
        return self.config({}).diffusion.batch_size

    def alone(self, name: str) -> FileLock:
        """Held by the one process that makes what all share, while others wait for it."""
        self.runs.mkdir(parents=True, exist_ok=True)
        return FileLock(self.runs / f".{file_name(name)}.lock")

    def steps_in(self, seconds: float, images_per_second: float, batch_size: int) -> int:
        """How many steps fit into a time; in a smoke run two do."""
        return 2 if self.budget == "smoke" else max(1, round(seconds * images_per_second / batch_size))

    def once(self, name: str, measure: Callable[[], float]) -> float:
        """What `measure` said the first time. Steps to fit a time are made of it, and must not change on the way."""
        if self.knows(name):
            return self._notes()[name]
        measured = measure()
        with self.alone("once"):
            write_json(self.runs / "once.json", self._notes() | {name: measured})
        return measured

    def knows(self, name: str) -> bool:
        """Whether `once` has measured this."""
        return name in self._notes()

    def _notes(self) -> dict[str, float]:
        path = self.runs / "once.json"
        return read_json(path) if path.exists() else {}


def file_name(name: str) -> str:
    """Of anything with a name."""
    return re.sub(r"[^\w.-]+", "_", name)


MAPS = 20_000  # of memory, of the 65,530 that Linux gives a process; a run's programs take some thousands


def forget_programs(limit: int = MAPS) -> None:
    """Lets go of what XLA has compiled if the process has more maps of memory than the limit, or does not know."""
    maps = Path("/proc/self/maps")
    if not maps.exists() or len(maps.read_text().splitlines()) > limit:
        jax.clear_caches()
        gc.collect()


def nothing(lab: Lab) -> None:
    """Before the rows of an experiment that share nothing."""


class Experiment(NamedTuple):
    """One question. `table`, `answer` and `draw` see only what results.json has of one budget.

    `first` is what one process does with the whole machine before rows are measured side by side: it trains what they
    share, and finds out by `Lab.once` how fast the machine is. `alone`: a row takes the whole machine.
    """

    folder: Path
    question: str
    plan: Callable[[str], list[tuple[str, int]]]  # budget -> (arm, seed) of every row
    measure: Callable[[Lab, str, int], Row]
    table: Callable[[Rows], str]  # in Markdown
    answer: Callable[[Rows], str]  # in a sentence or two
    draw: Callable[[Rows], Figure]
    first: Callable[[Lab], Any] = nothing
    alone: bool = False

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
    parser.add_argument("--workers", type=int, help="processes that measure rows side by side; default: as many as pay")
    parser.add_argument("--only", choices=("first", "rows"), help="a part of the work, without table and figure")
    args = parser.parse_args()
    if args.workers is not None and args.workers < 1:
        parser.error(f"--workers={args.workers}: there must be at least 1")
    lab = Lab(args.budget, args.data_dir, args.runs / args.budget)
    smoke = lab.runs / "results" / experiment.name
    path = (args.out or (smoke if args.budget == "smoke" else experiment.folder)) / "results.json"
    number = 1 if experiment.alone else args.workers or WORKERS[args.budget]
    try:
        if args.only or number == 1:
            configure(fast_compile=args.budget == "smoke")
            if args.only != "rows":
                begin(experiment, lab)
            if args.only != "first":
                measure_all(experiment, lab, path)
        else:
            workers.run([*sys.argv, "--only=first"], 1)
            workers.run([*sys.argv, "--only=rows"], number)
    except (InputError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(workers.REFUSED) from None
    except Interrupted as interrupted:
        print(f"\nInterrupted: {interrupted}. The same command goes on from there.")
        raise SystemExit(workers.INTERRUPTED) from None
    if path.exists() and not args.only:
        report(experiment, read_json(path), args.budget, path.with_name("figure.png"))


def report(experiment: Experiment, results: dict[str, Rows], budget: str, figure: Path) -> None:
    """Prints the table of a budget, and its answer if it has one; draws the figure of the budget that tells most."""
    rows, most = results.get(budget, {}), telling(experiment, results)
    print(f"\n{experiment.table(rows)}")
    if answers(experiment, budget, rows):
        print(f"\n{experiment.answer(rows)}")
    if most:
        with atomic(figure) as temporary:
            # Without the version of matplotlib in it, so that the same results make the same file.
            experiment.draw(results[most]).savefig(temporary, format="png", dpi=110, metadata={"Software": None})


def answers(experiment: Experiment, budget: str, rows: Rows) -> bool:
    """Whether every arm of a budget has been measured with one seed at least, without which there is no answer."""
    return {arm for arm, _ in experiment.plan(budget)} <= {row["arm"] for row in rows.values()}


def telling(experiment: Experiment, results: dict[str, Rows]) -> str:
    """The largest budget that has an answer; "" if there is none."""
    return next((name for name in reversed(BUDGETS) if answers(experiment, name, results.get(name, {}))), "")


def begin(experiment: Experiment, lab: Lab) -> None:
    """Does what comes before the rows, and notes how many seconds it took the first time."""
    start = time.monotonic()
    experiment.first(lab)
    lab.once(f"{experiment.name} first, seconds", lambda: round(time.monotonic() - start, 1))


def measure_all(experiment: Experiment, lab: Lab, path: Path) -> Rows:
    """Measures every row that results.json at `path` lacks and no other process is at, and keeps each at once."""
    plan = {f"{arm}, seed {seed}": (arm, seed) for arm, seed in experiment.plan(lab.budget)}
    for name, (arm, seed) in plan.items():
        try:
            with lab.alone(f"{experiment.name} {name}").acquire(blocking=False):
                if name in kept(path, lab.budget):
                    continue
                print(f"\n{experiment.name}: {name}", flush=True)
                start = time.monotonic()
                measured = experiment.measure(lab, arm, seed)
                row = {"arm": arm, "seed": seed, **measured, "seconds": round(time.monotonic() - start, 1),
                       "first_seconds": lab.once(f"{experiment.name} first, seconds", lambda: 0.0),
                       "workers": workers.number(), "commit": commit(), "device": device()}  # fmt: skip
                with lab.alone(f"{experiment.name} results"):
                    rows = kept(path, lab.budget) | {name: row}
                    ordered = {name: rows[name] for name in (*plan, *rows) if name in rows}
                    write_json(path, (read_json(path) if path.exists() else {}) | {lab.budget: ordered})
        except Timeout:  # another process measures this row
            continue
    return kept(path, lab.budget)


def kept(path: Path, budget: str) -> Rows:
    """The rows of a budget that results.json has so far."""
    return read_json(path).get(budget, {}) if path.exists() else {}


def device() -> str:
    """What measures: "1 of 2 CPU cores", or how many of which GPU."""
    if jax.default_backend() != "cpu":
        return job.describe_device()
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{own} of {os.cpu_count()} CPU cores"


def commit() -> str:
    """Which version of this repository measures; "unknown" outside of git, with a + if files have been changed."""

    def git(*command: str) -> str:
        found = subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=False)
        return found.stdout.strip() if found.returncode == 0 else ""

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "ldm_jax", "configs", "experiments/*.py")
    return (git("rev-parse", "--short=12", "HEAD") or "unknown") + ("+" if changed else "")
