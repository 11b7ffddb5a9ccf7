"""The parts of a job: each trains or measures one thing, and leaves it in the run folder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from ldm_jax.data.datasets import Dataset
from ldm_jax.errors import InputError
from ldm_jax.interop import lora
from ldm_jax.interop.lpips_weights import load_lpips
from ldm_jax.models.first_stage import reconstruct
from ldm_jax.pipeline import base_model, from_run, trainable
from ldm_jax.pipeline import clip as pipeline_clip
from ldm_jax.pipeline import from_config as pipeline_from_config
from ldm_jax.pipeline.model import Trained
from ldm_jax.run_folder.checkpoint import (
    AUTOENCODER_FIELDS,
    IDENTITY_FIELDS,
    Checkpoints,
    _identity,
    flatten,
    unflatten,
)
from ldm_jax.runtime.parallel import parallel_map, replicate, wait_for_hosts
from ldm_jax.sampling import generate, image_grids, sample_images, tables
from ldm_jax.sampling.concat_inputs import from_split, keep_known
from ldm_jax.sampling.generate import request, smallest_batch
from ldm_jax.sampling.recipe import of_config
from ldm_jax.training import clip_data, latents, text_embeddings
from ldm_jax.training import from_config as training_from_config
from ldm_jax.training.loop import train
from ldm_jax.training.run import Run, encode_train_set, latents_feed, make_feed
from ldm_jax.training.validation import make_contrastive_validation, make_validation


def train_autoencoder(run: Run) -> None:
    """Stage 1: leaves autoencoder/ in the run folder, trained here or taken from another run."""
    config, folder = run.config, run.workdir / "autoencoder"
    stage = training_from_config.build_autoencoder_stage(config)
    if config.autoencoder.checkpoint:
        with Checkpoints(folder, keep=1, identity=_identity(config, AUTOENCODER_FIELDS)) as checkpoints:
            checkpoints.save({"step": np.int32(0), "ema_params": {"autoencoder": adopted_autoencoder(config)}})
        return
    first_stage, shown = (
        pipeline_from_config.build_first_stage(config),
        run.test_set[np.arange(20) % len(run.test_set)]["x"],
    )

    decoded = parallel_map(lambda params, batch: reconstruct(first_stage, params, batch["x"]))

    def show(step: int, state: Any) -> None:
        every = config.sampling.progress_every
        if every and (step % every == 0 or step == config.autoencoder.steps) and jax.process_index() == 0:
            devices = jax.local_device_count()
            padded = shown[np.arange(-(-len(shown) // devices) * devices) % len(shown)]
            images = decoded(state.ema_params["autoencoder"], {"x": padded})[: len(shown)]
            strip = image_grids.reconstruction_strip(shown, images)
            image_grids.save_png(strip, run.workdir / "progress" / f"autoencoder_{step:06d}.png")

    loss, identity = config.autoencoder.loss, _identity(config, AUTOENCODER_FIELDS)
    with Checkpoints(folder, keep=config.keep_checkpoints, identity=identity) as checkpoints:
        train(
            "autoencoder",
            stage,
            steps=config.autoencoder.steps,
            feed=make_feed(config, run.train_set, config.autoencoder.batch_size, run.train_set.kinds),
            frozen={"lpips": load_lpips(loss.perceptual_net)[0]} if loss.perceptual else {},
            checkpoints=checkpoints,
            variant=lambda step: {"adversarial": loss.adversarial > 0 and step >= loss.adversarial_start},
            after_step=show,
            **_loop_fields(run),
        )


def adopted_autoencoder(config: ConfigDict) -> dict[str, Any]:
    """The trained parameters of `config.autoencoder.checkpoint`; raises InputError if they do not fit."""
    other, stage = Path(config.autoencoder.checkpoint), training_from_config.build_autoencoder_stage(config)
    if not other.is_dir():
        raise InputError(f"config.autoencoder.checkpoint={other} does not exist; it must be a run folder")
    like = jax.eval_shape(stage.init, jax.random.key(0)).ema_params["autoencoder"]
    params = from_run.load_autoencoder_params(other)
    return unflatten(flatten(params), like, where=f"config.autoencoder.checkpoint={other}")


def adopted_scale(config: ConfigDict) -> tuple[np.ndarray, np.ndarray, str] | None:
    """Shift, scale and what they were measured on, of the run that a classifier takes its autoencoder from: it must see
    the very latents that it is to guide, and a measurement on other devices may round otherwise. None = to be measured.
    """
    other = config.autoencoder.checkpoint
    return from_run.load_scale(Path(other)) if other and "classifier" in config.stages else None


def measure_latents(run: Run) -> None:
    """Between the stages: leaves the cache in latents/ and the latents' shift and scale beside the autoencoder."""
    cache = encode_train_set(run)
    if adopted := adopted_scale(run.config):
        shift, scale, measured_on = adopted
    else:
        measured_on = f"{run.train_set.name}/{run.train_set.split}"
        shift, scale = latents.measure_scale(cache.arrays["moments"], gaussian=run.config.autoencoder.kind == "kl")
    if jax.process_index() == 0:
        from_run.save_scale(run.workdir, shift, scale, measured_on=measured_on)
    wait_for_hosts("scale")  # which the others read
    print(f"     latents shift {np.round(shift, 3)}, scale {np.round(scale, 3)}", flush=True)


