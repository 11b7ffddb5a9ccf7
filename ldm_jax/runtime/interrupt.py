"""SIGTERM and SIGINT: save and leave at the next step, or leave at once where there is nothing to save.

Python runs signal handlers only between its own instructions, and a compilation can keep it from those for a minute.
A thread therefore watches the wake-up pipe, which the C-level handler writes to at any time.

In runs over several processes JAX itself takes SIGTERM, and has all of them stop at the same step.
"""

import os
import signal
import socket
import sys
import threading
from types import TracebackType

import jax
from jax.experimental import multihost_utils


class Interrupted(Exception):
    """The run was asked to stop and has saved its state; the command exits with 0."""


class InterruptWatch:
    """`with InterruptWatch() as watch`: inside `watch.guard()` a signal is noted, elsewhere it ends the process."""

    def __enter__(self) -> "InterruptWatch":
        self._guarded = self._asked = False
        self._lock, self._old = threading.Lock(), {}
        if jax.process_count() > 1:
            return self
        self._receiver, self._sender = socket.socketpair()
        self._sender.setblocking(False)
        self._old_fd = signal.set_wakeup_fd(self._sender.fileno(), warn_on_full_buffer=False)
        self._old = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self._old:
            signal.set_wakeup_fd(self._old_fd)
            for number, handler in self._old.items():
                signal.signal(number, handler)
            self._sender.close()

    def _watch(self) -> None:
        with self._receiver:
            while data := self._receiver.recv(1):
                if data[0] not in (signal.SIGTERM, signal.SIGINT):
                    continue
                with self._lock:
                    self._asked = True
                    leave_now = not self._guarded
                if leave_now:
                    print("\nStopped; there was nothing to save. The same command goes on from here.", file=sys.stderr)
                    sys.stderr.flush()
                    os._exit(0)

    def guard(self, active: bool) -> None:
        """Says whether the process now holds progress that only a save would keep."""
        with self._lock:
            self._guarded = active
            late = self._asked and not active
        if late:
            os._exit(0)

    def asked(self, step: int) -> bool:
        """Whether to save and leave before `step`; with several hosts, all are told the same step."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._asked
