"""Are the losses the same on any number of devices and hosts? And what do pmap and FSDP cost relative to jit?

    python experiments/data_parallel/run.py [--budget=smoke|minutes|gpu]

Diffusion on pixels, the same batches of 16 sharded over 1, 2, 4 and 8 virtual devices of one CPU, and over two
processes with two devices each: by `jit` on one device, and by the engines of ldm_jax.train, `pmap` and FSDP.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # to import from the repository root

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from experiments import runner, tables
from experiments.runner import ROOT, Experiment, Row, Rows, Workspace
from ldm_jax.errors import RunError
from ldm_jax.runtime.files import read_json

ARMS = {  # arm -> (processes, devices per process)
    "1 device": (1, 1),
    "2 devices": (1, 2),
    "4 devices": (1, 4),
    "8 devices": (1, 8),
    "2 processes of 2": (2, 2),
}
ONE = "1 device"
PLANS = {"smoke": (ONE, "2 processes of 2"), "minutes": tuple(ARMS), "gpu": (ONE,)}
STRATEGIES = ("jit", "pmap", "FSDP")
WARMUP = 2  # steps that are not timed, because they compile


def plan(budget: str) -> list[tuple[str, int]]:
    return [(arm, 0) for arm in PLANS[budget]]


def measure(workspace: Workspace, arm: str, seed: int) -> Row:
    processes, devices = ARMS[arm]
    expected, results = np.array(run_of(workspace, ONE)["jit"]["losses"]), run_of(workspace, arm)
    base = np.median(results.get("jit", results["pmap"])["step_seconds"][WARMUP:])
    strategies = {
        name: {
            "losses": result["losses"],
            "max_relative_difference_ppm": 1e6 * float(np.abs(result["losses"] / expected - 1).max()),
            "seconds_per_step": float(np.median(result["step_seconds"][WARMUP:])),
            "relative_step_time": float(np.median(result["step_seconds"][WARMUP:]) / base),
            "state_megabytes": result["state_bytes"] / 1e6,
        }
        for name, result in results.items()
    }
    return {"devices": processes * devices, "strategies": strategies}


def run_of(workspace: Workspace, arm: str) -> dict:
    """The results of an arm's worker processes (see `worker.measure`), measured now or stored earlier."""
    processes, devices = ARMS[arm]
    out = (workspace.runs / "data_parallel" / f"{arm}.json").resolve()
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        command = [
            sys.executable,
            "-m",
            "experiments.data_parallel.worker",
            f"--budget={workspace.budget}",
            f"--out={out}",
        ]
        command.append(f"--data_dir={Path(workspace.data_dir).resolve()}")
        if processes > 1:
            command.append(f"--coordinator=localhost:{free_port()}")
        environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)}
        workers = [
            subprocess.Popen([*command, f"--process_id={i}"], cwd=ROOT, env=environment) for i in range(processes)
        ]
        try:
            if any(worker.wait() for worker in workers):
                raise RunError(f"experiments.data_parallel.worker failed for {arm}; its output is above")
        finally:
            for worker in workers:
                worker.kill()
    return read_json(out)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def table(rows: Rows) -> str:
    head = ["devices", "strategy", "largest relative difference of a loss (1e-6)", "step time relative to jit"]
    head.append("MB of state per device")
    body = []
    for row in rows.values():
        for name, result in row["strategies"].items():
            time = f"{result['relative_step_time']:.2f}" if "jit" in row["strategies"] else "-"
            difference, state = (f"{result[key]:.1f}" for key in ("max_relative_difference_ppm", "state_megabytes"))
            body.append([row["arm"], name, difference, time, state])
    return tables.table(head, body)


def answer(rows: Rows) -> str:
    one = next(iter(rows.values()))["strategies"]
    results = [result for row in rows.values() for result in row["strategies"].values()]
    largest = max(result["max_relative_difference_ppm"] for result in results)
    most = max((row for row in rows.values() if "jit" in row["strategies"]), key=lambda row: row["devices"])
    pmap, fsdp = most["strategies"]["pmap"], most["strategies"]["FSDP"]
    return (
        f"No loss differs by more than {largest:.1f} millionths from that on one device. There a step of pmap takes "
        f"{one['pmap']['relative_step_time']:.2f} times as long as by jit, of FSDP "
        f"{one['FSDP']['relative_step_time']:.2f}. With {most['arm']} on the same cores it is "
        f"{pmap['relative_step_time']:.2f} and {fsdp['relative_step_time']:.2f}, and FSDP stores "
        f"{fsdp['state_megabytes']:.1f} MB of state per device instead of {pmap['state_megabytes']:.1f}."
    )


def plot(rows: Rows) -> Figure:
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.8))
    expected = np.array(next(iter(rows.values()))["strategies"]["jit"]["losses"])
    for row in rows.values():
        for name in ("pmap", "FSDP"):
            difference = np.abs(row["strategies"][name]["losses"] / expected - 1)
            style = "-" if name == "pmap" else "--"
            axes[0].plot(np.maximum(difference, 1e-9), style, label=f"{row['arm']}, {name}")  # log of 0
    axes[0].set(title="relative difference of the loss from one device", xlabel="step", yscale="log")
    axes[0].set_ylim(top=1e-5)  # room for the legend
    axes[0].legend(fontsize=6, ncols=3, loc="upper center")
    timed = [row for row in rows.values() if "jit" in row["strategies"]]
    for number, name in enumerate(STRATEGIES):
        places = np.arange(len(timed)) + 0.27 * (number - 1)
        axes[1].bar(places, [row["strategies"][name]["relative_step_time"] for row in timed], 0.25, label=name)
    axes[1].set_xticks(range(len(timed)), [row["arm"] for row in timed])
    axes[1].set(title="step time relative to jit on one device")
    axes[1].legend(fontsize=8, loc="lower right", framealpha=1)
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.tight_layout()
    return figure


EXPERIMENT = Experiment(
    Path(__file__).parent, "Are the losses the same on any number of devices, and what does data parallelism cost?",
    plan, measure, table, answer, plot, exclusive=True,
)  # fmt: skip

if __name__ == "__main__":
    runner.run(EXPERIMENT, __doc__)
