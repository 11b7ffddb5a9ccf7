"""What a config may say: which fields must fit each other, checked before anything is compiled."""

from ml_collections import ConfigDict

from ldm_jax.config.fields import OWN, SCHEDULE, STAGES, check_choice, check_fields
from ldm_jax.config.io import flatten
from ldm_jax.diffusion.prediction import coefficient_tables
from ldm_jax.diffusion.schedules import make_process
from ldm_jax.errors import InputError


def validate(config: ConfigDict) -> None:
    """Raises InputError for values that no run could have, before anything is compiled or written."""
    check_fields(flatten(config))
    if config.init_from:
        _validate_fine_tuning(config)
    else:
        _validate_stages(config)
        _validate_own(config)
        _validate_shapes(config)
    _validate_together(config)


def _validate_together(config: ConfigDict) -> None:
    """Raises InputError for fields that rule each other out."""
    diffusion, loss = config.diffusion, config.autoencoder.loss
    if diffusion.schedule in ("linear", "scaled_linear") and not 0 < diffusion.beta_start <= diffusion.beta_end:
        raise InputError(
            f"config.diffusion.beta_start is {diffusion.beta_start}, beta_end {diffusion.beta_end}; "
            "they must rise from above 0"
        )
    try:
        process = make_process(**{name: diffusion[name] for name in SCHEDULE})
        coefficient_tables(diffusion.prediction, process)
    except ValueError as error:
        raise InputError(f"config.diffusion.prediction: {error}") from error
    if config.autoencoder.batch_size % loss.perceptual_every:
        raise InputError(
            f"config.autoencoder.loss.perceptual_every is {loss.perceptual_every}; it must divide "
            f"config.autoencoder.batch_size = {config.autoencoder.batch_size}"
        )
    concat = config.concat
    if concat.type == "low_resolution" and config.data.image_size % concat.factor:
        raise InputError(
            f"config.concat.factor is {concat.factor}; it must divide config.data.image_size = {config.data.image_size}"
        )
    if concat.type == "segments" and config.data.segments_key == "none":
        raise InputError(
            "config.concat.type is 'segments'; config.data.segments_key must name the feature with the map"
        )
    if diffusion.variance == "learned" and not diffusion.vlb_weight:
        raise InputError(
            "config.diffusion.vlb_weight is 0, by which no variance is learned; it must be above 0 with "
            "config.diffusion.variance=learned, e.g. 0.001"
        )
    if config.sampling.threshold and config.autoencoder.type != "none":
        raise InputError(
            f"config.sampling.threshold is {config.sampling.threshold}; it is for pixels "
            "(config.autoencoder.type=none), latents know no bounds"
        )
    if config.sampling.steps > config.diffusion.timesteps:
        raise InputError(
            f"config.sampling.steps is {config.sampling.steps}; there are config.diffusion.timesteps = "
            f"{config.diffusion.timesteps} timesteps to choose from"
        )


def _validate_fine_tuning(config: ConfigDict) -> None:
    """The fields beside `init_from`, of which many are the model's own and not looked at."""
    if config.stages != ("diffusion",):
        raise InputError(f"config.stages is {config.stages}; with config.init_from it must be ('diffusion',)")
    if config.diffusion.variance == "learned":
        raise InputError("config.diffusion.variance is 'learned'; with config.init_from it must be fixed")
    _validate_prompts(config.sampling.prompts)
    if config.lora.rank and config.diffusion.train_text_encoder:
        raise InputError(
            "config.diffusion.train_text_encoder is True; with config.lora.rank, LoRA of the UNet is all that learns"
        )
    if config.lora.rank and not config.lora.alpha:
        raise InputError("config.lora.alpha is 0, with which nothing is trained; it must be above 0")


def _validate_prompts(prompts: tuple) -> None:
    if not isinstance(prompts, tuple) or not all(isinstance(prompt, str) for prompt in prompts):
        raise InputError(f"config.sampling.prompts is {prompts}; it must be texts, e.g. ('a cat', 'a dog')")


def _validate_own(config: ConfigDict) -> None:
    """Raises InputError for a field that only fine-tuning has, or a run with CLIP, or that a run with CLIP has not."""
    sampling = config.sampling
    asked = {
        "lora.rank": config.lora.rank,
        "data.bucket_step": config.data.bucket_step,
        "sampling.sampler": OWN if sampling.sampler == OWN else "",
    }
    for name, value in asked.items():
        if value:
            raise InputError(f"config.{name} is {value!r}; that needs config.init_from, a diffusers model")
    if text_conditioned(config):
        _validate_texts(config)
    elif sampling.prompts or config.diffusion.train_text_encoder:
        name, value = (
            ("sampling.prompts", sampling.prompts) if sampling.prompts else ("diffusion.train_text_encoder", True)
        )
        raise InputError(f"config.{name} is {flatten(config)[name]!r}; that needs 'clip' in config.stages")
    if "clip" in config.stages:
        _validate_clip(config)


def text_conditioned(config: ConfigDict) -> bool:
    """Whether a run of ours trains a diffusion model that is told of texts, by a CLIP of its own."""
    return not config.init_from and {"clip", "diffusion"} <= set(config.stages)


