"""Guidance models: a classifier of noisy latents, a CLIP."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from ldm_jax.config import io as config_io
from ldm_jax.config.fields import SCHEDULE
from ldm_jax.config.rules import validate
from ldm_jax.errors import InputError
from ldm_jax.models.classifier import NoisyClassifier
from ldm_jax.pipeline.clip import TrainedCLIP, embed_texts, load_clip
from ldm_jax.pipeline.from_config import build_classifier, build_process, from_config
from ldm_jax.pipeline.from_run import load_first_stage
from ldm_jax.pipeline.model import LatentDiffusion, Params
from ldm_jax.run_folder.checkpoint import ema_params, load_latest
from ldm_jax.runtime.files import content_hash, read_json
from ldm_jax.sampling.recipe import Recipe
from ldm_jax.sampling.sampler import Sampler, make_sampler


class TrainedClassifier(NamedTuple):
    """A classifier of noisy latents, its EMA parameters, and the model whose latents it was trained on."""

    module: NoisyClassifier
    params: Any
    model: LatentDiffusion  # without a denoiser's parameters: its latents, process and classes


class GuidanceModels(NamedTuple):
    """The models that guide, if any do."""

    classifier: TrainedClassifier | None = None
    clip: TrainedCLIP | None = None

    @property
    def params(self) -> dict[str, Any]:
        """Their parameters, which are part of a sampler's."""
        return {name: guide.params for name, guide in self._asdict().items() if guide}

    def sampler(self, model: LatentDiffusion, batch_size: int) -> Sampler:
        """The model's sampler with this guidance: see `sampler.make_sampler`."""
        classifier, clip = self
        return make_sampler(model, batch_size, classifier and classifier.module, clip and clip.clip)


def guidance_models(recipe: Recipe, model: LatentDiffusion, params: Params) -> GuidanceModels:
    """The models that a recipe's guidance names; raises InputError for one that does not fit the model."""
    guidance = recipe.guidance
    return GuidanceModels(
        classifier_for(Path(guidance.classifier), model, params) if guidance.classifier else None,
        clip_for(Path(guidance.clip), model) if guidance.clip else None,
    )


def hashes(recipe: Recipe, guides: GuidanceModels) -> dict[str, str]:
    """Run folder -> hash of its parameters, of the models that guide."""
    present = {name: guide for name, guide in guides._asdict().items() if guide}
    return {getattr(recipe.guidance, name): content_hash(guide.params) for name, guide in present.items()}


def load_classifier(path: Path) -> TrainedClassifier:
    """Reads the classifier of a run folder; raises InputError if there is none, or it does not fit its own config."""
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
    """The classifier of a run folder, if it can guide a model.

    Raises:
      InputError: as `load_classifier`, or it has other classes, another noise schedule or other latents.
    """
    classifier = load_classifier(path)
    its, config = classifier.model, classifier.model.origin.config
    if its.class_names != model.class_names:
        raise InputError(
            f"--classifier={path} has {len(its.class_names)} classes ({', '.join(its.class_names)}); those of --model "
            f"are {len(model.class_names)} ({', '.join(model.class_names)})"
        )
    if its.process != model.process:
        raise InputError(f"--classifier={path} and --model have other noise schedules: {_schedules(config, model)}")
    first_stage = load_first_stage(path, config)
    if _latents_hash(first_stage, its) != _latents_hash(params, model):
        raise InputError(
            f"--classifier={path} was trained on other latents than those of --model, of another autoencoder or scale; "
            "it must be trained with --config.autoencoder.checkpoint set to the run that it is to guide"
        )
    return classifier


def _schedules(config: ConfigDict, model: LatentDiffusion) -> str:
    """In which fields two noise schedules differ, or that one has none of these."""
    other = model.origin.config
    its = {name: config.diffusion[name] for name in SCHEDULE}
    if other is None or build_process(other) != model.process:
        return f"{', '.join(f'{name} {value}' for name, value in its.items())}, and that of --model"
    return "; ".join(f"{n} {v} and {other.diffusion[n]}" for n, v in its.items() if v != other.diffusion[n])


def _latents_hash(params: Params, model: LatentDiffusion) -> str:
    """A hash of all that latents depend on: equal means the same z of the same image."""
    parts = {name: params[name] for name in ("first_stage", "shift", "scale")}
    return content_hash(parts, str(model.latent_shape))


def clip_for(path: Path, model: LatentDiffusion) -> TrainedCLIP:
    """The CLIP of a run folder, if it can encode a model's images; raises InputError if there is none, or it cannot."""
    try:
        trained = load_clip(path)
    except InputError as error:
        raise InputError(f"--clip: {error}") from error
    its, channels = trained.clip.image.num_channels, model.image_shape[-1]
    if its != channels:
        raise InputError(f"--clip={path} takes images of {its} channels; those of --model have {channels}")
    return trained


def text_embeds(trained: TrainedCLIP, prompts: Sequence[str], rows: np.ndarray) -> np.ndarray:
    """Embeddings float32 [N, D] of the prompts with these indices [N]."""
    return embed_texts(trained, list(prompts), len(prompts) * jax.local_device_count())[rows]