def train_clip(run: Run) -> None:
    """Pictures and captions: leaves clip/ in the run folder, trained here or taken from another run."""
    config, folder, primary = run.config, run.workdir / pipeline_clip.FOLDER, jax.process_index() == 0
    identity, words = _identity(config, pipeline_clip.FIELDS), folder / pipeline_clip.TOKENIZER
    if config.clip.checkpoint:
        found = clip_data.adopted(config)
        if primary:
            clip_data.keep(found.tokenizer, words)
        with Checkpoints(folder, keep=1, identity=identity) as checkpoints:
            checkpoints.save({"step": np.int32(0), "ema_params": found.params})
        wait_for_hosts("clip")  # which the others read
        return
    if primary:
        clip_data.make_tokenizer(config, words, run.train_set)
    wait_for_hosts("tokenizer")  # which the others read
    tokenizer = clip_data.make_tokenizer(config, words, run.train_set)
    _, stage = clip_data.build(config, tokenizer)
    frozen = clip_data.frozen_texts(tokenizer, run.train_set)
    how_many = {"num": config.clip.validation_examples, "batch_size": config.clip.batch_size}
    validate = make_contrastive_validation(stage, run.test_set, **how_many)

    def look(step: int, state: Any) -> None:
        every = config.sampling.progress_every
        if every and (step % every == 0 or step == config.clip.steps) and jax.process_index() == 0:
            run.log("clip", step, **validate(state.ema_params, frozen, config.seed))

    with Checkpoints(folder, keep=config.keep_checkpoints, identity=identity) as checkpoints:
        train(
            "clip",
            stage,
            steps=config.clip.steps,
            feed=make_feed(config, run.train_set, config.clip.batch_size, run.train_set.kinds),
            frozen=frozen,
            checkpoints=checkpoints,
            after_step=look,
            **_loop_fields(run),
        )


def train_diffusion(run: Run) -> None:
    """Stage 2: leaves diffusion/ in the run folder, and sample grids in progress/."""
    config, num_classes = run.config, run.train_set.num_classes
    batch_size = smallest_batch(config.sampling.num or 1, config.sampling.batch_size, jax.local_device_count())
    generator = generate.build_generator(config, num_classes, batch_size)
    table = tables.build_table(config)
    grid = request(
        10 * min(num_classes or 10, 10),
        list(range(num_classes)),
        guidance=config.sampling.guidance,
        seed=config.seed,
        interval=config.sampling.guidance_interval,
    )
    given = None
    if config.concat.kind != "none":
        given = from_split(config, run.test_set, len(grid.ids), config.seed)
        first_stage = replicate(from_run.load_first_stage(run.workdir, config))
        labels = grid.labels if given.labels is None else given.labels
        grid = grid._replace(maps=generator.maps(first_stage, given.known), labels=labels)

    def show(step: int, params: Any) -> None:
        images = keep_known(given, np.concatenate(list(generator.images(replicate(params), grid, table))))
        picture = sample_images.picture(config, images, grid.labels, run.train_set.class_names, given)
        image_grids.save_png(picture, run.workdir / "progress" / f"diffusion_{step:06d}.png")

    train_on_latents(run, "diffusion", training_from_config.build_diffusion_stage(config, num_classes), show)


def train_on_texts(run: Run) -> None:
    """Stage 2 told of captions by the run's own CLIP."""
    fine_tune(run._replace(base=from_run.base_of(run.workdir, run.config, draw_unet=True)))


