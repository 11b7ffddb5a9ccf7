"""Does training Stable Diffusion fit a TPU slice, and how fast can it be? Compiled for slices, without a TPU.

    .venv-parity/bin/python -m experiments.scaling.run [--only=NAME ...] [--folder=runs/scaling for 9 GB]

Each row is a command `ldm_jax.train --config=configs/finetune.py --compile_for=SLICE`, of a model with zero weights in
a folder of diffusers; its JSON is added to results.json. Rows that are there are skipped, `--only=` prints the table
alone. Compiling takes one thread for each row, an hour of a slow core and 18 GB of memory at least.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from experiments import tables
from experiments.runner import ROOT, commit
from experiments.scaling.models import MODELS, write_model
from ldm_jax.runtime.files import read_json, write_json

PATH = Path(__file__).parent / "results.json"
GB = 2**30
IMAGES = 8  # of the data set: their latents are on every device, 1 MB


class Arm(NamedTuple):
    """What is compiled."""

    model: str
    slice: str  # of TPUs
    engine: str
    per_chip: int  # images of a step
    remat: bool = False
    lora: int = 0  # rank; 0: all of the UNet is trained
    fsdp: int = 0  # number of chips that the state is sharded over; 0: all

    @property
    def chips(self) -> int:
        return int(np.prod([int(length) for length in self.slice.split(":")[1].split("x")]))

    @property
    def name(self) -> str:
        more = (", remat" if self.remat else "") + (f", LoRA of rank {self.lora}" if self.lora else "")
        return f"{self.model}, {self.slice}, {self.sharding}, {self.per_chip} a chip{more}"

    @property
    def sharding(self) -> str:
        return self.engine + (f" over {self.fsdp}" if self.fsdp else "")


# In the order in which they are compiled: the smallest that answers a question first.
ARMS = (
    Arm("SD 1.5", "v5e:4x4", "fsdp", 4),
    Arm("SD 1.5", "v5e:16x16", "fsdp", 4),
    Arm("SD 1.5", "v5e:16x16", "fsdp", 4, fsdp=16),
    Arm("SD 1.5", "v5e:4x4", "pmap", 4),
    Arm("SD 1.5", "v5e:4x4", "pmap", 4, lora=8),
    Arm("SD 1.5", "v5e:4x4", "fsdp", 16, remat=True),
    Arm("SD 1.5", "v5e:8x8", "fsdp", 4),
    Arm("SDXL", "v5e:16x16", "fsdp", 1, remat=True),
    Arm("SDXL", "v5p:2x2x4", "fsdp", 4, remat=True),
    Arm("SDXL", "v5e:4x4", "fsdp", 1, remat=True),
)


def command(arm: Arm, folder: Path) -> list[str]:
    """The command of an arm; its model and images are in `folder`."""
    size = 8 * MODELS[arm.model][0].sample_size
    fields = {
        "init_from": folder / arm.model.replace(" ", "_"),
        "data.path": folder / "images",
        "data.dir": folder / "data",
        "data.image_size": size,
        "dtype": "bfloat16",
        "diffusion.batch_size": arm.chips * arm.per_chip,
        "parallel.engine": arm.engine,
        "parallel.fsdp": arm.fsdp,
        "parallel.remat": arm.remat,
        "sampling.num": 0,
        "sampling.batch_size": arm.chips,
        "evaluation.batch_size": arm.chips,
    } | ({"lora.rank": arm.lora} if arm.lora else {})
    flags = [f"--config.{name}={value}" for name, value in fields.items()]
    head = [sys.executable, "-m", "ldm_jax.train", "--config=configs/finetune.py", f"--compile_for={arm.slice}"]
    return [*head, f"--workdir={folder / 'run'}", *flags]


def write_images(folder: Path) -> None:
    """Captioned images of one colour each."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(IMAGES):
        Image.new("RGB", (1024, 1024), (30 * number, 128, 255 - 30 * number)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"colour {number}")


def prepare(model: str, folder: Path) -> None:
    """The model and the images, unless they are there."""
    if not (folder / "images").exists():
        write_images(folder / "images")
    if not (folder / model.replace(" ", "_") / "model_index.json").exists():
        counts = write_model(model, folder / model.replace(" ", "_"))
        print(f"{model}: " + ", ".join(f"{name} {count / 1e6:,.0f} million" for name, count in counts.items()))


