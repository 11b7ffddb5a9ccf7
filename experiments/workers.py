"""One program in several processes at once that share the machine: on a CPU each has cores of its own."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from ldm_jax.errors import RunError

INTERRUPTED = 130  # the exit status of a process that was asked to stop and has saved what it had
REFUSED = 2  # that of one that has said in a line what is wrong
NUMBER = "LDM_JAX_WORKERS"  # in the environment of each: how many they are


def run(command: list[str], count: int) -> None:
    """Runs the Python program `command` in so many processes and prints what they say, each line with its number.

    Who asks this process to stop asks them.

    Raises:
        RunError: a process failed; what it said is above.
        SystemExit: they were interrupted, or refused to run and said why.
    """
    environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{0.9 / count:.2f}"} | os.environ  # of a GPU's memory
    environment |= {"TQDM_DISABLE": "1", "PYTHONUNBUFFERED": "1", NUMBER: str(count)}
    environment.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")  # memory in huge pages, as in the Makefile
    processes: list[subprocess.Popen] = []

    def ask(signal_number: int, _: object) -> None:
        for process in processes:
            process.send_signal(signal_number)

    with handled(ask):
        for worker in range(count):
            with on_share_of_cores(worker, count):  # as is whatever is started there
                processes.append(
                    subprocess.Popen([sys.executable, *command], env=environment, stdout=subprocess.PIPE, text=True)
                )
        readers = [
            threading.Thread(target=tell, args=(process, f"{worker + 1}| " if count > 1 else ""))
            for worker, process in enumerate(processes)
        ]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        ended = [process.wait() for process in processes]
    failed = sum(status != 0 for status in ended)
    for known in (INTERRUPTED, REFUSED):
        if known in ended and set(ended) <= {0, known}:
            raise SystemExit(known)
    if failed:
        raise RunError(f"{failed} of {count} processes failed; what went wrong is above")


def number() -> int:
    """How many processes share the machine with this one, itself included."""
    return int(os.environ.get(NUMBER, 1))


@contextmanager
def handled(handler: signal.Handlers) -> Iterator[None]:
    """SIGTERM and SIGINT go to `handler`."""
    before = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextmanager
def on_share_of_cores(worker: int, workers: int) -> Iterator[None]:
    """Inside, this process has every so-many-th of its cores, where the system can say so and there are enough."""
    if not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < workers:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[worker::workers])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def tell(process: subprocess.Popen, mark: str) -> None:
    """Prints what a process says, with the mark before each line that is not empty."""
    for line in process.stdout:
        print(f"{mark}{line}" if line.strip() else line, end="", flush=True)
