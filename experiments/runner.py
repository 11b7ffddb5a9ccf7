"""Runner of the experiments: trains the runs, stores one row of results per arm and seed, makes tables and figures.

results.json is {budget: {row: {"arm", "seed", "seconds", "commit", "device", measurements ...}}}. Stored rows are not
measured again and interrupted runs resume, so the same command continues where it stopped. Several processes
(workers.py) measure rows in parallel, each locking the row it measures. Tables, answer and figure depend on
results.json alone: see index.py.
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
from types import ModuleType
from typing import Any, NamedTuple

import jax
import matplotlib
from filelock import FileLock, Timeout
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from configs import fashion_mnist
from experiments import workers
from experiments.budgets import BUDGETS, CHANGES, MODEL_STEPS, TRAINED_ONLY, WITHOUT_HOURS, WORKERS
from ldm_jax import job
from ldm_jax.config import rules as config_rules
from ldm_jax.errors import InputError, Interrupted, RunError
from ldm_jax.run_folder import layout as run_folder_layout
from ldm_jax.run_folder.software import describe_device
from ldm_jax.runtime.files import atomic, read_json, write_json
from ldm_jax.runtime.xla import configure

matplotlib.use("Agg")  # figures go to files

ROOT = Path(__file__).parent.parent
Row = dict[str, Any]
Rows = dict[str, Row]


class Workspace(NamedTuple):
    """Budget, data folder and run folder of an experiment."""

    budget: str
    data_dir: str
    runs: Path

    def config(self, changes: dict[str, Any], base: ModuleType = fashion_mnist) -> ConfigDict:
        """The config file `base` with this budget's overrides, then `changes` {dotted field: value}."""
        config = base.get_config().copy_and_resolve_references().unlock()
        config.update_from_flattened_dict(TRAINED_ONLY | CHANGES[self.budget] | {"data.dir": self.data_dir} | changes)
        return config.lock()

    def train(self, name: str, changes: dict[str, Any], base: ModuleType = fashion_mnist) -> Path:
        """Trains a run with the config fields in `changes` to `base`, or resumes it; returns its folder.

        Raises:
            Interrupted: by a signal.
        """
        config = self.config(changes, base)
        config_rules.validate(config)
        clear_compiled_programs()
        workdir = self.runs / file_name(name)
        with self.lock(workdir.name):
            run_folder_layout.check(workdir, config)
            job.run(config, workdir)
        return workdir

    def shared_autoencoder(self) -> Path:
        """The run folder of the autoencoder that most experiments share, with its cached latents."""
        if self.budget == "cpu":
            return self.shared_model()
        return self.train("autoencoder", {"stages": ("autoencoder",)})

    def on_shared_latents(self, name: str, changes: dict[str, Any]) -> Path:
        """`train` on the latents of the shared autoencoder."""
        return self.train(name, {"autoencoder.checkpoint": str(self.shared_autoencoder())} | changes)

    def shared_model(self) -> Path:
        """The run folder of the diffusion model shared by the experiments that only sample: cpu has the main job."""
        if self.budget == "cpu":
            return self.train("main_job", {})
        return self.on_shared_latents("model", {"diffusion.steps": MODEL_STEPS[self.budget]})

    @property
    def batch_size(self) -> int:
        """Batch size of every model but the autoencoders."""
        return self.config({}).diffusion.batch_size

    def lock(self, name: str) -> FileLock:
        """A lock between the processes of all experiments, by name."""
        self.runs.mkdir(parents=True, exist_ok=True)
        return FileLock(self.runs / f".{file_name(name)}.lock")

    def steps_in(self, seconds: float, images_per_second: float, batch_size: int) -> int:
        """The number of training steps that fit into `seconds` at a measured rate; 2 with budget smoke."""
        return 2 if self.budget == "smoke" else max(1, round(seconds * images_per_second / batch_size))

    def cached(self, name: str, measure: Callable[[], float]) -> float:
        """The result of the first call of `measure` under this name, stored in once.json.

        Numbers of steps are derived from it, which must not change when a run resumes.
        """
        if self.is_cached(name):
            return self._cache()[name]
        value = measure()
        with self.lock("once"):
            write_json(self.runs / "once.json", self._cache() | {name: value})
        return value

    def is_cached(self, name: str) -> bool:
        """Whether `cached` has a stored value of this name."""
        return name in self._cache()

    def _cache(self) -> dict[str, float]:
        path = self.runs / "once.json"
        return read_json(path) if path.exists() else {}


