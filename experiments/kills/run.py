"""Kills a training job at random moments and starts it again: what is lost, and does the result stay the same?

    .venv/bin/python experiments/kills/run.py [--kills=50] [--folder=runs/kills] [--data_dir=data]

The job is the main job with fewer steps. Each start of it gets a signal, SIGKILL, SIGTERM or SIGINT, after a random
time within that of a job without one, until it comes to its end; then its checkpoints, losses and samples are
compared with those of a job that never got a signal, and another job begins. Each kill is a row of results.json, to
which the same command adds; `--kills=0` prints the table alone.
"""

import argparse
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # to import from the repository root

import numpy as np

from experiments import tables
from experiments.runner import ROOT, commit
from ldm_jax.run_folder.checkpoint import load_latest
from ldm_jax.run_folder.log import read_metrics
from ldm_jax.runtime.files import read_json, write_json

PATH = Path(__file__).parent / "results.json"
INTERVAL, STEPS = 20, 60  # steps between checkpoints, and of each stage
JOB = {
    "data.train_split": "train[:4096]",  # else most of the time is spent on latents
    "log_every": 1,
    "checkpoint_every": INTERVAL,
    "autoencoder.steps": STEPS,
    "autoencoder.loss.perceptual_start": STEPS // 2,
    "autoencoder.loss.adversarial_start": STEPS // 2,
    "diffusion.steps": STEPS,
    "diffusion.batch_size": 16,
    "diffusion.validation_examples": 200,
    "sampling.num": 40,
    "sampling.progress_every": 2 * INTERVAL,
    "evaluation.num_reference": 200,
    "evaluation.vlb_examples": 20,
}
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
CHANCES = (0.6, 0.2, 0.2)
STATUSES = {signal.SIGKILL: 137, signal.SIGTERM: 143, signal.SIGINT: 130}
STAGES = ("autoencoder", "diffusion")
PHASES = ("before the first step", "autoencoder", "after the autoencoder", "diffusion", "samples and scores")
OTHER = ("time", "examples_per_second")  # of a line of metrics.jsonl: not of the training


def command(workdir: Path, data_dir: str) -> list[str]:
    """The command of the job."""
    flags = [f"--config.{name}={value}" for name, value in (JOB | {"data.dir": data_dir}).items()]
    return [sys.executable, "-m", "ldm_jax.train", "--config=configs/fashion_mnist.py", f"--workdir={workdir}", *flags]


def run_job(workdir: Path, data_dir: str, *, after: float = np.inf, by: int = signal.SIGKILL) -> tuple[int, bool]:
    """Starts or resumes the job and sends it signal `by` after `after` seconds: (exit status, whether it was sent).

    The status is that of a shell: 128 + n of a process that signal n ended.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    with (workdir.parent / f"{workdir.name}.log").open("ab") as log:
        process = subprocess.Popen(command(workdir, data_dir), cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        try:
            status, sent = process.wait(timeout=None if after == np.inf else after), False
        except subprocess.TimeoutExpired:
            process.send_signal(by)
            status, sent = process.wait(), True
        return 128 - status if status < 0 else status, sent


def make_reference(workdir: Path, data_dir: str) -> float:
    """Runs the job without a signal, twice; returns the seconds of the second time, when its programs are compiled."""
    for _ in range(2):
        shutil.rmtree(workdir, ignore_errors=True)
        start = time.monotonic()
        if status := run_job(workdir, data_dir)[0]:
            raise SystemExit(f"the job without a kill ended with status {status}: see {workdir}.log")
    return round(time.monotonic() - start, 1)


def outcome(workdir: Path) -> dict[str, Any]:
    """All that a finished job leaves which another must leave equal: checkpoints, losses of each step, samples."""
    kept = {f"{stage}/{name}": array for stage in STAGES for name, array in load_latest(workdir / stage).items()}
    with np.load(workdir / "samples.npz") as samples:
        kept |= {f"samples/{name}": samples[name] for name in samples.files}
    for line in read_metrics(workdir / "metrics.jsonl"):
        if line["stage"] in STAGES:
            values = [value for name, value in line.items() if name not in (*OTHER, "stage", "step")]
            kept[f"metrics/{line['stage']}/{line['step']}/{len(values)}"] = np.array(values)
    return kept


def differences(workdir: Path, reference: Path) -> list[str]:
    """The names of what differs between two finished jobs."""
    one, other = outcome(workdir), outcome(reference)
    return sorted(
        name for name in one.keys() | other.keys() if not np.array_equal(one.get(name), other.get(name), equal_nan=True)
    )


def position(workdir: Path) -> tuple[str, int]:
    """The stage and the step of the last training step on record; ("start", 0) before the first."""
    lines = [line for line in read_metrics(workdir / "metrics.jsonl") if line["stage"] in STAGES]
    return (lines[-1]["stage"], lines[-1]["step"]) if lines else ("start", 0)


def last_checkpoint(folder: Path) -> int:
    """The step of a stage's last complete checkpoint, 0 without one."""
    return max((int(path.name) for path in folder.glob("*") if path.name.isdecimal()), default=0)


