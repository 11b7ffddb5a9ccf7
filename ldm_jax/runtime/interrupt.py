"""SIGTERM and SIGINT: save and exit before the next step, or exit at once if there is nothing to save.

Python runs signal handlers only between its own instructions, so a compilation can delay them by a minute. A thread
therefore watches the wake-up pipe, which the C-level handler writes to at any time. In runs of several processes JAX
itself handles SIGTERM, and all of them stop at the same step.
"""

import os
import signal
import socket
import sys
import threading

import jax
from jax.experimental import multihost_utils


class Interrupted(Exception):
    """A signal stopped the run, after its state was saved; the exit status is 0."""


class InterruptWatch:
    """A context manager in which a signal sets `stop_requested` after `guard(True)`, and else ends the process."""

    def __enter__(self) -> "InterruptWatch":
        self._guarded = self._signalled = False
        self._lock, self._old = threading.Lock(), {}
        if jax.process_count() > 1:
            return self
        self._receiver, self._sender = socket.socketpair()
        self._sender.setblocking(False)
        self._old_fd = signal.set_wakeup_fd(self._sender.fileno(), warn_on_full_buffer=False)
        self._old = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
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
                    self._signalled = True
                    exit_now = not self._guarded
                if exit_now:
                    message = "\nStopped; there was nothing to save. The same command goes on from here."
                    print(message, file=sys.stderr, flush=True)
                    os._exit(0)

    def guard(self, active: bool) -> None:
        """Sets whether there is unsaved progress, for which a signal must not end the process."""
        with self._lock:
            self._guarded = active
            exit_now = self._signalled and not active
        if exit_now:
            os._exit(0)

    def stop_requested(self, step: int) -> bool:
        """Whether to save and exit before `step`; the same on all hosts."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._signalled
