"""Fine-tuning: the UNet of somebody's model trained on, or its LoRA; all else of the model stays as it is.

In each step one of the captions that a picture has is drawn, and the UNet is told what `told` has of it. The classes of
a class-conditional model are those of the data set, and what it is told of each learns with the UNet (Rombach 2022,
section 3.3), unless that is LoRA. An inpainting model is given random parts of the pictures, an upscaler the pictures
made small, as `map_condition` has it, and for the upscaler noised (see `upscaling`).
"""

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ldm_jax import builders, hub, pretrained, pretrained_files, upscaling
from ldm_jax.data.datasets import Dataset
from ldm_jax.errors import InputError
from ldm_jax.first_stage import make_first_stage
from ldm_jax.interop import lora
from ldm_jax.pretrained import Pretrained
from ldm_jax.text_condition import make_class_tau, make_tau
from ldm_jax.told import NO_CAPTIONS, Captions, check_texts, numbered, reads_along, tell_of
from ldm_jax.training.diffusion import DiffusionStage, Network, make_diffusion_stage
from ldm_jax.training.state import make_optimizer

# The fields that are the model's, whatever the config says, by their sections.
OF_THE_MODEL = {
    "autoencoder": ("kind", "block_out_channels", "latent_channels"),
    "concat": ("kind",),
    "diffusion": ("timesteps", "prediction"),
}
SAMPLED_BYTES = 1 << 16  # of each sample, for the fingerprint
SAMPLES_OF_FILE = 256
OF_ITS_SAMPLER = ("sampler", "spacing", "eta", "churn", "variance")


class Base(NamedTuple):
    """The model that is fine-tuned."""

    model: Pretrained
    params: dict[str, Any]  # as `pretrained_files.load` gives them
    fingerprint: str  # equal means the same parameters


def load_base(config: ConfigDict, dtype: str = "float32") -> tuple[Base, ConfigDict]:
    """The model of `config.init_from`, its parameters of type `dtype`, and the config with the fields that are its own.

    It is a diffusers folder, or a single file with its tokenizer beside it. What such a file may leave open beside that
    is said as the file is made a folder: see `convert`.

    Raises:
      InputError: there is no such model, or what the config asks for does not fit it.
    """
    path = hub.find(config.init_from, flag="config.init_from")
    if not (pretrained_files.is_folder(path) or pretrained_files.is_single_file(path)):
        raise InputError(
            f"config.init_from={path} must be a diffusers folder, with a model_index.json, or a model in one "
            ".safetensors or .ckpt; it is neither"
        )
    try:
        model, theirs, params = pretrained_files.load(path, dtype)
    except InputError as error:
        raise InputError(f"config.init_from={path}: {error}") from error
    kind = jnp.dtype(config.dtype)
    model = model._replace(
        unet=model.unet.clone(dtype=kind),
        autoencoder=model.autoencoder.clone(dtype=kind),
        encoders=tuple(encoder.clone(dtype=kind) for encoder in model.encoders),
    )
    return Base(model, params, _fingerprint(path)), _resolved(config, model, theirs)


def _fingerprint(path: Path) -> str:
    """A hash of the names and sizes of the files with weights, and of samples of these, of which there are gigabytes.

    Of a folder's files the beginnings and ends are looked at. What models of a kind have in common may be at both ends
    of a single file, so that this is looked at all along.
    """
    digest = hashlib.sha256()
    in_folder = sorted(file for suffix in ("safetensors", "bin") for file in path.rglob(f"*.{suffix}"))
    for file in [path] if path.is_file() else in_folder:
        size = file.stat().st_size
        digest.update(f"{file.relative_to(path)} {size}".encode())
        with file.open("rb") as content:
            for share in np.linspace(0, 1, SAMPLES_OF_FILE if path.is_file() else 2):
                content.seek(int(share * max(0, size - SAMPLED_BYTES)))
                digest.update(content.read(SAMPLED_BYTES))
    return digest.hexdigest()[:16]