def phase(stage: str, step: int) -> str:
    """The part of the job in which it got the signal."""
    last = f"after the {stage}" if stage != STAGES[-1] else "samples and scores"
    return "before the first step" if stage == "start" else last if step == STEPS else stage


def kill_once(folder: Path, number: int, seconds: float, data_dir: str) -> dict[str, Any] | None:
    """The row of kill `number`, of the job in `folder`; None if the job came to its end, with status 0."""
    rng = np.random.default_rng(number)
    by, after = SIGNALS[rng.choice(3, p=CHANCES)], float(rng.uniform(0, seconds))
    status, sent = run_job(folder, data_dir, after=after, by=by)
    if status == 0:
        return None
    if not sent:
        raise SystemExit(f"the job in {folder} ended with status {status}: see its .log")
    stage, step = position(folder)
    lost = max(0, step - last_checkpoint(folder / stage))
    return {"kill": number, "signal": by.name, "after": round(after, 2), "status": status,
            "phase": phase(stage, step), "stage": stage, "step": step, "lost": lost}  # fmt: skip


def table(results: dict[str, Any]) -> str:
    """The kills by signal and phase, and the jobs that ended."""
    rows, jobs, body = results["kills"], results["jobs"], []
    for by in SIGNALS:
        for part in PHASES:
            some = [row for row in rows if row["signal"] == by.name and row["phase"] == part]
            right = sum(row["status"] == STATUSES[by] for row in some)
            if some:
                most = max(row["lost"] for row in some)
                body.append([by.name, part, str(len(some)), f"{right} of {len(some)}", str(most)])
    equal = sum(not job["differences"] for job in jobs)
    head = ["signal", "during", "kills", "exit status as documented", "most steps lost"]
    return (
        f"{len(rows)} kills in {len(jobs)} finished jobs, of which {equal} are bit for bit as the one without a kill; "
        f"a checkpoint every {INTERVAL} steps.\n\n{tables.table(head, body)}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="number of kills to add")
    parser.add_argument("--folder", type=Path, default=Path("runs/kills"))
    parser.add_argument("--data_dir", default="data")
    parser.add_argument("--out", type=Path, default=PATH, help="file of the results")
    args = parser.parse_args()
    results = read_json(args.out) if args.out.exists() else {"commit": commit(), "kills": [], "jobs": []}
    reference = args.folder.absolute() / "reference"
    if args.kills and not (reference / "report.html").exists():
        results["seconds"] = make_reference(reference, args.data_dir)
    last = len(results["kills"]) + args.kills
    while len(results["kills"]) < last:
        job = len(results["jobs"])
        folder = args.folder.absolute() / f"job_{job}"
        row = kill_once(folder, results.get("starts", 0), results["seconds"], args.data_dir)
        results["starts"] = results.get("starts", 0) + 1
        if row is None:
            differing = differences(folder, reference)
            results["jobs"].append({"job": job, "differences": differing})
            if not differing:
                shutil.rmtree(folder)
        else:
            results["kills"].append({"job": job} | row)
            print(f"{len(results['kills'])}/{last}: {row}", flush=True)
        write_json(args.out, results)
    print(table(results))


if __name__ == "__main__":
    main()
