"""Which config fields must fit each other, checked before anything is compiled."""

from ml_collections import ConfigDict

from ldm_jax.config.fields import OWN, SCHEDULE, STAGES, check_choice, check_fields, wrong_field
from ldm_jax.config.io import flatten
from ldm_jax.config.network_rules import validate_networks
from ldm_jax.diffusion.prediction import coefficient_tables
from ldm_jax.diffusion.schedules import make_process
from ldm_jax.errors import InputError


def validate(config: ConfigDict) -> None:
    """Raises InputError for a config with a missing, wrong or contradictory field."""
    check_fields(flatten(config))
    if config.init_from:
        _validate_fine_tuning(config)
    else:
        _validate_stages(config)
        _validate_from_scratch(config)
        validate_networks(config)
    _validate_combinations(config)
    if not isinstance(config.wandb, str) or config.wandb.count("/") > 1 or set(config.wandb) & set("\\#?%:"):
        raise wrong_field(config, "wandb", "it must be a Weights & Biases project, PROJECT or ENTITY/PROJECT, or empty")


def validate_devices(config: ConfigDict, devices: int) -> None:
    """Raises InputError if a batch, or the sharding of the state, does not divide over the number of `devices`."""
    for stage in (*config.stages, "sampling", "evaluation"):
        if config[stage].batch_size % devices:
            raise wrong_field(config, f"{stage}.batch_size", f"it must be a multiple of the {devices} devices")
    k = config.parallel.accumulate
    for stage in config.stages if k > 1 else ():
        share = config.autoencoder.loss.perceptual_every if stage == "autoencoder" else 1
        if config[stage].batch_size % (devices * k * share):
            parts = f"{devices} devices x {k} micro-batches (config.parallel.accumulate)"
            parts += f" x {share} (config.autoencoder.loss.perceptual_every)" if share > 1 else ""
            raise wrong_field(config, f"{stage}.batch_size", f"it must be a multiple of {parts}")
    if config.parallel.fsdp and devices % config.parallel.fsdp:
        raise wrong_field(config, "parallel.fsdp", f"it must divide the {devices} devices")


def text_conditioned(config: ConfigDict) -> bool:
    """Whether the config trains a text-to-image model from scratch: CLIP and a diffusion model on its text encoder."""
    return not config.init_from and {"clip", "diffusion"} <= set(config.stages)


def cross_attends(config: ConfigDict) -> bool:
    """Whether the denoiser of a config is conditioned on classes or texts: a UNet is by its cross-attention alone."""
    return config.denoiser != "unet" or any(config.unet.attention)


def _validate_combinations(config: ConfigDict) -> None:
    """Fields of any run that contradict each other."""
    diffusion, concat, size = config.diffusion, config.concat, config.data.image_size
    if diffusion.schedule in ("linear", "scaled_linear") and not 0 < diffusion.beta_start <= diffusion.beta_end:
        raise wrong_field(
            config, "diffusion.beta_start", f"it must be above 0 and at most beta_end = {diffusion.beta_end}"
        )
    try:
        coefficient_tables(diffusion.prediction, make_process(**{name: diffusion[name] for name in SCHEDULE}))
    except ValueError as error:
        raise InputError(f"config.diffusion.prediction: {error}") from error
    batch = config.autoencoder.batch_size
    if batch % config.autoencoder.loss.perceptual_every:
        raise wrong_field(
            config, "autoencoder.loss.perceptual_every", f"it must divide autoencoder.batch_size = {batch}"
        )
    if concat.type == "low_resolution" and size % concat.factor:
        raise wrong_field(config, "concat.factor", f"it must divide config.data.image_size = {size}")
    if concat.type == "segments" and config.data.segments_key == "none":
        raise wrong_field(
            config, "concat.type", "config.data.segments_key must name the feature with segmentation maps"
        )
    if diffusion.variance == "learned" and (diffusion.timestep_sampling, diffusion.timestep_shift) != ("uniform", 1.0):
        raise wrong_field(
            config, "diffusion.variance", "the VLB that trains a learned variance needs uniform timesteps"
        )
    if diffusion.variance == "learned" and not diffusion.vlb_weight:
        raise wrong_field(config, "diffusion.vlb_weight", "for a learned variance it must be above 0, e.g. 0.001")
    if config.sampling.threshold and config.autoencoder.type != "none":
        rule = "dynamic thresholding needs pixels (config.autoencoder.type=none); latents are not bounded"
        raise wrong_field(config, "sampling.threshold", rule)
    if config.sampling.steps > diffusion.timesteps:
        raise wrong_field(
            config, "sampling.steps", f"it must be at most config.diffusion.timesteps = {diffusion.timesteps}"
        )
    _validate_guide(config)
    _validate_objective(config)
    _validate_parallel(config)


