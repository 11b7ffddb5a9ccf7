"""The metrics of a run: metrics.jsonl and TensorBoard events."""

import json
import time
from pathlib import Path
from typing import Any

from ldm_jax.runtime.files import atomic
from ldm_jax.runtime.files import read_json as read_json  # what the record is read and written by
from ldm_jax.runtime.files import write_json as write_json


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