def file_name(name: str) -> str:
    """A name with everything but letters, digits and `_.-` replaced by underscores."""
    return re.sub(r"[^\w.-]+", "_", name)


MAX_MEMORY_MAPS = 20_000  # Linux allows a process 65,530; the compiled programs of a run take some thousands


def clear_compiled_programs(limit: int = MAX_MEMORY_MAPS) -> None:
    """Clears XLA's compiled programs if the process has more than `limit` memory maps, or the number is unknown."""
    maps = Path("/proc/self/maps")
    if not maps.exists() or len(maps.read_text().splitlines()) > limit:
        jax.clear_caches()
        gc.collect()


def no_setup(workspace: Workspace) -> None:
    """The `first` of experiments whose rows share nothing."""


class Experiment(NamedTuple):
    """A question and how to answer it. `table`, `answer` and `plot` use only the stored rows of one budget.

    `first` runs once, in one process on the whole machine, before rows are measured in parallel: it trains what the
    rows share and measures the speed of the machine (`Workspace.cached`). `exclusive`: rows are measured one at a time.
    """

    folder: Path
    question: str
    plan: Callable[[str], list[tuple[str, int]]]  # budget -> (arm, seed) of every row
    measure: Callable[[Workspace, str, int], Row]
    table: Callable[[Rows], str]  # Markdown
    answer: Callable[[Rows], str]  # one or two sentences
    plot: Callable[[Rows], Figure]
    first: Callable[[Workspace], Any] = no_setup
    exclusive: bool = False
    budgets: tuple[str, ...] = WITHOUT_HOURS  # that `plan` has

    @property
    def name(self) -> str:
        """The name of its folder."""
        return self.folder.name


