"""Checkpoints of a training stage: written by Orbax, named by step, checked on the way back.

A checkpoint is a flat dict, path in the state -> array, and a note: the run it belongs to and each array's CRC-32.
Orbax writes to a temporary folder and renames it, so a killed save leaves the one before; the CRC catches what a
file system damages later. Orbax alone would neither notice that, nor fall back, nor refuse another dtype.
"""

import logging
import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from ml_collections import ConfigDict

from ldm_jax.config import io as config_io
from ldm_jax.config.fields import SCHEDULE
from ldm_jax.errors import InputError, RunError

logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax logs every save

# What the parts of a model are called in checkpoints, since the first version.
STORED_NAMES = {"denoiser": "unet", "conditioning": "conditioner", "first_stage": "autoencoder"}

# The fields that the checkpoints of a stage depend on; those of another run are refused.
AUTOENCODER_FIELDS = ("seed", "dtype", "data", "autoencoder")
IDENTITY_FIELDS = {
    "autoencoder": AUTOENCODER_FIELDS,
    "clip": ("seed", "dtype", "data", "clip"),
    "diffusion": (*AUTOENCODER_FIELDS, "diffusion", "unet", "concat", "init_from", "lora"),
    "classifier": (*AUTOENCODER_FIELDS, *(f"diffusion.{name}" for name in SCHEDULE), "classifier"),
}


def identity(config: ConfigDict, stage: str) -> dict[str, str]:
    """What a checkpoint of `stage` is recorded with: a hash of the fields that it depends on."""
    return {"config": config_io.identity(config, IDENTITY_FIELDS[stage])}


def flatten(tree: Any) -> dict[str, np.ndarray]:
    """Path -> array on the host, e.g. "params/unet/conv_in/kernel"."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(jax.device_get(tree))
    return {_name(path): np.asarray(leaf) for path, leaf in leaves}


def unflatten(flat: dict[str, np.ndarray], like: Any, *, where: str) -> Any:
    """The arrays in the structure of `like`; raises InputError if names, shapes or dtypes differ."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(like)
    wanted = {_name(path): leaf for path, leaf in leaves}
    missing, unexpected = sorted(wanted.keys() - flat), sorted(flat.keys() - wanted)
    if missing or unexpected:
        raise InputError(
            f"{where} belongs to another model: {len(missing)} arrays are missing {missing[:3]}, "
            f"{len(unexpected)} unexpected {unexpected[:3]}"
        )
    for name, leaf in wanted.items():
        if (flat[name].shape, flat[name].dtype) != (leaf.shape, leaf.dtype):
            raise InputError(
                f"{where} belongs to another model: {name} is {flat[name].dtype}{list(flat[name].shape)} there, "
                f"{leaf.dtype}{list(leaf.shape)} here"
            )
    return jax.tree_util.tree_unflatten(treedef, [flat[name] for name in wanted])


class Checkpoints:
    """The checkpoints in one folder. Close it, or use it in a `with`: the last save may still be under way."""

    def __init__(self, folder: Path, *, keep: int, identity: dict[str, str]) -> None:
        self.folder = folder.absolute()
        self._identity = identity
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None:
            self.wait()
        self._manager.close()

    def save(self, state: Any) -> None:
        """Saves the state under its own step, unless that is there already; returns before the disk is done."""
        flat = flatten(state)
        step = int(flat["step"])
        if step in self._manager.all_steps():
            return
        note = self._identity | {"crc32": {name: zlib.crc32(np.ascontiguousarray(a)) for name, a in flat.items()}}
        try:
            self._manager.save(
                step, args=ocp.args.Composite(state=ocp.args.StandardSave(flat), note=ocp.args.JsonSave(note))
            )
        except Exception as error:
            raise RunError(f"could not save step {step} to {self.folder}: {_first_line(error)}") from error

    def wait(self) -> None:
        """Returns when everything saved is on disk; raises RunError if that failed."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise RunError(f"could not save to {self.folder}: {_first_line(error)}") from error

    def restore(self, like: Any) -> Any | None:
        """The newest sound checkpoint in the structure of `like`, or None if there is none at all.

        A damaged one is reported, put aside as `damaged.STEP`, and the one before is used.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            try:
                flat = _read(self.folder, step, self._identity)
            except _DamagedError as error:
                print(f"Checkpoint {self.folder / str(step)} is damaged ({error}); going back to the one before.")
                if jax.process_index() == 0:
                    (self.folder / str(step)).rename(self.folder / f"damaged.{step}")
                self._manager.reload()
                continue
            return unflatten(flat, like, where=str(self.folder / str(step)))
        if steps:
            raise InputError(f"no checkpoint in {self.folder} can be read; move the folder away to start over")
        return None


