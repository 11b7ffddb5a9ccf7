"""SIGTERM and SIGINT: save and exit before the next step, or exit at once if there is nothing to save.

The exit status is that of a process which the signal ended, 143 or 130: to Slurm and Kubernetes 0 means "done".

Python runs signal handlers only between its own instructions, so a compilation can delay them by a minute. A thread
therefore watches the wake-up pipe, which the C-level handler writes to at any time. While several hosts train, JAX
itself handles SIGTERM, and all of them stop at the same step.
"""

import os
import signal
import socket
import sys
import threading
import time

import jax
from jax.experimental import multihost_utils

from ldm_jax.errors import Interrupted
from ldm_jax.runtime.hosts import Hosts
from ldm_jax.runtime.parallel import wait_for_hosts

NOTICE = 2.0  # seconds in which a signal on any host is known to all: JAX looks once a second


class InterruptWatch:
    """A context manager in which a signal sets `stop_requested` after `guard(True)`, and else ends the process."""

    def __enter__(self) -> "InterruptWatch":
        self._guarded, self._signal, self._polls = False, 0, 0
        self._in_step = jax.process_count() > 1  # with other hosts
        self._lock, self._hosts, self._old = threading.Lock(), Hosts(), {}
        self._receiver, self._sender = socket.socketpair()
        self._sender.setblocking(False)
        self._old_fd = signal.set_wakeup_fd(self._sender.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGINT,) if self._in_step else (signal.SIGTERM, signal.SIGINT):
            self._catch(number)
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, _: type | None, error: BaseException | None, *__: object) -> None:
        self._hosts.close(error)
        if isinstance(error, Interrupted):
            error.status = self._status()
        signal.set_wakeup_fd(self._old_fd)
        for number, handler in self._old.items():
            signal.signal(number, handler)
        self._sender.close()

    def _catch(self, number: int) -> None:
        self._old[number] = signal.signal(number, lambda *_: None) or signal.SIG_DFL  # None: JAX's own

    def _status(self) -> int:
        return 128 + (self._signal or signal.SIGTERM)  # of several hosts, the signal may be another's

    def _watch(self) -> None:
        with self._receiver:
            while data := self._receiver.recv(1):
                if data[0] not in (signal.SIGTERM, signal.SIGINT):
                    continue
                with self._lock:
                    self._signal = data[0]
                    exit_now = not self._guarded and not self._in_step
                    forward = self._in_step and self._signal == signal.SIGINT
                if exit_now:
                    self._leave()
                if forward:
                    os.kill(os.getpid(), signal.SIGTERM)  # which JAX forwards to the other hosts

    def _leave(self) -> None:
        print("\nStopped; there was nothing to save. The same command goes on from here.", file=sys.stderr, flush=True)
        self._hosts.leave(self._status())

    def guard(self, active: bool) -> None:
        """Sets whether there is unsaved progress, for which a signal must not end the process."""
        with self._lock:
            self._guarded = active
            exit_now = self._signal and not active and not self._in_step
        if exit_now:
            self._leave()

    def stop_requested(self) -> bool:
        """Whether to save and exit before the next step: the same step on all hosts, which call it before each."""
        if not self._in_step:
            return bool(self._signal)
        self._polls += 1  # of all stages: JAX needs a number that only rises
        return multihost_utils.reached_preemption_sync_point(self._polls)

    def end_training(self) -> None:
        """Called by all hosts after their last step: from here on a signal to one ends all of them at once.

        Raises Interrupted if one came before that.
        """
        if not self._in_step:
            return
        self._catch(signal.SIGTERM)
        wait_for_hosts("trained")
        time.sleep(NOTICE)
        if self.stop_requested():
            raise Interrupted("stopped after the training, which is saved")
        with self._lock:
            self._in_step = False
            exit_now = self._signal
        if exit_now:
            self._leave()
