"""The protocol between `run` and its worker processes: lines of JSON."""

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def serve(once: Callable[[], None], wait: Callable[[], None], memory: Callable[[], int], about: Mapping) -> None:
    """Answers with `about`, then each line "N" with the seconds of N calls of `once`, and the peak memory in bytes."""
    print(json.dumps(about), flush=True)
    for line in sys.stdin:
        begin = time.perf_counter()
        for _ in range(int(line)):
            once()
        wait()
        print(json.dumps({"seconds": time.perf_counter() - begin, "memory": memory()}), flush=True)


class Worker:
    """A worker process of a module; `about` is the first line that it prints."""

    def __init__(self, python: str, module: str, arguments: Sequence[str]) -> None:
        command = [python, "-m", module, *arguments]
        self.process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.about = self._answer()

    def __call__(self, times: int) -> dict[str, Any]:
        """{"seconds": of `times` calls, "memory": bytes}; raises RuntimeError if the process has ended."""
        with contextlib.suppress(BrokenPipeError):  # of a process that has ended, which the answer reports
            self.process.stdin.write(f"{times}\n")
            self.process.stdin.flush()
        return self._answer()

    def stop(self) -> None:
        """Ends the process."""
        self.process.kill()
        self.process.wait()

    def _answer(self) -> dict[str, Any]:
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"it ended with status {self.process.wait()}")
