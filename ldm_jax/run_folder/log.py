"""The metrics of a run: metrics.jsonl and TensorBoard events."""

import json
import time
from pathlib import Path
from typing import Any

from ldm_jax.runtime.files import atomic, named_errors


class Log:
    """The writer of metrics.jsonl and TensorBoard events; with `write` False (other hosts) it writes nothing.

    A line of metrics.jsonl is {"stage", "step", "time", name: value ...}; "time" is the seconds spent in this run,
    summed over all restarts.
    """

    def __init__(self, workdir: Path, *, write: bool) -> None:
        self._path, self._events = workdir / "metrics.jsonl", None
        lines = read_metrics(self._path)
        self._start = time.monotonic() - (lines[-1]["time"] if lines else 0.0)
        if write:
            from tensorboardX import SummaryWriter

            self._events = SummaryWriter(str(workdir))

    def rewind(self, stage: str, step: int) -> None:
        """Removes the lines of `stage` after `step`, which a resumed stage writes again."""
        if self._events is not None and self._path.exists():
            kept = [line for line in read_metrics(self._path) if line["stage"] != stage or line["step"] <= step]
            with atomic(self._path) as temporary:
                temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))

    def __call__(self, stage: str, step: int, **values: float) -> None:
        """Appends a line."""
        if self._events is None:
            return
        line = {"stage": stage, "step": step, "time": round(time.monotonic() - self._start, 2)}
        with named_errors(self._path), self._path.open("a") as file:
            file.write(json.dumps(line | {name: float(value) for name, value in values.items()}) + "\n")
        for name, value in values.items():
            self._events.add_scalar(f"{stage}/{name}", value, step)
        self._events.flush()

    def close(self) -> None:
        """Flushes the TensorBoard events."""
        if self._events is not None:
            self._events.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, [] if there is none; a line cut short by a kill is skipped."""
    lines = []
    for text in path.read_bytes().splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
        except ValueError:  # of JSON or of UTF-8
            continue
        if isinstance(line, dict) and {"stage", "step", "time"} <= line.keys():
            lines.append(line)
    return lines
