"""Worker processes: runs one program in several processes at once, on a CPU with separate cores for each."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from ldm_jax.errors import RunError

INTERRUPTED = (143, 130)  # exit statuses of a process that was interrupted and has saved its state
REFUSED = 2  # exit status of a process that has printed a one-line error
NUM_WORKERS = "LDM_JAX_WORKERS"  # environment variable of each worker: the number of workers


def run(command: list[str], count: int) -> None:
    """Runs the Python program `command` in `count` worker processes; prints their output, each line with its number.

    SIGTERM and SIGINT are forwarded to the workers.

    Raises:
        RunError: a worker failed; its output is above.
        SystemExit: the workers were interrupted, or printed a one-line error.
    """
    environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{0.9 / count:.2f}"} | os.environ  # of a GPU's memory
    environment |= {"TQDM_DISABLE": "1", "PYTHONUNBUFFERED": "1", NUM_WORKERS: str(count)}
    environment.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")  # huge pages, as in the Makefile
    processes: list[subprocess.Popen] = []

    def forward(signal_number: int, _: object) -> None:
        for process in processes:
            process.send_signal(signal_number)

    with signal_handler(forward):
        for worker in range(count):
            with pinned_to_cores(worker, count):  # inherited by the process
                processes.append(
                    subprocess.Popen([sys.executable, *command], env=environment, stdout=subprocess.PIPE, text=True)
                )
        readers = [
            threading.Thread(target=print_output, args=(process, f"{worker + 1}| " if count > 1 else ""))
            for worker, process in enumerate(processes)
        ]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        statuses = [process.wait() for process in processes]
    failed = sum(status != 0 for status in statuses)
    for known in (INTERRUPTED, (REFUSED,)):
        if set(known) & set(statuses) and set(statuses) <= {0, *known}:
            raise SystemExit(max(statuses))
    if failed:
        raise RunError(f"{failed} of {count} processes failed; their output is above")


def num_workers() -> int:
    """The number of worker processes that run at once, this one included; 1 outside of `run`."""
    return int(os.environ.get(NUM_WORKERS, 1))


@contextmanager
def signal_handler(handler: signal.Handlers) -> Iterator[None]:
    """Handles SIGTERM and SIGINT by `handler` inside the block."""
    before = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextmanager
def pinned_to_cores(worker: int, workers: int) -> Iterator[None]:
    """Pins this process to every `workers`-th of its cores inside the block; does nothing without support or with too
    few cores."""
    if not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < workers:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[worker::workers])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def print_output(process: subprocess.Popen, prefix: str) -> None:
    """Prints the output of a process, with the prefix before each line that is not empty."""
    for line in process.stdout:
        print(f"{prefix}{line}" if line.strip() else line, end="", flush=True)
