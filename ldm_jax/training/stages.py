"""The stages of a run: each trains or measures one thing, and leaves it in the run folder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from ldm_jax.errors import InputError
from ldm_jax.interop import lora
from ldm_jax.interop.lpips_weights import load_lpips
from ldm_jax.pipeline.clip import FOLDER, TOKENIZER, clip_of
from ldm_jax.pipeline.from_config import build_first_stage, from_config
from ldm_jax.pipeline.from_run import load_autoencoder_params, load_first_stage, load_scale, save_scale
from ldm_jax.pipeline.model import LatentDiffusion, Params
from ldm_jax.pipeline.trainable import LoRA, merge_trained, trainable_of
from ldm_jax.run_folder.checkpoint import Checkpoints, flatten, identity, unflatten
from ldm_jax.runtime.parallel import parallel_map, wait_for_hosts
from ldm_jax.sampling import image_grids
from ldm_jax.training import clip_data, latents, text_embeddings
from ldm_jax.training.from_config import (
    make_autoencoder_stage,
    make_classifier_stage,
    make_clip_stage,
    make_diffusion_stage,
)
from ldm_jax.training.loop import initial_state, train
from ldm_jax.training.preview import make_preview
from ldm_jax.training.run import Run, encode_images, initial_model, latents_feed, make_feed
from ldm_jax.training.validation import make_contrastive_validation, make_validation

RECONSTRUCTED = 20  # test images whose reconstructions are shown while training


def train_autoencoder(run: Run) -> None:
    """Stage 1: leaves autoencoder/ in the run folder, trained here or reused from another run."""
    config, folder = run.config, run.workdir / "autoencoder"
    if config.autoencoder.checkpoint:
        with Checkpoints(folder, keep=1, identity=identity(config, "autoencoder")) as checkpoints:
            checkpoints.save({"step": np.int32(0), "ema_params": {"autoencoder": reused_autoencoder(config)}})
        return
    stage, loss = make_autoencoder_stage(config), config.autoencoder.loss
    _train(
        run,
        "autoencoder",
        stage,
        initial_state(stage.init, config.seed),
        feed=make_feed(config, run.train_set, config.autoencoder.batch_size, run.train_set.groups),
        frozen={"lpips": load_lpips(loss.perceptual_net)[0]} if loss.perceptual else {},
        variant=lambda step: {"adversarial": loss.adversarial > 0 and step >= loss.adversarial_start},
        preview=_preview_reconstructions(run),
    )


def _preview_reconstructions(run: Run) -> Callable[[int, Any], None]:
    """`preview(step, state)` leaves test images and their reconstructions in progress/."""
    n, first_stage = RECONSTRUCTED, build_first_stage(run.config)
    padded = -(-n // jax.local_device_count()) * jax.local_device_count()
    images = run.test_set[np.arange(padded) % n % len(run.test_set)]["x"]
    reconstruct = parallel_map(lambda params, batch: first_stage.reconstruct(params, batch["x"]))

    def preview(step: int, state: Any) -> None:
        decoded = reconstruct(state.ema_params["autoencoder"], {"x": images})
        strip = image_grids.reconstruction_strip(images[:n], decoded[:n])
        image_grids.save_png(strip, run.workdir / "progress" / f"autoencoder_{step:06d}.png")

    return preview


def reused_autoencoder(config: ConfigDict) -> Params:
    """The trained parameters of `config.autoencoder.checkpoint`; raises InputError if they do not fit."""
    other = Path(config.autoencoder.checkpoint)
    if not other.is_dir():
        raise InputError(f"config.autoencoder.checkpoint={other} does not exist; it must be a run folder")
    like = jax.eval_shape(make_autoencoder_stage(config).init, jax.random.key(0)).ema_params["autoencoder"]
    params = load_autoencoder_params(other)
    return unflatten(flatten(params), like, where=f"config.autoencoder.checkpoint={other}")


def reused_scale(config: ConfigDict) -> tuple[np.ndarray, np.ndarray, str] | None:
    """Shift, scale and the data they were measured on, of the run that a classifier takes its autoencoder from.

    The classifier must see the very latents that it is to guide, and a measurement on other devices may round
    otherwise. None: to be measured.
    """
    other = config.autoencoder.checkpoint
    return load_scale(Path(other)) if other and "classifier" in config.stages else None


def measure_latents(run: Run) -> None:
    """Between the stages: leaves the cache in latents/, and the latents' shift and scale with the autoencoder."""
    first_stage, params = build_first_stage(run.config), {"first_stage": load_autoencoder_params(run.workdir)}
    cache = encode_images(run, first_stage, params, run.train_set)
    if reused := reused_scale(run.config):
        shift, scale, measured_on = reused
    else:
        measured_on = f"{run.train_set.name}/{run.train_set.split}"
        shift, scale = latents.measure_scale(cache.arrays["moments"], gaussian=first_stage.stochastic)
    if jax.process_index() == 0:
        save_scale(run.workdir, shift, scale, measured_on=measured_on)
    wait_for_hosts("scale")  # which the others read
    print(f"     latents shift {np.round(shift, 3)}, scale {np.round(scale, 3)}", flush=True)