def _resolved(config: ConfigDict, model: Pretrained, theirs: ConfigDict) -> ConfigDict:
    """The config of a run with the fields that are its model's; raises InputError for others that do not fit these."""
    where, data = f"config.init_from={config.init_from}", config.data
    if data.channels != theirs.data.channels:
        raise InputError(f"config.data.channels is {data.channels}; {where} takes pictures of {theirs.data.channels}")
    factor = 2 ** (len(theirs.autoencoder.block_out_channels) - 1)
    if data.image_size % factor:
        raise InputError(f"config.data.image_size is {data.image_size}; {where} needs a multiple of {factor}")
    if data.bucket_step:
        _check_buckets(config, model, factor)
    if model.encoders and data.caption_key == "none":
        raise InputError(f"{where} is a model of texts; config.data.caption_key must name the feature with these")
    if config.sampling.prompts and not model.encoders:
        raise InputError(f"config.sampling.prompts is {config.sampling.prompts}; {where} is told no texts")
    resolved = config.copy_and_resolve_references().unlock()
    for section, names in OF_THE_MODEL.items():
        for name in names:
            resolved[section][name] = theirs[section][name]
    if model.upscaling:
        resolved.concat.factor = theirs.concat.factor
    if not model.encoders:
        resolved.data.caption_key = "none"
    if not (model.encoders or model.classes):
        resolved.data.label_key, resolved.sampling.guidance = "none", 1.0
    if config.sampling.sampler == "own":
        for name in OF_ITS_SAMPLER:
            resolved.sampling[name] = theirs.sampling[name]
    return resolved.lock()


def _check_buckets(config: ConfigDict, model: Pretrained, factor: int) -> None:
    """Raises InputError for shapes of pictures that the model cannot take."""
    step, size = config.data.bucket_step, config.data.image_size
    told = f"config.data.bucket_step is {step}; "
    if step % factor or step > size:
        raise InputError(f"{told}it must be a multiple of {factor}, no more than config.data.image_size = {size}")
    if config.data.kind_key != "none":
        raise InputError(f"{told}with it config.data.kind_key must be 'none'; it is {config.data.kind_key!r}")
    if model.map_kind != "none" or len(model.encoders) > 1:
        kind = "is told the size of each picture" if model.map_kind == "none" else "sees a map beside its latents"
        raise InputError(f"{told}it must be 0 for config.init_from={config.init_from}, which {kind}")


def check_data(config: ConfigDict, base: Base, train_set: Dataset) -> None:
    """Raises InputError if the model cannot be told of the data set's texts or classes, or has no place for LoRA."""
    where, classes = f"config.init_from={config.init_from}", base.model.classes
    if not jax.tree.leaves(trained_shapes(config, base)):
        raise InputError(f"config.lora.rank is {config.lora.rank}; {where} has no attention that LoRA could be of")
    if base.model.encoders:
        check_texts(config, base.model, base.params["conditioner"], numbered(train_set.captions).texts)
    if classes and not train_set.num_classes:
        raise InputError(f"{where} is a model of classes; {train_set.name} has none: see config.data.label_key")
    if classes and train_set.num_classes > classes.num_classes:
        raise InputError(
            f"{where} knows {classes.num_classes} classes; {train_set.name} has {train_set.num_classes}, which must be "
            "no more"
        )