def _validate_guide(config: ConfigDict) -> None:
    """sampling.guide_step, of a training that is longer."""
    step, every = config.sampling.guide_step, config.checkpoint_every
    if not 0 < step < config.diffusion.steps:
        return
    if step % every:
        raise wrong_field(
            config, "sampling.guide_step", f"it must be a multiple of config.checkpoint_every = {every}, or 0"
        )
    if config.diffusion.objective != "diffusion":
        rule = f"a model with config.diffusion.objective={config.diffusion.objective} is not guided: it must be 0"
        raise wrong_field(config, "sampling.guide_step", rule)


# Each objective but diffusion: the fields that must have one value, and why.
OBJECTIVE_FIELDS = {
    "mean_flow": {
        "init_from": ("", "MeanFlow is trained from scratch"),
        "denoiser": ("unet", "the DiT has no embedding of the interval"),
        "diffusion.schedule": ("rectified_flow", "MeanFlow's velocity is that of rectified flow"),
        "diffusion.prediction": ("flow", "MeanFlow's network predicts a velocity"),
        "diffusion.weighting": ("uniform", "MeanFlow has a weight of its own, mean_flow.adaptive_power"),
        "diffusion.variance": ("fixed", "MeanFlow's steps have no variance"),
        "sampling.sampler": ("ddim", "its steps are those of an average velocity"),
        "sampling.eta": (0, "MeanFlow's steps have no noise"),
        "sampling.threshold": (0, "MeanFlow's steps have no estimate of the data to threshold"),
    },
    "consistency": {
        "diffusion.weighting": ("uniform", "consistency distillation has the pseudo-Huber loss, without a weight"),
        "textual_inversion.token": ("", "consistency distillation trains the denoiser"),
    },
}


def _validate_objective(config: ConfigDict) -> None:
    """The fields that go with diffusion.objective."""
    objective, fields, least = config.diffusion.objective, flatten(config), config.consistency.guidance_min
    for name, (value, why) in OBJECTIVE_FIELDS.get(objective, {}).items():
        if fields[name] != value:
            right = f"with config.diffusion.objective={objective} it must be {value!r}"
            raise wrong_field(config, name, f"{right}: {why}")
    if objective == "mean_flow" and "clip" in config.stages:
        raise wrong_field(
            config, "diffusion.objective", "text-to-image models must be sampled as in diffusers: no MeanFlow"
        )
    if objective == "consistency" and not config.init_from:
        raise wrong_field(config, "diffusion.objective", "that needs config.init_from, the model to distill")
    if least > config.consistency.guidance_max:
        raise wrong_field(
            config, "consistency.guidance_max", f"it must be at least config.consistency.guidance_min = {least}"
        )


def _validate_parallel(config: ConfigDict) -> None:
    """The engine's fields; losses that are no means over examples cannot be accumulated over micro-batches."""
    parallel, stages = config.parallel, config.stages
    if parallel.fsdp and parallel.engine != "fsdp":
        raise wrong_field(config, "parallel.fsdp", "that needs config.parallel.engine = 'fsdp'")
    if parallel.accumulate == 1:
        return
    adversarial = config.autoencoder.type != "none" and config.autoencoder.loss.adversarial
    if "autoencoder" in stages and adversarial and not config.autoencoder.checkpoint:
        rule = (
            "the weight of the autoencoder's adversarial loss follows from the whole batch: it must be 1, or "
            "config.autoencoder.loss.adversarial 0, or config.autoencoder.checkpoint a run with a trained autoencoder"
        )
        raise wrong_field(config, "parallel.accumulate", rule)
    if "clip" in stages and not config.clip.checkpoint:
        rule = "CLIP's loss compares all examples of a batch: it must be 1, or config.clip.checkpoint a run with CLIP"
        raise wrong_field(config, "parallel.accumulate", rule)


def _validate_fine_tuning(config: ConfigDict) -> None:
    """A run with `init_from`; the fields that the pretrained model replaces are not used."""
    if config.stages != ("diffusion",):
        raise wrong_field(config, "stages", "with config.init_from it must be ('diffusion',)")
    if config.diffusion.variance == "learned":
        raise wrong_field(config, "diffusion.variance", "with config.init_from it must be fixed: the model has its own")
    _validate_prompts(config)
    if config.lora.rank and not config.lora.alpha:
        raise wrong_field(config, "lora.alpha", "it must be above 0, as it scales the LoRA update")
    if config.diffusion.optimizer == "muon" and (config.lora.rank or config.textual_inversion.token):
        raise wrong_field(config, "diffusion.optimizer", "with LoRA or textual inversion it must be adamw")
    if config.textual_inversion.token:
        _validate_textual_inversion(config)
    elif config.data.name == "concept":
        raise wrong_field(config, "textual_inversion.token", "with config.data.name = 'concept' it must be a new word")


def _validate_textual_inversion(config: ConfigDict) -> None:
    inversion = config.textual_inversion
    for name in ("token", "init_word"):
        if inversion[name].split() != [inversion[name]]:
            raise wrong_field(config, f"textual_inversion.{name}", "it must be one word, without spaces")
    for name in ("lora.rank", "diffusion.train_text_encoder"):
        if flatten(config)[name]:
            rule = "with config.textual_inversion.token, whose vectors alone are trained, it must be"
            raise wrong_field(config, name, f"{rule} {0 if name == 'lora.rank' else False}")