def train_clip(run: Run) -> None:
    """Images and captions: leaves clip/ in the run folder, trained here or reused from another run."""
    config, folder, primary = run.config, run.workdir / FOLDER, jax.process_index() == 0
    vocabulary = folder / TOKENIZER
    if config.clip.checkpoint:
        reused = clip_data.reused(config)
        if primary:
            clip_data.save_tokenizer(reused.tokenizer, vocabulary)
        with Checkpoints(folder, keep=1, identity=identity(config, "clip")) as checkpoints:
            checkpoints.save({"step": np.int32(0), "ema_params": reused.params})
        wait_for_hosts("clip")  # which the others read
        return
    if primary:
        clip_data.make_tokenizer(config, vocabulary, run.train_set)
    wait_for_hosts("tokenizer")  # which the others read
    tokenizer = clip_data.make_tokenizer(config, vocabulary, run.train_set)
    stage = make_clip_stage(clip_of(config, tokenizer), config)
    batch = {"num": config.clip.validation_examples, "batch_size": config.clip.batch_size}
    _train(
        run,
        "clip",
        stage,
        initial_state(stage.init, config.seed),
        feed=make_feed(config, run.train_set, config.clip.batch_size, run.train_set.groups),
        frozen=clip_data.frozen_texts(tokenizer, run.train_set),
        validate=make_contrastive_validation(stage, run.test_set, **batch),
    )


def train_diffusion(run: Run) -> None:
    """Stage 2: leaves diffusion/ in the run folder, sample grids in progress/, and of LoRA a file for diffusers."""
    config, (model, params) = run.config, initial_model(run)
    trainable = trainable_of(config, model)
    trained_model, frozen = text_embeddings.freeze(
        model, params, trainable, run.train_set.captions, config, run.workdir / "latents"
    )
    stage = make_diffusion_stage(trained_model, trainable, config)
    sample = make_preview(run, model, params)

    def preview(step: int, state: Any) -> None:
        sample(step, merge_trained(trainable, params, state.ema_params))

    images = model.first_stage.module is None or model.concat is not None
    state = _train(
        run,
        "diffusion",
        stage,
        initial_state(stage.init, config.seed, params),
        feed=latents_feed(run, model.first_stage, params, config.diffusion.batch_size, images=images),
        frozen=frozen,
        validate=_validation(run, stage, model),
        preview=preview,
        init_from=model.origin.fingerprint,
    )
    if isinstance(trainable, LoRA) and jax.process_index() == 0:
        lora.save_lora(run.workdir / lora.FILE, state.ema_params["lora"], trainable.scale)


def train_classifier(run: Run) -> None:
    """A classifier of noisy latents: leaves classifier/ in the run folder."""
    config, names = run.config, run.train_set.class_names
    model, params = from_config(config, names), load_first_stage(run.workdir, config)
    stage = make_classifier_stage(model, len(names), config)
    images = model.first_stage.module is None or model.concat is not None
    _train(
        run,
        "classifier",
        stage,
        initial_state(stage.init, config.seed),
        feed=latents_feed(run, model.first_stage, params, config.classifier.batch_size, images=images),
        frozen=params,
        validate=_validation(run, stage, model),
    )


def _validation(run: Run, stage: Any, model: LatentDiffusion) -> Callable[[Any, dict, int], dict[str, float]]:
    config = run.config
    batch = {"num": config.diffusion.validation_examples, "batch_size": config.evaluation.batch_size}
    return make_validation(stage, run.test_set, **batch, T=len(model.process))


def _train(
    run: Run,
    name: str,
    stage: Any,
    initial: Any,
    *,
    feed: Any,
    frozen: dict[str, Any],
    validate: Callable[[Any, dict, int], dict[str, float]] | None = None,
    preview: Callable[[int, Any], None] = lambda step, state: None,
    init_from: str = "",
    **options: Any,
) -> Any:
    """Trains a stage to its last step, with validation and a preview now and then; returns the state.

    Args:
      run, name, stage, initial, feed, frozen, options: see `loop.train`.
      validate: (averaged parameters, frozen, seed) -> what is logged.
      preview: (step, state) -> images in progress/.
      init_from: the fingerprint of the model that is fine-tuned.
    """
    config, steps, every = run.config, run.config[name].steps, run.config.sampling.progress_every

    def after_step(step: int, state: Any) -> None:
        if not every or (step % every and step != steps) or jax.process_index():
            return
        if validate:
            run.log(name, step, **validate(state.ema_params, frozen, config.seed))
        preview(step, state)

    recorded = identity(config, name) | ({"init_from": init_from} if init_from else {})
    with Checkpoints(run.workdir / name, keep=config.keep_checkpoints, identity=recorded) as checkpoints:
        return train(
            name,
            stage,
            initial,
            steps=steps,
            feed=feed,
            frozen=frozen,
            checkpoints=checkpoints,
            after_step=after_step,
            log=run.log,
            watch=run.watch,
            **{field: config[field] for field in ("seed", "log_every", "checkpoint_every")},
            **options,
        )
