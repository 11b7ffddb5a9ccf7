"""The metrics of a run: metrics.jsonl and TensorBoard events, and the seconds that they took."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm_jax.run_folder import store
from ldm_jax.runtime.clock import Clock
from ldm_jax.runtime.files import atomic, named_errors

START = "start"  # the stage of the line that each start of a run writes
TIMING = "timing"  # that of the lines of seconds
UPLOADS = 30.0  # seconds between uploads to an object store, at least, other than before checkpoints


class Log:
    """The writer of metrics.jsonl and TensorBoard events; with `write` False (other hosts) it writes nothing.

    A line of metrics.jsonl is {"stage", "step", "time", name: value ...}; "time" is the seconds spent in this run,
    summed over all restarts. `clock` counts what they are spent on; `logger` gets (stage, step, values), too.
    """

    def __init__(self, workdir: Path, *, write: bool, clock: Clock | None = None, logger: Any = None) -> None:
        self._path, self._events, self._logger = workdir / "metrics.jsonl", None, logger
        self._workdir, self._uploaded = workdir, 0.0
        self.clock = clock or Clock()
        lines = read_metrics(self._path)
        self._start = self.clock.began - (lines[-1]["time"] if lines else 0.0)
        if write:
            from tensorboardX import SummaryWriter

            self._events = SummaryWriter(str(workdir))

    def start(self, record: Mapping[str, str | int]) -> None:
        """Appends the line of this start of the run, whose step is the number of starts before."""
        if self._events is not None:
            earlier = sum(line["stage"] == START for line in read_metrics(self._path))
            self._append(START, earlier, record)

    def rewind(self, stage: str, step: int) -> None:
        """Removes the lines of `stage` after `step`, which a resumed stage writes again; their seconds become lost."""
        if self._events is None or not self._path.exists():
            return
        lines = read_metrics(self._path)
        kept = [line for line in lines if not _is_after(line, stage, step)]
        if len(kept) == len(lines):
            return
        with atomic(self._path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        seconds, steps = _lost(lines, stage, step)
        self(TIMING, step, **{f"{stage}_lost_seconds": seconds, f"{stage}_lost_steps": steps})

    def account(self, stage: str, step: int) -> None:
        """Appends the seconds of `stage`, made up to `step`, since the last such line, and what they were spent on."""
        self(TIMING, step, **{f"{stage}_{name}": value for name, value in self.clock.read().items()})

    def __call__(self, stage: str, step: int, **values: float) -> None:
        """Appends a line."""
        if self._events is None:
            return
        values = {name: float(value) for name, value in values.items()}
        self._append(stage, step, values)
        for name, value in values.items():
            self._events.add_scalar(f"{stage}/{name}", value, step)
        self._events.flush()
        if self._logger is not None:
            self._logger(stage, step, values)
        if time.monotonic() - self._uploaded > UPLOADS:
            self.upload()

    def upload(self) -> None:
        """Uploads all files of the run that have changed, if it is in an object store."""
        if self._events is not None:
            store.push(self._workdir)
            self._uploaded = time.monotonic()

    def _append(self, stage: str, step: int, values: Mapping[str, Any]) -> None:
        line = {"stage": stage, "step": step, "time": round(time.monotonic() - self._start, 2)}
        with named_errors(self._path), self._path.open("a") as file:
            file.write(json.dumps(line | values) + "\n")

    def close(self) -> None:
        """Flushes the TensorBoard events, and uploads what has changed."""
        if self._events is not None:
            self._events.close()
        if self._logger is not None:
            self._logger.close()
        self.upload()


def _is_after(line: Mapping[str, Any], stage: str, step: int) -> bool:
    """Whether a line is of `stage`, or of its seconds, after `step`."""
    return (line["stage"] == stage or f"{stage}_seconds" in line) and line["step"] > step


def _lost(lines: list[dict[str, Any]], stage: str, step: int) -> tuple[float, int]:
    """The seconds and the number of the steps after `step` that earlier starts logged, accounted or not."""
    begun = [number for number, line in enumerate(lines) if line["stage"] == START]
    earlier = lines[: begun[-1]] if begun else lines
    lost = [line for line in earlier if _is_after(line, stage, step)]
    accounted = sum(line.get(f"{stage}_seconds", 0.0) for line in lost)
    since = max((line["time"] for line in earlier if line["stage"] in (START, TIMING)), default=0.0)
    until = max((line["time"] for line in lost), default=since)
    return accounted + max(0.0, until - since), max((line["step"] for line in lost), default=step) - step


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
