"""Heartbeats between the hosts of a run: the loss of one host ends all of them.

JAX has heartbeats of its own, but with a timeout of 100 s, and ends by a crash with a long message. Here a thread of
each host raises a number in JAX's key-value store every few seconds: a host whose number stays the same is lost. JAX's
own, with about half of that timeout, remain for the first host, which holds the store, and for hosts that do not train
yet.
"""

import os
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import jax
from jax._src import distributed  # JAX's key-value store has no public name; Orbax takes it from there, too

from ldm_jax.errors import InputError, Interrupted

PERIOD = 2.0  # seconds between two heartbeats
TIMEOUT = 40.0  # seconds without one, after which a host is lost
HEARTBEAT_TIMEOUT = 55  # seconds: of JAX's own
SHUTDOWN_TIMEOUT = 60  # seconds that a host waits for the others at its end
LOST = 1  # exit status
HEARTBEATS = "ldm_jax/heartbeats"
FAILED = "failed"


def connect(**address: Any) -> None:
    """Connects this host to the others by `jax.distributed.initialize`; without an address JAX detects the cluster.

    Raises InputError if it detects none.
    """
    options = {"heartbeat_timeout_seconds": HEARTBEAT_TIMEOUT, "shutdown_timeout_seconds": SHUTDOWN_TIMEOUT}
    if address:
        options["cluster_detection_method"] = "deactivate"  # on Slurm it would hide all GPUs of the host but one
    elif devices := slurm_devices(os.environ):
        options["local_device_ids"] = devices
    try:
        jax.distributed.initialize(**address, **options)
    except ValueError as error:  # there is no cluster that JAX knows
        if address:
            raise
        here = "on one machine leave --distributed out, elsewhere give --coordinator=HOST:PORT --num_processes=N"
        raise InputError(f"--distributed detects no cluster ({_line(error)}): {here} --process_id=I") from error


def _line(error: Exception) -> str:
    """The message of an error, on one line and without a full stop."""
    return " ".join(str(error).split()).rstrip(".")


def slurm_devices(environment: Mapping[str, str]) -> list[int]:
    """The indices of all GPUs of a Slurm node with one process, of which JAX would take the first alone; else []."""
    nodes, gpus = environment.get("SLURM_STEP_NUM_NODES"), environment.get("SLURM_GPUS_ON_NODE", "0")
    return [*range(int(gpus))] if nodes and nodes == environment.get("SLURM_NTASKS") else []


class Hosts:
    """A watch that ends this process when another host is lost, or has left by `leave`; nothing on a single host."""

    def __init__(self) -> None:
        self._client, self._key = distributed.global_state.client, f"{HEARTBEATS}/{jax.process_index()}"
        self._closed, self._all_failed, self._failed = threading.Event(), threading.Event(), False
        self._several = jax.process_count() > 1
        if self._several:
            threading.Thread(target=self._watch, daemon=True).start()

    def close(self, error: BaseException | None) -> None:
        """Ends the watch; after an error when all hosts have one: the loss of a host makes the others fail first."""
        if self._several and isinstance(error, Exception) and not isinstance(error, Interrupted):
            self._failed = True
            self._all_failed.wait(TIMEOUT + 3 * PERIOD)
        self._closed.set()

    def leave(self, status: int) -> None:
        """Ends the processes of all hosts with this exit status."""
        if self._several:
            self._closed.set()
            with suppress(jax.errors.JaxRuntimeError):  # the store is gone, and so are the others
                self._client.key_value_set(self._key, f"left {status}", allow_overwrite=True)
                time.sleep(2 * PERIOD)  # until the others have read it: the store ends with the first host
        os._exit(status)

    def _watch(self) -> None:
        last: dict[str, tuple[str, float]] = {}  # key -> its value, and when that was new
        beat = 0
        while not self._closed.wait(PERIOD):
            beat += 1
            try:
                value = f"{beat} {FAILED}" if self._failed else f"{beat}"
                self._client.key_value_set(self._key, value, allow_overwrite=True)
                values = self._client.key_value_dir_get(HEARTBEATS)
            except jax.errors.JaxRuntimeError:  # the first host is lost: JAX ends this process
                return
            if sum(value.endswith(FAILED) for _, value in values) == jax.process_count():
                self._all_failed.set()
            now = time.monotonic()
            for key, value in values:
                if key not in last or value != last[key][0]:
                    last[key] = value, now
                host = key.rpartition("/")[2]
                if value.startswith("left"):
                    self._end(int(value.split()[1]), f"Host {host} was stopped.")
                if now - last[key][1] > TIMEOUT:
                    self._end(LOST, f"Host {host} is lost: no heartbeat for {TIMEOUT:.0f} s.")

    def _end(self, status: int, reason: str) -> None:
        if not self._closed.is_set():
            print(f"\n{reason} The same command, on all hosts, goes on from the last checkpoint.", file=sys.stderr)
            sys.stderr.flush()
            if status != LOST and jax.process_index() == 0:  # the store ends with this host: the others leave before it
                time.sleep(3 * PERIOD)
            os._exit(status)