def run(experiment: Experiment, doc: str) -> None:
    """The command line: measures the missing rows, then prints the table and writes the figure."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", choices=experiment.budgets, default=experiment.budgets[1])
    parser.add_argument("--data_dir", default="data", help="folder of the prepared data sets")
    parser.add_argument("--runs", type=Path, default=Path("runs/experiments"), help="folder of the run folders")
    parser.add_argument(
        "--out", type=Path, help="folder of the results; default: that of run.py; with budget smoke a folder in --runs"
    )
    parser.add_argument(
        "--workers", type=int, help="processes that measure rows in parallel; default: 2 (minutes, cpu), 4 (gpu)"
    )
    parser.add_argument(
        "--only", choices=("first", "rows"), help="only the shared setup, or only the rows; no table, no figure"
    )
    args = parser.parse_args()
    if args.workers is not None and args.workers < 1:
        parser.error(f"--workers={args.workers}: must be at least 1")
    workspace = Workspace(args.budget, args.data_dir, args.runs / args.budget)
    smoke_folder = workspace.runs / "results" / experiment.name
    path = (args.out or (smoke_folder if args.budget == "smoke" else experiment.folder)) / "results.json"
    count = 1 if experiment.exclusive else args.workers or WORKERS[args.budget]
    try:
        if args.only or count == 1:
            configure(fast_compile=args.budget == "smoke")
            if args.only != "rows":
                run_first(experiment, workspace)
            if args.only != "first":
                measure_all(experiment, workspace, path)
        else:
            workers.run([*sys.argv, "--only=first"], 1)
            workers.run([*sys.argv, "--only=rows"], count)
    except (InputError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(workers.REFUSED) from None
    except Interrupted as interrupted:
        print(f"\nInterrupted: {interrupted}. The same command resumes from there.")
        raise SystemExit(interrupted.status) from None
    if path.exists() and not args.only:
        report(experiment, read_json(path), args.budget, path.with_name("figure.png"))


def report(experiment: Experiment, results: dict[str, Rows], budget: str, figure: Path) -> None:
    """Prints the table of a budget, and its answer if complete; plots the largest complete budget to `figure` (PNG)."""
    rows, largest = results.get(budget, {}), largest_complete_budget(experiment, results)
    print(f"\n{experiment.table(rows)}")
    if is_complete(experiment, budget, rows):
        print(f"\n{experiment.answer(rows)}")
    if largest:
        with atomic(figure) as temporary:
            # Without the matplotlib version in the metadata, so that equal results give equal files.
            experiment.plot(results[largest]).savefig(temporary, format="png", dpi=110, metadata={"Software": None})


def is_complete(experiment: Experiment, budget: str, rows: Rows) -> bool:
    """Whether each arm of a budget has been measured with at least one seed, which the answer needs."""
    planned = {arm for arm, _ in experiment.plan(budget)} if budget in experiment.budgets else {None}
    return planned <= {row["arm"] for row in rows.values()}


def largest_complete_budget(experiment: Experiment, results: dict[str, Rows]) -> str:
    """The largest complete budget; "" if there is none."""
    return next((name for name in reversed(BUDGETS) if is_complete(experiment, name, results.get(name, {}))), "")


def run_first(experiment: Experiment, workspace: Workspace) -> None:
    """Calls the experiment's `first` and stores the seconds it took the first time."""
    start = time.monotonic()
    experiment.first(workspace)
    workspace.cached(f"{experiment.name} first, seconds", lambda: round(time.monotonic() - start, 1))


def measure_all(experiment: Experiment, workspace: Workspace, path: Path) -> Rows:
    """Measures the rows missing from results.json at `path` that no other process measures; stores each at once."""
    plan = {f"{arm}, seed {seed}": (arm, seed) for arm, seed in experiment.plan(workspace.budget)}
    for name, (arm, seed) in plan.items():
        try:
            with workspace.lock(f"{experiment.name} {name}").acquire(blocking=False):
                if name in stored_rows(path, workspace.budget):
                    continue
                print(f"\n{experiment.name}: {name}", flush=True)
                start = time.monotonic()
                measured = experiment.measure(workspace, arm, seed)
                row = {"arm": arm, "seed": seed, **measured, "seconds": round(time.monotonic() - start, 1),
                       "first_seconds": workspace.cached(f"{experiment.name} first, seconds", lambda: 0.0),
                       "workers": workers.num_workers(), "commit": commit(), "device": device()}  # fmt: skip
                with workspace.lock(f"{experiment.name} results"):
                    rows = stored_rows(path, workspace.budget) | {name: row}
                    ordered = {name: rows[name] for name in (*plan, *rows) if name in rows}
                    write_json(path, (read_json(path) if path.exists() else {}) | {workspace.budget: ordered})
        except Timeout:  # another process measures this row
            continue
    return stored_rows(path, workspace.budget)


def stored_rows(path: Path, budget: str) -> Rows:
    """The rows of a budget in results.json."""
    return read_json(path).get(budget, {}) if path.exists() else {}


def device() -> str:
    """The device of the measurements: "1 of 2 CPU cores", or the number and name of the GPUs."""
    if jax.default_backend() != "cpu":
        return describe_device()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{usable} of {os.cpu_count()} CPU cores"


def commit() -> str:
    """The git commit (12 digits), with a + if files have changed; "unknown" outside of git."""

    def git(*command: str) -> str:
        result = subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=False)
        return result.stdout.strip() if result.returncode == 0 else ""

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "ldm_jax", "configs", "experiments/*.py")
    return (git("rev-parse", "--short=12", "HEAD") or "unknown") + ("+" if changed else "")
