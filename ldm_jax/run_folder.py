"""The run folder is the record of a run: which files it has, and how they are written so that none is ever half there.

config.json       the resolved config            latents/        cached moments, by content hash
metrics.jsonl     one line a measurement         progress/       sample grids made while training
events.out.*      the same for TensorBoard       samples.npz, samples.png, denoising.gif
autoencoder/      stage 1: checkpoints, scale    evaluation.json, bound.json, report.html
diffusion/        stage 2: checkpoints           classifier/     its checkpoints, where one is trained
pytorch_lora_weights.safetensors                 of a run that fine-tunes by LoRA: for diffusers
"""

import hashlib
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from ldm_jax import configuration
from ldm_jax.errors import InputError
from ldm_jax.files import atomic
from ldm_jax.files import read_json as read_json  # what the record is read and written by
from ldm_jax.files import write_json as write_json


def check_folder(flag: str, path: Path) -> None:
    """Raises InputError if there is a file where --`flag` wants a folder."""
    for place in (path, *path.parents):
        if place.exists() and not place.is_dir():
            raise InputError(f"--{flag}={path}: {place} is a file; it must be a folder or not exist yet")


def check(workdir: Path, config: ConfigDict) -> None:
    """Raises InputError if `workdir` holds another run or something else; writes nothing."""
    check_folder("workdir", workdir)
    if (workdir / "config.json").exists():
        begun = configuration.from_json(workdir / "config.json")
        since = sorted(configuration.flatten(config).keys() - configuration.flatten(begun).keys())
        if since:
            raise InputError(
                f"--workdir={workdir} was begun by an older version, which knew no config.{since[0]}; it can be drawn "
                "from and scored, but not gone on with: choose another --workdir"
            )
        differences = configuration.differences(begun, config)
        if differences:
            more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
            raise InputError(
                f"--workdir={workdir} belongs to another config ({'; '.join(differences[:3])}{more}); "
                "choose another --workdir, or remove that one"
            )
    elif workdir.exists() and any(workdir.iterdir()):
        raise InputError(f"--workdir={workdir} is not empty and has no config.json; choose a new or an empty folder")


class Log:
    """metrics.jsonl and TensorBoard events. Only the first process writes.

    A line is {"stage", "step", "time": seconds spent in this run up to now, over all its restarts, name: value ...}.
    """

    def __init__(self, workdir: Path, *, write: bool) -> None:
        self._path = workdir / "metrics.jsonl"
        self._events = None
        self._write = write
        lines = self.read()
        self._start = time.monotonic() - (lines[-1]["time"] if lines else 0.0)
        if write:
            from tensorboardX import SummaryWriter

            self._events = SummaryWriter(str(workdir))

    def read(self) -> list[dict[str, Any]]:
        """All lines so far; a last line that a kill cut short is dropped."""
        return read_metrics(self._path)

    def rewind(self, stage: str, step: int) -> None:
        """Forgets the lines of `stage` beyond `step`: a resumed stage will write them again."""
        if self._write and self._path.exists():
            kept = [line for line in self.read() if not (line["stage"] == stage and line["step"] > step)]
            with atomic(self._path) as temporary:
                temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))

    def __call__(self, stage: str, step: int, **values: float) -> None:
        """Appends a line."""
        if not self._write:
            return
        line = {"stage": stage, "step": step, "time": round(time.monotonic() - self._start, 2)}
        with self._path.open("a") as file:
            file.write(json.dumps(line | {name: float(value) for name, value in values.items()}) + "\n")
        for name, value in values.items():
            self._events.add_scalar(f"{stage}/{name}", value, step)

    def close(self) -> None:
        """Flushes the TensorBoard events."""
        if self._events is not None:
            self._events.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, [] if there is none; a line that a kill cut short is dropped."""
    lines = []
    for text in path.read_bytes().splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
        except ValueError:  # of JSON or of UTF-8
            continue
        if isinstance(line, dict) and {"stage", "step", "time"} <= line.keys():
            lines.append(line)
    return lines


def content_hash(tree: Any, *parts: str) -> str:
    """A hash of a tree of arrays, and of whatever else is to be told apart."""
    import jax  # here, as train.py reads this module before JAX may be imported

    digest = hashlib.sha256("\n".join(parts).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8))
    return digest.hexdigest()[:16]