def _validate_from_scratch(config: ConfigDict) -> None:
    """A run without `init_from`: fields that need it, or that need or exclude the stage 'clip'."""
    for name in ("lora.rank", "data.bucket_step", "textual_inversion.token"):
        if flatten(config)[name]:
            raise wrong_field(config, name, "that needs config.init_from, a diffusers model")
    if config.sampling.sampler == OWN:
        raise wrong_field(config, "sampling.sampler", "that needs config.init_from, a diffusers model")
    if text_conditioned(config):
        _validate_text_to_image(config)
    else:
        for name in ("sampling.prompts", "diffusion.train_text_encoder"):
            if flatten(config)[name]:
                raise wrong_field(config, name, "that needs a text-conditional model: 'clip' in config.stages")
    if "clip" in config.stages:
        _validate_clip(config)
    _validate_captions(config)
    _validate_null_condition(config)


def _validate_captions(config: ConfigDict) -> None:
    """Captions are for CLIP: the diffusion model and the classifier would take each for a class."""
    if config.data.caption_key == "none":
        return
    if "diffusion" in config.stages and "clip" not in config.stages:
        raise wrong_field(config, "data.caption_key", "without 'clip' in config.stages it must be 'none'")
    if "classifier" in config.stages:
        raise wrong_field(
            config, "data.caption_key", "a classifier needs classes: it must be 'none', or train it apart"
        )


def _validate_null_condition(config: ConfigDict) -> None:
    """Guidance away from the null condition, of a model that is conditioned, needs its training."""
    diffusion = config.diffusion
    conditioned = cross_attends(config) and (text_conditioned(config) or config.data.label_key != "none")
    if "diffusion" not in config.stages or not conditioned or diffusion.label_dropout:
        return
    right = {"sampling.guidance": 1, "sampling.guide_step": 0}
    right |= {"mean_flow.guidance": 1} if diffusion.objective == "mean_flow" else {}
    if wrong := [f"config.{name} {value}" for name, value in right.items() if flatten(config)[name] != value]:
        rule = "the null condition, which guidance leads away from, is trained by it: it must be above 0, or"
        raise wrong_field(config, "diffusion.label_dropout", f"{rule} {' and '.join(wrong)}")


def _validate_prompts(config: ConfigDict) -> None:
    prompts = config.sampling.prompts
    if not isinstance(prompts, tuple) or not all(isinstance(prompt, str) for prompt in prompts):
        raise wrong_field(config, "sampling.prompts", "it must be a tuple of texts, e.g. ('a cat', 'a dog')")


def _validate_clip(config: ConfigDict) -> None:
    clip, size = config.clip, config.data.image_size
    if config.data.caption_key == "none":
        raise InputError("config.stages has 'clip'; config.data.caption_key must name the feature with the captions")
    if size % clip.patch_size:
        raise wrong_field(config, "clip.patch_size", f"it must divide config.data.image_size = {size}")
    for encoder in ("text", "image"):
        width = clip[f"{encoder}_width"]
        if width % clip[f"{encoder}_heads"]:
            raise wrong_field(config, f"clip.{encoder}_heads", f"it must divide config.clip.{encoder}_width = {width}")


def _validate_text_to_image(config: ConfigDict) -> None:
    """The model must be a small Stable Diffusion, so that diffusers can run its export."""
    _validate_prompts(config)
    if not cross_attends(config):
        raise wrong_field(config, "unet.attention", "the UNet is conditioned on texts by it: one entry must be True")
    if config.denoiser == "unet" and config.unet.context_dim != config.clip.text_width:
        raise wrong_field(config, "unet.context_dim", f"it must be config.clip.text_width = {config.clip.text_width}")
    fields = flatten(config)
    for name, value in {"autoencoder.type": "kl", "concat.type": "none", "diffusion.variance": "fixed"}.items():
        if fields[name] != value:
            raise wrong_field(config, name, f"with 'clip' in config.stages it must be {value!r}")


def _validate_stages(config: ConfigDict) -> None:
    """`stages`, whose 'autoencoder' has no effect in diffusion on pixels (autoencoder.type none)."""
    stages, pixels = config.stages, config.autoencoder.type == "none"
    for stage in stages if isinstance(stages, tuple) else (stages,):
        check_choice("config.stages", stage, STAGES)
    if not isinstance(stages, tuple) or stages != tuple(stage for stage in STAGES if stage in stages):
        raise wrong_field(config, "stages", f"it must be some of {', '.join(STAGES)}, each once, in this order")
    if not set(stages) - ({"autoencoder"} if pixels else set()):
        raise wrong_field(config, "stages", "there is nothing to train")
    if {"diffusion", "classifier"} & set(stages) and stages[0] != "autoencoder" and not pixels:
        rule = "training on latents needs 'autoencoder' before it (config.autoencoder.checkpoint reuses another run's)"
        raise wrong_field(config, "stages", rule)
