"""Guidance models of a recipe: a classifier of noisy latents, a CLIP."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from ldm_jax.config import io as config_io
from ldm_jax.config.rules import validate
from ldm_jax.diffusion.process import Process
from ldm_jax.errors import InputError
from ldm_jax.models.classifier import NoisyClassifier
from ldm_jax.pipeline.clip import TrainedCLIP, load_clip
from ldm_jax.pipeline.from_config import build_classifier, from_config
from ldm_jax.pipeline.from_run import load_first_stage
from ldm_jax.pipeline.model import LatentDiffusion, Params
from ldm_jax.run_folder.checkpoint import ema_params, load_latest
from ldm_jax.runtime.files import content_hash, read_json
from ldm_jax.sampling.recipe import Recipe
from ldm_jax.sampling.sampler import Sampler, make_sampler


class TrainedClassifier(NamedTuple):
    """A classifier of noisy latents with its EMA parameters."""

    module: NoisyClassifier
    params: Any
    model: LatentDiffusion  # of its config: its latents, process and classes; without parameters


class GuidanceModels(NamedTuple):
    """The classifier and the CLIP that guide, if any."""

    classifier: TrainedClassifier | None = None
    clip: TrainedCLIP | None = None

    @property
    def params(self) -> dict[str, Any]:
        """Their parameters, for `guided_denoiser`, by name."""
        return {name: model.params for name, model in self._asdict().items() if model}

    def sampler(self, model: LatentDiffusion, batch_size: int) -> Sampler:
        """The sampler of a model with this guidance: see `sampler.make_sampler`."""
        classifier, clip = self
        return make_sampler(model, batch_size, classifier and classifier.module, clip and clip.clip)


def guidance_models(recipe: Recipe, model: LatentDiffusion, params: Params) -> GuidanceModels:
    """The guidance models of a recipe; raises InputError for one that does not fit the model."""
    guidance = recipe.guidance
    return GuidanceModels(
        classifier_for(Path(guidance.classifier), model, params) if guidance.classifier else None,
        clip_for(Path(guidance.clip), model) if guidance.clip else None,
    )


def load_classifier(path: Path) -> TrainedClassifier:
    """The classifier of a run folder; raises InputError if there is none, or it does not fit its own config."""
    if not path.is_dir():
        raise InputError(f"--classifier={path} does not exist; it must be a run folder with a classifier")
    config = config_io.read_with_defaults(path / "config.json")
    validate(config)
    if "classifier" not in config.stages:
        raise InputError(f"--classifier={path} has no classifier: its config.stages are {', '.join(config.stages)}")
    names = tuple(read_json(path / "data.json", "class_names")["class_names"])
    flat, model = load_latest(path / "classifier"), from_config(config, names)
    classifier, z_t, one = build_classifier(config, len(names)), np.zeros((1, *model.latent_shape)), np.ones(1)
    like = {"classifier": jax.eval_shape(classifier.init, jax.random.key(0), z_t, one, one)["params"]}
    return TrainedClassifier(classifier, ema_params(flat, like, path / "classifier")["classifier"], model)


def classifier_for(path: Path, model: LatentDiffusion, params: Params) -> TrainedClassifier:
    """The classifier of a run folder, to guide a model.

    Raises InputError as `load_classifier`, and for other classes, another noise schedule or other latents.
    """
    classifier = load_classifier(path)
    other = classifier.model
    if other.class_names != model.class_names:
        own = f"{len(other.class_names)} classes ({', '.join(other.class_names)})"
        needed = f"{len(model.class_names)} ({', '.join(model.class_names)})"
        raise InputError(f"--classifier={path} has {own}; those of --model are {needed}")
    if other.process != model.process:
        schedules = f"{_schedule(other.process)} and {_schedule(model.process)}"
        raise InputError(f"--classifier={path} and --model have other noise schedules: {schedules}")
    first_stage = load_first_stage(path, other.origin.config)
    if _latents_hash(first_stage, other) != _latents_hash(params, model):
        raise InputError(
            f"--classifier={path} was trained on other latents than those of --model, of another autoencoder or scale; "
            "it must be trained with --config.autoencoder.checkpoint set to the run that it is to guide"
        )
    return classifier


def _schedule(process: Process) -> str:
    return f"T {len(process)} with sigma {process.sigma[0]:.4g} to {process.sigma[-1]:.4g}"


def _latents_hash(params: Params, model: LatentDiffusion) -> str:
    """A hash of all that latents depend on: equal means the same z of the same image."""
    return content_hash({name: params[name] for name in ("first_stage", "shift", "scale")}, str(model.latent_shape))


def clip_for(path: Path, model: LatentDiffusion) -> TrainedCLIP:
    """The CLIP of a run folder, to guide a model; raises InputError if there is none, or its images differ."""
    try:
        trained = load_clip(path)
    except InputError as error:
        raise InputError(f"--clip: {error}") from error
    own, channels = trained.clip.image.num_channels, model.image_shape[-1]
    if own != channels:
        raise InputError(f"--clip={path} takes images of {own} channels; those of --model have {channels}")
    return trained