def fine_tune(run: Run) -> None:
    """Stage 2 from the parameters of somebody's model, or of a run's own parts."""
    config, base, captions = (
        run.config,
        run.base,
        text_embeddings.numbered(run.train_set.captions) if run.train_set.captions else trainable.NO_CAPTIONS,
    )
    stage = training_from_config.build_stage(config, base, captions)
    frozen = training_from_config.frozen_arrays(config, base, captions, run.workdir / "latents")
    initial = stage.init(jax.random.fold_in(jax.random.key(config.seed), 0))
    state = train_on_latents(run, "diffusion", stage, show_fine_tuned(run), frozen=frozen, initial=initial)
    if config.lora.rank and jax.process_index() == 0:
        lora.save_lora(run.workdir / lora.FILE, state.ema_params["lora"], trainable.lora_scale(config))


def show_fine_tuned(run: Run) -> Callable[[int, Any], None]:
    """`show(step, params)` leaves in progress/ the first few of what a fine-tuned model draws at the end of its run."""
    config, model = run.config, before_fine_tuning(run.config, run.base, run.train_set)
    wanted = of_config(model, run.test_set)
    if not wanted.num:
        return lambda step, params: None
    wanted = wanted._replace(num=min(wanted.num, 2 * max(len(wanted.labels), 4)))
    table, devices = sample_images.table_for(model, wanted), jax.local_device_count()
    generator = generate.generator_of(model, smallest_batch(wanted.num, config.sampling.batch_size, devices))
    given = from_split(config, run.test_set, wanted.num, wanted.seed) if wanted.map_split else None
    first_stage = replicate({name: model.params[name] for name in ("autoencoder", "shift", "scale")})
    grid = sample_images.request_for(model, wanted, table, given, lambda known: generator.maps(first_stage, known))

    def show(step: int, params: Any) -> None:
        drawn = replicate(trainable.with_trained(config, run.base, params))
        images = keep_known(given, np.concatenate(list(generator.images(drawn, grid, table))))
        picture = sample_images.picture(config, images, grid.labels, tuple(wanted.prompts) or model.class_names, given)
        image_grids.save_png(picture, run.workdir / "progress" / f"diffusion_{step:06d}.png")

    return show


def before_fine_tuning(config: ConfigDict, base: base_model.Base, train_set: Dataset) -> Trained:
    """The model that is fine-tuned, before it is."""
    return Trained(config, train_set.class_names if base.model.classes else (), base.params, 0, base.model)


def train_classifier(run: Run) -> None:
    """Beside it: leaves classifier/ in the run folder."""
    stage = training_from_config.build_classifier_stage(run.config, run.train_set.num_classes)
    train_on_latents(run, "classifier", stage, lambda step, params: None)


def train_on_latents(
    run: Run,
    name: str,
    stage: Any,
    show: Callable[[int, Any], None],
    *,
    frozen: dict[str, Any] | None = None,
    initial: Any = None,
) -> Any:
    """Trains a stage behind the autoencoder, with a look at the test set, and `show(step, params)`, now and then.

    `frozen` are the arrays beside (None: the first stage's), `initial` is the state to begin from (None: drawn).
    Returns the state.
    """
    config, fields = run.config, run.config[name]
    feed = latents_feed(run, fields.batch_size)
    frozen = from_run.load_first_stage(run.workdir, config) if frozen is None else frozen
    validate = make_validation(
        stage,
        run.test_set,
        num=config.diffusion.validation_examples,
        batch_size=config.evaluation.batch_size,
        T=config.diffusion.timesteps,
        null_label=run.train_set.num_classes,
    )

    def look(step: int, state: Any) -> None:
        every = config.sampling.progress_every
        if not every or (step % every and step != fields.steps) or jax.process_index():
            return
        run.log(name, step, **validate(state.ema_params, frozen, config.seed))
        show(step, state.ema_params | frozen)

    identity = _identity(config, IDENTITY_FIELDS[name])
    if run.base:
        identity["init_from"] = run.base.fingerprint
    with Checkpoints(run.workdir / name, keep=config.keep_checkpoints, identity=identity) as checkpoints:
        return train(
            name,
            stage,
            steps=fields.steps,
            feed=feed,
            frozen=frozen,
            checkpoints=checkpoints,
            initial=initial,
            after_step=look,
            **_loop_fields(run),
        )


def _loop_fields(run: Run) -> dict[str, Any]:
    names = ("seed", "log_every", "checkpoint_every")
    return {name: run.config[name] for name in names} | {"log": run.log, "watch": run.watch}
