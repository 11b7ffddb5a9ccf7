"""What every command does around its work: name the devices, turn failures into one line and a status."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

from absl import flags

from ldm_jax.errors import InputError, RunError


def run(command: Callable[[list[str]], None], argv: list[str] | None = None) -> int:
    """Runs `command(argv)`; returns the exit status: 0, 1 (the run failed), 2 (the input was wrong), 130 (Ctrl-C)."""
    argv = list(sys.argv if argv is None else argv)
    try:
        command(argv)
        return 0
    except InputError as error:
        status, message = 2, str(error)
    except RunError as error:
        status, message = 1, str(error)
    except KeyboardInterrupt:
        status, message = 130, "interrupted"
    except OSError as error:  # a full, read-only or vanished disk
        status, message = 1, f"{error.filename}: {error.strerror or error}" if error.filename else str(error)
    name = Path(argv[0]).stem or "ldm_jax"
    print(f"{name}: {' '.join(message.split())}", file=sys.stderr)
    return status


def start_devices(flag_values: flags.FlagValues) -> None:
    """Imports JAX with the settings that all commands share, joins the other hosts, and prints the device line."""
    from ldm_jax.xla import configure

    configure()
    import jax

    if flag_values.coordinator:
        _check_coordinator(flag_values)
        jax.distributed.initialize(flag_values.coordinator, flag_values.num_processes, flag_values.process_id)
    elif flag_values.distributed:
        jax.distributed.initialize()
    devices = jax.devices()
    hosts = f" on {jax.process_count()} hosts" if jax.process_count() > 1 else ""
    if jax.process_index() == 0:
        kind = f"{os.cpu_count()} cores" if devices[0].platform == "cpu" else devices[0].device_kind
        print(f"Device: {len(devices)} x {devices[0].platform} ({kind}){hosts}, jax {jax.__version__}", flush=True)


def _check_coordinator(flag_values: flags.FlagValues) -> None:
    host, _, port = flag_values.coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise InputError(f"--coordinator={flag_values.coordinator} is no host:port, e.g. 10.0.0.1:1234")
    if not 0 <= flag_values.process_id < flag_values.num_processes:
        raise InputError(
            f"--process_id is {flag_values.process_id}; of --num_processes={flag_values.num_processes} it must be "
            f"from 0 to {flag_values.num_processes - 1}"
        )