def build_network(config: ConfigDict, base: Base, captions: Captions) -> Network:
    """What is trained, and what that is told; the rest of it is from `frozen_arrays`."""
    rank, classes, learning = config.lora.rank, base.model.classes, _learning(config, base)

    def init(rng: jax.Array) -> dict[str, Any]:
        if rank:
            return {"lora": lora.init_lora(rng, base.params["unet"], rank)}
        return {name: base.params[name] for name in learning}

    def unet(params: Any, frozen: dict) -> Any:
        return lora.merge(frozen["unet"], params["lora"], lora_scale(config)) if rank else params["unet"]

    def tell(params: Any, frozen: dict, label: jax.Array) -> dict[str, Any]:
        if classes:
            return make_class_tau(classes)((frozen if rank else params)["conditioner"], label)
        if not base.model.encoders:
            return {}
        told = jax.tree.map(lambda rows: rows[label], frozen["told"])
        return make_tau(base.model.encoders)(params["conditioner"], told) if reads_along(config, base.model) else told

    def choose(frozen: dict, label: jax.Array, keys: jax.Array) -> jax.Array:
        k = jax.vmap(lambda key: jax.random.randint(key, (), 0, captions.rows.shape[1]))(keys)
        return frozen["rows"][label, k]

    null = classes.null if classes else len(captions.texts)
    return Network(base.model.unet, init, unet, tell, null, choose if captions.rows.shape[1] > 1 else None)


def _learning(config: ConfigDict, base: Base) -> tuple[str, ...]:
    """The parts of the model that learn, unless LoRA does; CompVis trained the classes' embeddings with the UNet."""
    return ("unet", "conditioner") if base.model.classes or reads_along(config, base.model) else ("unet",)


def lora_scale(config: ConfigDict) -> float:
    """What B A is multiplied by (Hu 2021, section 4.1)."""
    return config.lora.alpha / config.lora.rank


def build_stage(config: ConfigDict, base: Base, captions: Captions) -> DiffusionStage:
    """Stage 2 from a model's parameters, on its own noise schedule and for its own kind of prediction."""
    diffusion, scheduler, upscales = config.diffusion, pretrained.scheduler_of(base.model), base.model.upscaling
    first_stage, latent_shape = make_first_stage(base.model.autoencoder), builders.latent_shape(config)
    return make_diffusion_stage(
        network=build_network(config, base, captions),
        map_condition=pretrained.map_condition_of(base.model, first_stage, latent_shape),
        augment=upscaling.make_augment(upscales) if upscales else None,
        first_stage=first_stage,
        latent_shape=latent_shape,
        alpha_bar=scheduler.schedule.alpha_bar,
        prediction=scheduler.prediction,
        weighting=diffusion.weighting,
        snr_gamma=diffusion.snr_gamma,
        label_dropout=diffusion.label_dropout,
        flip=config.data.flip,
        optimizer=make_optimizer(**builders.optimizer_fields(diffusion)),
        ema_decay=diffusion.ema_decay,
    )


def frozen_arrays(config: ConfigDict, base: Base, captions: Captions, cache: Path) -> dict[str, Any]:
    """What the stage's steps need beside what they train: the first stage, "told" from `tell_of` and the "rows" of it
    that a class has, and the model itself beside its LoRA."""
    names = ("autoencoder", "shift", "scale", *(_learning(config, base) if config.lora.rank else ()))
    frozen = {name: base.params[name] for name in names}
    if base.model.encoders:
        frozen["told"] = tell_of(config, base.model, base.params["conditioner"], captions.texts, cache)
    return frozen | ({"rows": captions.rows} if captions.rows.shape[1] > 1 else {})


def trained_shapes(config: ConfigDict, base: Base) -> Any:
    """Shapes and types of what is trained, as checkpoints have it."""
    shapes = jax.eval_shape(build_network(config, base, NO_CAPTIONS).init, jax.random.key(0))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, np.float32), shapes)


def with_trained(config: ConfigDict, base: Base, trained: dict[str, Any]) -> dict[str, Any]:
    """The model's parameters with what was trained in the place of its own, or added to them, in the type of these."""
    trained = jax.device_get(trained)
    if config.lora.rank:
        trained = {"unet": lora.merge(base.params["unet"], trained["lora"], lora_scale(config))}
    before = {name: base.params[name] for name in trained.keys() & set(_learning(config, base))}
    after = {name: trained[name] for name in before}
    return base.params | jax.tree.map(lambda new, old: np.asarray(new, old.dtype), after, before)