def measure(arm: Arm, folder: Path) -> dict[str, Any]:
    """The row of an arm: the command's report, and the seconds it took.

    Raises SystemExit if the command has no report; one whose step does not fit has, with exit status 2.
    """
    prepare(arm.model, folder)
    start = time.monotonic()
    done = subprocess.run(command(arm, folder), cwd=ROOT, capture_output=True, text=True, check=False)
    reports = [line for line in done.stdout.splitlines() if line.startswith('{"compiled_for"')]
    if not reports:
        raise SystemExit(f"{arm.name}: exit status {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return {"arm": arm._asdict(), "commit": commit(), "seconds": round(time.monotonic() - start),
            "report": json.loads(reports[-1])}  # fmt: skip


def table(rows: dict[str, dict[str, Any]]) -> str:
    """What each arm needs of a chip's memory, and the predicted speed."""
    head = ["model", "slice", "engine", "images a chip", "state, GB", "activations, temporaries, GB", "of", "fits",
            "collectives, GB a step", "predicted images/s", "utilization"]  # fmt: skip
    body = []
    for row in rows.values():
        arm, report = Arm(**row["arm"]), row["report"]
        stage = report["stages"]["diffusion"]
        memory, prediction = stage["memory"], stage.get("prediction")
        state = sum(memory[kind] for kind in ("parameters", "EMA", "optimizer", "frozen"))
        more = (", remat" if arm.remat else "") + (f", LoRA {arm.lora}" if arm.lora else "")
        body.append([
            arm.model, arm.slice, arm.sharding + more, str(arm.per_chip), f"{state / GB:.2f}",
            f"{(stage['memory_total'] - state) / GB:.2f}", f"{report['memory'] / GB:.0f}",
            "yes" if stage["fits"] else "no: " + " or ".join(f"`{flag}`" for flag in stage["change"]),
            f"{sum(each['bytes'] for each in stage['collectives'].values()) / GB:.2f}",
            f"{prediction['images_per_second']:,.0f}" if prediction else "",
            f"{prediction['utilization']:.0%}" if prediction else "",
        ])  # fmt: skip
    return tables.table(head, body)


def figure(rows: dict[str, dict[str, Any]]) -> Figure:
    """Memory of a chip by kind, and the predicted milliseconds of a step by what takes them, of each arm."""
    drawing, (left, right) = plt.subplots(1, 2, figsize=(11, 1.2 + 0.45 * len(rows)), sharey=True, layout="constrained")
    kinds = {"state": ("parameters", "EMA", "optimizer", "frozen"), "activations": ("activations",),
             "temporaries, padding": ("temporaries", "program, padding", "data")}  # fmt: skip
    parts = ("arithmetic", "memory", "communication")
    stages = [row["report"]["stages"]["diffusion"] for row in rows.values()]
    start = np.zeros(len(rows))
    for kind, names in kinds.items():
        values = np.array([sum(stage["memory"].get(name, 0) for name in names) / GB for stage in stages])
        left.barh(list(rows), values, left=start, label=kind)
        start += values
    for position, row in enumerate(rows.values()):
        left.plot([row["report"]["memory"] / GB] * 2, [position - 0.4, position + 0.4], color="black")
    for offset, part in enumerate(parts):
        seconds = [stage["prediction"][part] if "prediction" in stage else 0 for stage in stages]
        right.barh(np.arange(len(rows)) + 0.27 * (offset - 1), 1e3 * np.array(seconds), 0.25, label=part)
    left.set(xlabel="GB of a chip (line: what it has)")
    right.set(xlabel="ms of a step at the peak of each, predicted")
    left.invert_yaxis()
    for axes, place in ((left, "lower right"), (right, "upper right")):
        axes.legend(frameon=False, loc=place)
        axes.spines[["top", "right"]].set_visible(False)
    return drawing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [arm.name for arm in ARMS]
    parser.add_argument("--only", nargs="*", default=names, metavar="NAME", help=" | ".join(names))
    parser.add_argument("--folder", type=Path, default=Path("runs/scaling"))
    parser.add_argument("--out", type=Path, default=PATH, help="file of the results")
    args = parser.parse_args()
    if unknown := [name for name in args.only if name and name not in names]:
        parser.error(f"there is no row {unknown[0]!r}; the rows are: {'; '.join(names)}")
    jax.config.update("jax_platforms", "cpu")  # this process writes files; only its children compile
    rows = read_json(args.out) if args.out.exists() else {}
    for arm in ARMS:
        if arm.name in args.only and arm.name not in rows:
            rows[arm.name] = measure(arm, args.folder.absolute())
            write_json(args.out, {name: rows[name] for name in names if name in rows})
            print(f"{arm.name}: {rows[arm.name]['seconds']} s", flush=True)
    if rows:
        figure(rows).savefig(args.out.with_name("figure.png"), dpi=120)
        print(table(rows))


if __name__ == "__main__":
    main()
