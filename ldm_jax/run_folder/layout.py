"""The run folder is the record of a run: which files it has, and how they are written so that none is ever half there.

config.json       the resolved config            latents/        cached moments, by content hash
metrics.jsonl     one line a measurement         progress/       sample grids made while training
events.out.*      the same for TensorBoard       samples.npz, samples.png, denoising.gif
autoencoder/      stage 1: checkpoints, scale    evaluation.json, bits_per_dim.json, report.html
diffusion/        stage 2: checkpoints           classifier/     its checkpoints, where one is trained
pytorch_lora_weights.safetensors                 of a run that fine-tunes by LoRA: for diffusers
"""

from pathlib import Path

from ml_collections import ConfigDict

from ldm_jax.config import io as config_io
from ldm_jax.errors import InputError
from ldm_jax.runtime.files import read_json as read_json  # what the record is read and written by
from ldm_jax.runtime.files import write_json as write_json


def check_folder(flag: str, path: Path) -> None:
    """Raises InputError if there is a file where --`flag` wants a folder."""
    for place in (path, *path.parents):
        if place.exists() and not place.is_dir():
            raise InputError(f"--{flag}={path}: {place} is a file; it must be a folder or not exist yet")


def check(workdir: Path, config: ConfigDict) -> None:
    """Raises InputError if `workdir` holds another run or something else; writes nothing."""
    check_folder("workdir", workdir)
    if (workdir / "config.json").exists():
        begun = config_io.from_json(workdir / "config.json")
        since = sorted(config_io.flatten(config).keys() - config_io.flatten(begun).keys())
        if since:
            raise InputError(
                f"--workdir={workdir} was begun by an older version, which knew no config.{since[0]}; it can be drawn "
                "from and scored, but not gone on with: choose another --workdir"
            )
        differences = config_io.differences(begun, config)
        if differences:
            more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
            raise InputError(
                f"--workdir={workdir} belongs to another config ({'; '.join(differences[:3])}{more}); "
                "choose another --workdir, or remove that one"
            )
    elif workdir.exists() and any(workdir.iterdir()):
        raise InputError(f"--workdir={workdir} is not empty and has no config.json; choose a new or an empty folder")
