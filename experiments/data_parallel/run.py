"""Are the losses the same on any number of devices and hosts? And what do pmap and FSDP cost beside one compiled step?

    python experiments/data_parallel/run.py [--budget=smoke|cpu|gpu]

Diffusion on pixels, the same batches of 16 split over 1, 2, 4 and 8 virtual devices of one CPU, and over two processes of
two: compiled for one device, mapped by `pmap` (what `ldm_jax.train` does), and with the state itself split (fsdp.py).
"""

import os
import socket
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a script sees its own folder only

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from experiments import frame, tables
from experiments.frame import ROOT, Experiment, Lab, Row, Rows
from ldm_jax.errors import RunError
from ldm_jax.files import read_json

ARMS = {  # arm -> (processes, devices of each)
    "1 device": (1, 1),
    "2 devices": (1, 2),
    "4 devices": (1, 4),
    "8 devices": (1, 8),
    "2 processes of 2": (2, 2),
}
ONE = "1 device"
SHARED_ARMS = {"smoke": (ONE, "2 processes of 2"), "cpu": tuple(ARMS), "gpu": (ONE,)}
WAYS = ("jit", "pmap", "FSDP")
WARM = 3  # steps that are not timed, as they compile


def plan(budget: str) -> list[tuple[str, int]]:
    return [(arm, 0) for arm in SHARED_ARMS[budget]]


def measure(lab: Lab, arm: str, seed: int) -> Row:
    processes, devices = ARMS[arm]
    out = (lab.runs / f"data_parallel {arm}.json").resolve()
    out.unlink(missing_ok=True)
    lab.runs.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "experiments.data_parallel.worker", f"--budget={lab.budget}", f"--out={out}"]
    command.append(f"--data_dir={Path(lab.data_dir).resolve()}")
    if processes > 1:
        command.append(f"--coordinator=localhost:{free_port()}")
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)}
    workers = [
        subprocess.Popen([*command, f"--process_id={i}"], cwd=ROOT, env=environment) for i in range(processes)
    ]
    try:
        if any([worker.wait() for worker in workers]):
            raise RunError(f"experiments.data_parallel.worker failed for {arm}; what it said is above")
    finally:
        for worker in workers:
            worker.kill()
    return {"processes": processes, "devices": processes * devices, "ways": summary(read_json(out))}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def summary(found: dict) -> dict:
    """The middle of the times; also as a multiple of the time of the way that was measured beside it."""
    for way in found.values():
        way["seconds_per_step"] = float(np.median(way.pop("step_seconds")[WARM - 1 :]))
    base = found.get("jit", found["pmap"])["seconds_per_step"]
    return {name: way | {"times": way["seconds_per_step"] / base} for name, way in found.items()}


def difference(rows: Rows, arm: str, way: str) -> float:
    """The largest relative difference of a loss from that of one device."""
    losses, expected = (np.array(found) for found in (of(rows, arm)[way]["losses"], of(rows, ONE)["jit"]["losses"]))
    return float(np.abs(losses / expected - 1).max())


def of(rows: Rows, arm: str) -> dict:
    return next(row["ways"] for row in rows.values() if row["arm"] == arm)


def table(rows: Rows) -> str:
    head = ["devices", "way", "largest difference of a loss", "time of a step beside jit", "MB of state on a device"]
    body = []
    for arm in tables.arms(rows):
        for way, found in of(rows, arm).items():
            times = f"{found['times']:.2f}" if "jit" in of(rows, arm) else "-"
            megabytes = f"{found['state_bytes'] / 1e6:.1f}"
            body.append([arm, way, f"{difference(rows, arm, way):.0e}", times, megabytes])
    return tables.table(head, body)


def answer(rows: Rows) -> str:
    arms = tables.arms(rows)
    one = of(rows, ONE)
    most = max(arms, key=lambda arm: len(of(rows, arm)) > 2 and int(arm.split()[0]))
    largest = max(difference(rows, arm, way) for arm in arms for way in of(rows, arm))
    last = of(rows, most)
    return (
        f"They are: after {len(one['jit']['losses'])} steps no loss of any arm is further than {largest:.0e} from that "
        f"of one device. On one device pmap takes {one['pmap']['times']:.2f} times as long as jit, FSDP "
        f"{one['FSDP']['times']:.2f}; on {most} that share its cores, pmap {last['pmap']['times']:.2f} and FSDP "
        f"{last['FSDP']['times']:.2f}, with {last['FSDP']['state_bytes'] / 1e6:.1f} MB of state on each instead of "
        f"{last['pmap']['state_bytes'] / 1e6:.1f}."
    )


def draw(rows: Rows, path: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.8))
    arms = tables.arms(rows)
    for arm in arms:
        for way, found in of(rows, arm).items():
            apart = np.abs(np.array(found["losses"]) / np.array(of(rows, ONE)["jit"]["losses"]) - 1)
            if (arm, way) != (ONE, "jit"):
                axes[0].plot(np.maximum(apart, 1e-9), ls="-" if way == "pmap" else "--", label=f"{arm}, {way}")
    axes[0].set(title="difference of the loss from one device's", xlabel="step", yscale="log")
    axes[0].legend(fontsize=6)
    timed = [arm for arm in arms if "jit" in of(rows, arm)]
    for number, way in enumerate(WAYS):
        places = np.arange(len(timed)) + 0.27 * (number - 1)
        axes[1].bar(places, [of(rows, arm)[way]["times"] for arm in timed], 0.25, label=way)
    axes[1].set_xticks(range(len(timed)), timed)
    axes[1].set(title="time of a step beside jit on one device")
    axes[1].legend(fontsize=8)
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})


EXPERIMENT = Experiment(
    Path(__file__).parent, "Are the losses the same on any number of devices, and what does sharing the work cost?",
    plan, measure, table, answer, draw,
)  # fmt: skip

if __name__ == "__main__":
    frame.run(EXPERIMENT, __doc__)
