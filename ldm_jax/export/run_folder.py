"""Exported runs, written as run folders again."""

from pathlib import Path

import numpy as np

from ldm_jax.pipeline.from_exported import Record
from ldm_jax.pipeline.from_run import save_scale
from ldm_jax.pipeline.model import LatentDiffusion, Params
from ldm_jax.run_folder.checkpoint import Checkpoints, identity
from ldm_jax.runtime.files import write_json


def write_run(model: LatentDiffusion, params: Params, to: Path, record: Record, guide: Params | None = None) -> None:
    """Writes a model as a new run folder `to`, with the run's record; it can be sampled, but not trained further.

    `guide` are the parameters of the earlier checkpoint that guides its samples, if there is one.
    """
    config = record.config
    write_json(to / "config.json", config.to_dict())
    write_json(to / "data.json", record.data)
    if model.first_stage.module is not None:
        with Checkpoints(to / "autoencoder", keep=1, identity=identity(config, "autoencoder")) as checkpoints:
            ema_params = {"autoencoder": params["first_stage"]}
            checkpoints.save({"step": np.int32(record.autoencoder_step), "ema_params": ema_params})
        save_scale(to, params["shift"], params["scale"], measured_on=record.measured_on)
    with Checkpoints(to / "diffusion", keep=2, identity=identity(config, "diffusion")) as checkpoints:
        for step, saved in ((config.sampling.guide_step, guide), (record.step, params)):
            if saved is not None:
                ema_params = {name: saved[name] for name in ("denoiser", "conditioning")}
                checkpoints.save({"step": np.int32(step), "ema_params": ema_params})