def _validate_clip(config: ConfigDict) -> None:
    clip = config.clip
    if config.data.caption_key == "none":
        raise InputError("config.stages has 'clip'; config.data.caption_key must name the feature with the captions")
    if config.data.image_size % clip.patch_size:
        raise InputError(
            f"config.clip.patch_size is {clip.patch_size}; it must divide config.data.image_size = "
            f"{config.data.image_size}"
        )
    for tower in ("text", "image"):
        width, heads = clip[f"{tower}_width"], clip[f"{tower}_heads"]
        if width % heads:
            raise InputError(
                f"config.clip.{tower}_heads is {heads}; it must divide config.clip.{tower}_width = {width}"
            )


def _validate_texts(config: ConfigDict) -> None:
    """A diffusion model told of texts is Stable Diffusion in small, so that diffusers draws the same with it."""
    _validate_prompts(config.sampling.prompts)
    if config.unet.context_dim != config.clip.text_width:
        raise InputError(
            f"config.unet.context_dim is {config.unet.context_dim}; it must be config.clip.text_width = "
            f"{config.clip.text_width}, whose texts the UNet is told"
        )
    only = {"autoencoder.type": "kl", "concat.type": "none", "diffusion.variance": "fixed"}
    fields = flatten(config)
    for name, value in only.items():
        if fields[name] != value:
            raise InputError(f"config.{name} is {fields[name]!r}; with 'clip' in config.stages it must be {value!r}")


def _validate_stages(config: ConfigDict) -> None:
    """Pixel diffusion (autoencoder.type none) has no first stage to train, though its name may stand there."""
    stages, pixels = config.stages, config.autoencoder.type == "none"
    for stage in stages if isinstance(stages, tuple) else (stages,):
        check_choice("config.stages", stage, STAGES)
    if not isinstance(stages, tuple) or stages != tuple(stage for stage in STAGES if stage in stages):
        raise InputError(f"config.stages is {stages}; it must be some of {', '.join(STAGES)}, each once, in this order")
    if not set(stages) - ({"autoencoder"} if pixels else set()):
        raise InputError(f"config.stages is {stages}: there is nothing to train")
    on_latents = [stage for stage in stages if stage not in ("autoencoder", "clip")]
    if on_latents and stages[0] != "autoencoder" and not pixels:
        raise InputError(
            f"config.stages is {stages}; what is trained on latents needs 'autoencoder' before it "
            "(config.autoencoder.checkpoint takes another run's)"
        )


def _validate_shapes(config: ConfigDict) -> None:
    size = config.data.image_size
    if config.autoencoder.type != "none":
        channels, factor = config.autoencoder.block_out_channels, 2 ** (len(config.autoencoder.block_out_channels) - 1)
        _positive("autoencoder.block_out_channels", channels)
        if size % factor:
            raise InputError(
                f"config.data.image_size is {size}; an autoencoder of {len(channels)} resolutions needs a multiple "
                f"of {factor}"
            )
        _divides("autoencoder.norm_num_groups", config.autoencoder.norm_num_groups, channels)
        size //= factor
    _validate_levels("unet", config.unet, size)
    if "classifier" in config.stages:
        _validate_levels("classifier", config.classifier, size)


def _validate_levels(name: str, network: ConfigDict, size: int) -> None:
    """The resolutions of `network`, the section `name`, for latents of `size` pixels."""
    channels = network.block_out_channels
    _positive(f"{name}.block_out_channels", channels)
    if len(network.attention) != len(channels):
        raise InputError(
            f"config.{name}.attention has {len(network.attention)} entries, config.{name}.block_out_channels "
            f"{len(channels)}; they must be equally long"
        )
    _divides(f"{name}.norm_num_groups", network.norm_num_groups, channels)
    if network.norm_num_groups in channels:
        raise InputError(
            f"config.{name}.norm_num_groups is {network.norm_num_groups}, as many as there are channels at a "
            f"resolution of config.{name}.block_out_channels {channels}; a norm of single channels erases the time "
            "embedding, so it must be less"
        )
    _divides(f"{name}.attention_heads", network.attention_heads, channels)
    if size < 2 ** (len(channels) - 1):
        raise InputError(
            f"config.{name}.block_out_channels has {len(channels)} resolutions; latents of {size}x{size} "
            "cannot be halved so often"
        )


def _positive(name: str, values: tuple) -> None:
    if not values or not all(isinstance(value, int) and value > 0 for value in values):
        raise InputError(f"config.{name} is {values}; it must be one positive whole number for each resolution")


def _divides(name: str, divisor: int, channels: tuple) -> None:
    for value in channels:
        if value % divisor:
            raise InputError(
                f"config.{name} is {divisor}, which does not divide {value} of block_out_channels {channels}"
            )


def validate_devices(config: ConfigDict, devices: int) -> None:
    """Raises InputError if a batch cannot be shared out evenly."""
    fields = flatten(config)
    for name in (f"{part}.batch_size" for part in (*config.stages, "sampling", "evaluation")):
        value = fields[name]
        if value % devices:
            raise InputError(f"config.{name} is {value}; it must be a multiple of the {devices} devices")
