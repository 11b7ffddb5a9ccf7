"""Snapshots of the power function averages of a run's training, all of which are kept: the input of post-hoc EMA.

They are checkpoints of their own, in float16 as those of EDM2: the coefficients of a reconstruction sum their rounding,
at most 2^-11 of each value, and have a norm of about 1 for any sigma_rel from that of the shortest average upwards.
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

from ldm_jax.run_folder.checkpoint import Checkpoints, flatten
from ldm_jax.run_folder.store import checkpoint_folder, checkpoint_steps
from ldm_jax.runtime.parallel import wait_for_hosts

FIELD = "power_emas"  # of `training.state.TrainState`: sigma_rel as text -> parameters


class Snapshots:
    """The snapshots of a training's state every so many steps. A context manager; all hosts must call its methods.

    A snapshot is on the disk before training goes on, so that all those before a checkpoint are there if it is.
    """

    def __init__(self, folder: Path, *, every: int, identity: dict[str, str]) -> None:
        self._folder, self._every, self._identity = folder, every, identity
        self._checkpoints: Checkpoints | None = None

    def __enter__(self) -> "Snapshots":
        return self

    def __exit__(self, error: type | None, *details: object) -> None:
        if self._checkpoints:
            self._checkpoints.__exit__(error, *details)

    def begin(self, state: Any) -> None:
        """Deletes snapshots of later steps than the state that training goes on from; saves its own if it is missing.

        Later ones are of steps that are made again, perhaps at another learning rate.
        """
        step = int(state.step)
        if jax.process_index() == 0:
            for later in (each for each in checkpoint_steps(self._folder) if each > step):
                epath.Path(checkpoint_folder(self._folder) / str(later)).rmtree()
        wait_for_hosts("snapshots")  # are deleted
        self._checkpoints = Checkpoints(self._folder, keep=None, identity=self._identity)
        self.save(step, state)

    def save(self, step: int, state: Any) -> None:
        """Saves the averages after `step` updates if it is their turn; raises RunError if that fails."""
        if step == 0 or step % self._every:
            return
        jax.block_until_ready(state)
        if int(state.step) != step:  # an update was rejected, of which the loop does not know yet
            return
        with np.errstate(over="ignore"):  # to infinity, which is noticed when the snapshot is used
            averages = {name: array.astype(np.float16) for name, array in flatten({FIELD: state.power_emas}).items()}
        self._checkpoints.save({"step": np.int32(step), **averages})
        self._checkpoints.wait()
