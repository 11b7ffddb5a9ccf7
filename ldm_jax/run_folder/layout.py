"""The files of a run folder, and the checks before a command writes to one.

config.json       the resolved config            latents/        cached moments, by content hash
metrics.jsonl     one line per measurement       progress/       sample grids from training
events.out.*      TensorBoard events             samples.npz, samples.png, denoising.gif, mixed.png
autoencoder/      stage 1: checkpoints, scale    evaluation.json, bits_per_dim.json, report.html
diffusion/        stage 2: checkpoints           classifier/, clip/   checkpoints of these stages
ema_snapshots/    with diffusion.ema_sigma_rels: the power function averages of stage 2, see `run_folder.snapshots`
data.json         the data sets, device, command .lock               held by the process that trains the run
pytorch_lora_weights.safetensors                 LoRA fine-tuning only: the LoRA in diffusers' format
learned_embeds.safetensors                       textual inversion only: the new token's vectors, likewise
wandb_id, wandb/                                 with config.wandb: the id of the W&B run, its local files
.store.json                                      in the mirror of a run in an object store (see `store`)
"""

from pathlib import Path
from tempfile import TemporaryFile

from ml_collections import ConfigDict

from ldm_jax.config import io as config_io
from ldm_jax.errors import InputError
from ldm_jax.run_folder.store import MIRROR, checkpoint_steps

DEPENDENT = {"autoencoder": ("diffusion", "classifier"), "clip": ("diffusion",)}  # stage -> those built on it
LOCK = ".lock"  # see `run_folder.lock`


def check_folder(flag: str, path: Path) -> None:
    """Raises InputError if `path`, the value of --`flag`, or a parent of it is a file."""
    if path.parts and path.parts[0].endswith(":"):  # what is left of a URL
        raise InputError(f"--{flag}={path} is a URL; it must be a local folder")
    for place in (path, *path.parents):
        if place.exists() and not place.is_dir():
            raise InputError(f"--{flag}={path}: {place} is a file; it must be a folder or not exist yet")


def check_output(path: Path) -> None:
    """Raises InputError if `path`, the value of --out, is a run folder, below a file, or cannot be written to."""
    check_folder("out", path)
    if (path / "config.json").exists() and (path / "data.json").exists():
        raise InputError(f"--out={path} is a run folder, with samples of its own; choose another, e.g. {path / 'more'}")
    above = next(place for place in (path, *path.absolute().parents) if place.exists())
    try:
        with TemporaryFile(dir=above):
            pass
    except OSError as error:
        raise InputError(f"--out={path} cannot be written to: {above}: {error.strerror}") from error


def check(workdir: Path, config: ConfigDict) -> None:
    """Raises InputError if `workdir` holds the run of another config, or anything else; writes nothing."""
    check_folder("workdir", workdir)
    if (workdir / "config.json").exists():
        saved = config_io.from_json(workdir / "config.json")
        missing = sorted(config_io.flatten(config).keys() - config_io.flatten(saved).keys())
        if missing:
            raise InputError(
                f"--workdir={workdir} was started by a version before 0.2, without config.{missing[0]}; `sample` and "
                "`evaluate` can read it, but `train` cannot resume it: choose another --workdir"
            )
        differences = config_io.differences(saved, config)
        changed = [text for name, text in differences.items() if not config_io.is_continued(name)]
        if changed:
            more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
            raise InputError(
                f"--workdir={workdir} belongs to another config ({'; '.join(changed[:3])}{more}); "
                "choose another --workdir, or remove that one"
            )
        for name in differences:
            _check_continued(workdir, config, *name.split("."))
    elif workdir.exists() and any(path.name not in (LOCK, MIRROR) for path in workdir.iterdir()):
        raise InputError(f"--workdir={workdir} is not empty and has no config.json; choose a new or an empty folder")


def _check_continued(workdir: Path, config: ConfigDict, stage: str, field: str) -> None:
    """Raises InputError if a field of a stage's training may no longer change, or steps are fewer than were made."""
    for later in DEPENDENT.get(stage, ()):
        if later in config.stages and checkpoint_steps(workdir / later):
            raise InputError(
                f"--workdir={workdir}: config.{stage}.{field} cannot change once {later} is trained, which depends on "
                "it; choose another --workdir"
            )
    made = max(checkpoint_steps(workdir / stage), default=0)
    if field == "steps" and config[stage].steps < made:
        raise InputError(
            f"--workdir={workdir}: config.{stage}.steps is {config[stage].steps}; {made} are made, it must be no less"
        )