def load_latest(folder: Path, up_to: float = np.inf) -> dict[str, np.ndarray]:
    """The newest sound checkpoint of a stage, of steps `up_to` at most, as a flat dict; the folder stays as it is."""
    steps = (int(p.name) for p in folder.glob("*") if p.name.isdigit())
    for step in sorted((step for step in steps if step <= up_to), reverse=True):
        try:
            return _read(folder.absolute(), step, {})
        except _DamagedError as error:
            print(f"Checkpoint {folder / str(step)} is damaged ({error}); using the one before.")
    raise InputError(f"there is no readable checkpoint in {folder}; has the run got that far?")


def ema_params(flat: dict[str, np.ndarray], like: Any, where: Path) -> dict[str, Any]:
    """The averaged parameters in a stage's checkpoint, in the structure of `like`."""
    averaged = {name.removeprefix("ema_params/"): a for name, a in flat.items() if name.startswith("ema_params/")}
    return unflatten(averaged, like, where=str(where))


def subtree(flat: dict[str, np.ndarray], prefix: str) -> dict[str, Any]:
    """The nested dict below `prefix`, e.g. "ema_params/unet"; raises InputError if nothing is there."""
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        if name.startswith(prefix + "/"):
            *parents, leaf = name.removeprefix(prefix + "/").split("/")
            node = nested
            for parent in parents:
                node = node.setdefault(parent, {})
            node[leaf] = value
    if not nested:
        raise InputError(f"the checkpoint has no {prefix!r}; it holds {sorted({n.split('/')[0] for n in flat})}")
    return nested


class _DamagedError(Exception):
    pass


def _read(folder: Path, step: int, identity: dict[str, str]) -> dict[str, np.ndarray]:
    this = jax.process_index()  # alone: without this, Orbax waits for all hosts, and the first alone draws and scores
    alone = ocp.options.MultiprocessingOptions(
        primary_host=this, active_processes={this}, barrier_sync_key_prefix=f"read_{this}"
    )
    options = ocp.CheckpointManagerOptions(read_only=True, create=False, multiprocessing_options=alone)
    with ocp.CheckpointManager(folder, options=options) as manager:
        try:
            restored = manager.restore(
                step, args=ocp.args.Composite(state=ocp.args.StandardRestore(), note=ocp.args.JsonRestore())
            )
            flat = {name: np.asarray(value) for name, value in restored.state.items()}
            note = dict(restored.note)
            expected = note.pop("crc32")
        except Exception as error:
            raise _DamagedError(_first_line(error)) from error
    wrong = [name for name, crc in expected.items() if name not in flat or zlib.crc32(flat[name]) != crc]
    if wrong:
        raise _DamagedError(f"{len(wrong)} arrays differ from what was saved, the first is {wrong[0]}")
    for key, value in identity.items():
        if note.get(key) != value:
            raise InputError(
                f"{folder / str(step)} belongs to another run: its {key} is {note.get(key)!r}, not {value!r}"
            )
    return flat


def _name(path: tuple) -> str:
    names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
    return "/".join(STORED_NAMES.get(name, name) for name in names)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
