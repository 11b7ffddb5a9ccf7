"""Are the losses the same on any number of devices and hosts? And what do pmap and FSDP cost beside one compiled step?

    python experiments/data_parallel/run.py [--budget=smoke|cpu|gpu]

Diffusion on pixels, the same batches of 16 split over 1, 2, 4 and 8 virtual devices of one CPU, and over two processes
of two: compiled for one device, mapped by `pmap` (what `ldm_jax.train` does), and with the state split too (fsdp.py).
"""

import os
import socket
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a script sees its own folder only

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from experiments import frame, tables
from experiments.frame import ROOT, Experiment, Lab, Row, Rows
from ldm_jax.errors import RunError
from ldm_jax.runtime.files import read_json

ARMS = {  # arm -> (processes, devices of each)
    "1 device": (1, 1),
    "2 devices": (1, 2),
    "4 devices": (1, 4),
    "8 devices": (1, 8),
    "2 processes of 2": (2, 2),
}
ONE = "1 device"
PLANS = {"smoke": (ONE, "2 processes of 2"), "cpu": tuple(ARMS), "gpu": (ONE,)}
WAYS = ("jit", "pmap", "FSDP")
WARM = 2  # steps that are not timed, as they compile


def plan(budget: str) -> list[tuple[str, int]]:
    return [(arm, 0) for arm in PLANS[budget]]


def measure(lab: Lab, arm: str, seed: int) -> Row:
    processes, devices = ARMS[arm]
    expected, found = np.array(run_of(lab, ONE)["jit"]["losses"]), run_of(lab, arm)
    beside = np.median(found.get("jit", found["pmap"])["step_seconds"][WARM:])
    ways = {
        name: {
            "losses": way["losses"],
            "largest_difference_in_millionths": 1e6 * float(np.abs(way["losses"] / expected - 1).max()),
            "seconds_per_step": float(np.median(way["step_seconds"][WARM:])),
            "times": float(np.median(way["step_seconds"][WARM:]) / beside),
            "megabytes_of_state": way["state_bytes"] / 1e6,
        }
        for name, way in found.items()
    }
    return {"devices": processes * devices, "ways": ways}


def run_of(lab: Lab, arm: str) -> dict:
    """What the workers of an arm found out (see `worker.measure`), now or before."""
    processes, devices = ARMS[arm]
    out = (lab.runs / "data_parallel" / f"{arm}.json").resolve()
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "experiments.data_parallel.worker", f"--budget={lab.budget}", f"--out={out}"]
        command.append(f"--data_dir={Path(lab.data_dir).resolve()}")
        if processes > 1:
            command.append(f"--coordinator=localhost:{free_port()}")
        environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)}
        workers = [
            subprocess.Popen([*command, f"--process_id={i}"], cwd=ROOT, env=environment) for i in range(processes)
        ]
        try:
            if any(worker.wait() for worker in workers):
                raise RunError(f"experiments.data_parallel.worker failed for {arm}; what it said is above")
        finally:
            for worker in workers:
                worker.kill()
    return read_json(out)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def table(rows: Rows) -> str:
    head = ["devices", "way", "largest difference of a loss, in millionths", "time of a step beside jit"]
    head.append("MB of state on a device")
    body = []
    for row in rows.values():
        for way, found in row["ways"].items():
            times = f"{found['times']:.2f}" if "jit" in row["ways"] else "-"
            apart, state = (f"{found[name]:.1f}" for name in ("largest_difference_in_millionths", "megabytes_of_state"))
            body.append([row["arm"], way, apart, times, state])
    return tables.table(head, body)


def answer(rows: Rows) -> str:
    one = next(iter(rows.values()))["ways"]
    largest = max(way["largest_difference_in_millionths"] for row in rows.values() for way in row["ways"].values())
    most = max((row for row in rows.values() if "jit" in row["ways"]), key=lambda row: row["devices"])
    pmap, fsdp = most["ways"]["pmap"], most["ways"]["FSDP"]
    return (
        f"No loss of any arm is further than {largest:.1f} millionths from that of one device. There pmap takes "
        f"{one['pmap']['times']:.2f} times as long as jit, FSDP {one['FSDP']['times']:.2f}. With {most['arm']} on the "
        f"same cores it is {pmap['times']:.2f} and {fsdp['times']:.2f}, and FSDP keeps "
        f"{fsdp['megabytes_of_state']:.1f} MB of state on each instead of {pmap['megabytes_of_state']:.1f}."
    )


def draw(rows: Rows) -> Figure:
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.8))
    expected = np.array(next(iter(rows.values()))["ways"]["jit"]["losses"])
    for row in rows.values():
        for way in ("pmap", "FSDP"):
            apart = np.abs(row["ways"][way]["losses"] / expected - 1)
            style = "-" if way == "pmap" else "--"
            axes[0].plot(np.maximum(apart, 1e-9), style, label=f"{row['arm']}, {way}")  # 0 has no logarithm
    axes[0].set(title="difference of the loss from one device's", xlabel="step", yscale="log")
    axes[0].set_ylim(top=1e-5)  # room for the legend
    axes[0].legend(fontsize=6, ncols=3, loc="upper center")
    timed = [row for row in rows.values() if "jit" in row["ways"]]
    for number, way in enumerate(WAYS):
        places = np.arange(len(timed)) + 0.27 * (number - 1)
        axes[1].bar(places, [row["ways"][way]["times"] for row in timed], 0.25, label=way)
    axes[1].set_xticks(range(len(timed)), [row["arm"] for row in timed])
    axes[1].set(title="time of a step beside jit on one device")
    axes[1].legend(fontsize=8, loc="lower right", framealpha=1)
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.tight_layout()
    return figure


EXPERIMENT = Experiment(
    Path(__file__).parent, "Are the losses the same on any number of devices, and what does sharing the work cost?",
    plan, measure, table, answer, draw, alone=True,
)  # fmt: skip

if __name__ == "__main__":
    frame.run(EXPERIMENT, __doc__)
