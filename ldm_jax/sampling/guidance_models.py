"""Guidance models of a recipe: a classifier of noisy latents, a CLIP, the weaker model of autoguidance."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from ldm_jax.config import io as config_io
from ldm_jax.config.rules import validate
from ldm_jax.diffusion.process import Process
from ldm_jax.errors import InputError
from ldm_jax.models.classifier import NoisyClassifier
from ldm_jax.models.conditioning import TextConditioning
from ldm_jax.pipeline.clip import TrainedCLIP, load_clip
from ldm_jax.pipeline.from_config import build_classifier, from_config
from ldm_jax.pipeline.from_run import load_first_stage
from ldm_jax.pipeline.load import is_exported, is_run, load
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


class GuideModel(NamedTuple):
    """The weaker model of autoguidance with its parameters."""

    model: LatentDiffusion
    params: Params  # "denoiser" and "conditioning"


class GuidanceModels(NamedTuple):
    """The classifier, the CLIP and the weaker model that guide, if any."""

    classifier: TrainedClassifier | None = None
    clip: TrainedCLIP | None = None
    guide_model: GuideModel | None = None

    @property
    def params(self) -> dict[str, Any]:
        """Their parameters, for `guided_denoiser`, by name."""
        return {name: model.params for name, model in self._asdict().items() if model}

    def sampler(self, model: LatentDiffusion, batch_size: int, *, cfgpp: bool = False) -> Sampler:
        """The sampler of a model with this guidance, and perhaps CFG++: see `sampler.make_sampler`."""
        classifier, clip, guide = self
        modules = classifier and classifier.module, clip and clip.clip, guide and guide.model
        return make_sampler(model, batch_size, *modules, cfgpp)


def guidance_models(recipe: Recipe, model: LatentDiffusion, params: Params) -> GuidanceModels:
    """The guidance models of a recipe, for samples of any size.

    Raises InputError for one that does not fit the model, which is at the size of its training.
    """
    guidance = recipe.guidance
    return GuidanceModels(
        classifier_for(Path(guidance.classifier), model, params) if guidance.classifier else None,
        clip_for(Path(guidance.clip), model) if guidance.clip else None,
        guide_model_for(recipe, model, params) if guidance.guide_model else None,
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


def guide_model_for(recipe: Recipe, model: LatentDiffusion, params: Params) -> GuideModel:
    """The weaker model of a recipe with autoguidance.

    Raises InputError if there is none, or its conditions, noise schedule or latents are not those of the model.
    """
    where, guidance = f"--guide_model={recipe.guidance.guide_model}", recipe.guidance
    if guidance.negative_prompt is not None or guidance.negative_label is not None:
        raise InputError(f"{where} takes the place of a null or negative condition; leave that out")
    guide, its_params = _load_guide_model(guidance.guide_model, recipe.dtype, model.origin.path)
    same_labels = type(guide.conditioning) is type(model.conditioning) and guide.class_names == model.class_names
    if not same_labels or (
        isinstance(model.conditioning, TextConditioning) and guide.conditioning != model.conditioning
    ):
        raise InputError(f"{where} is conditioned on other classes or texts than --model; they must be the same")
    if guide.concat != model.concat:
        raise InputError(f"{where} has other concat conditioning than --model; it must have the same")
    if guide.process != model.process:
        schedules = f"{_schedule(guide.process)} and {_schedule(model.process)}"
        raise InputError(f"{where} and --model have other noise schedules: {schedules}")
    if guide.guidance_dim is not None:
        raise InputError(f"{where} has the guidance scale as an input, which is for no other guidance")
    sized = guide.at_size(model.image_shape[:2])
    if sized.latent_shape != model.latent_shape or _latents_hash(its_params, sized) != _latents_hash(params, model):
        same = "it must be an earlier checkpoint, or be trained with --config.autoencoder.checkpoint set to that run"
        raise InputError(f"{where} has other latents than --model, of another autoencoder or scale; {same}")
    return GuideModel(guide, {name: its_params[name] for name in ("denoiser", "conditioning")})


def _load_guide_model(where: str, dtype: str, own: Path | None) -> tuple[LatentDiffusion, Params]:
    """The model of PATH, RUN@STEP or @STEP, of the run folder `own`, and its parameters; raises InputError."""
    run, _, step = where.rpartition("@")
    run, of_own = run or str(own), where.startswith("@")
    at_step = step.isdecimal() and (is_run(Path(run)) or is_exported(Path(run))) and not Path(where).exists()
    without = '; --guide_model="" samples without it, as does --config.sampling.guide_step=0' if of_own else ""
    try:
        guide, params = load(run, dtype, step=int(step)) if at_step else load(where, dtype)
    except InputError as error:
        raise InputError(f"--guide_model: {error}{without}") from error
    if at_step and guide.origin.step != int(step):
        no_step = f"the run has no checkpoint of that step, but of {guide.origin.step}"
        raise InputError(f"--guide_model={where}: {no_step}{without}")
    return guide, params
