"""The stages of a run: each trains a model, or encodes the data, and writes the result to the run folder."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from ldm_jax.config.io import read_with_defaults
from ldm_jax.errors import InputError
from ldm_jax.interop import lora, textual_inversion
from ldm_jax.interop.lpips_weights import load_lpips
from ldm_jax.interop.textual_inversion import Embedding
from ldm_jax.pipeline.clip import FOLDER, TOKENIZER, clip_of
from ldm_jax.pipeline.from_config import build_first_stage, from_config
from ldm_jax.pipeline.from_run import load_autoencoder_params, load_first_stage, load_scale, save_scale
from ldm_jax.pipeline.model import LatentDiffusion, Params
from ldm_jax.pipeline.trainable import LoRA, TokenVectors, merge_trained, trainable_of
from ldm_jax.run_folder.checkpoint import Checkpoints, flatten, identity, unflatten
from ldm_jax.run_folder.log import read_metrics
from ldm_jax.run_folder.sharded import any_host
from ldm_jax.run_folder.snapshots import Snapshots
from ldm_jax.run_folder.store import SNAPSHOTS, checkpoint_steps, share
from ldm_jax.runtime.parallel import parallel_map
from ldm_jax.sampling import image_grids
from ldm_jax.training import clip_data, latents, text_embeddings
from ldm_jax.training.from_config import (
    autoencoder_terms,
    make_autoencoder_stage,
    make_classifier_stage,
    make_clip_stage,
    make_diffusion_stage,
)
from ldm_jax.training.loop import initial_state, train
from ldm_jax.training.preview import make_preview
from ldm_jax.training.run import Run, initial_model, latents_feed, make_feed
from ldm_jax.training.state import state_shapes
from ldm_jax.training.validation import make_validation

RECONSTRUCTED = 20  # test images in the previews of the autoencoder


def train_autoencoder(run: Run) -> None:
    """Trains stage 1, or reuses that of another run; writes autoencoder/."""
    config = run.config
    if config.autoencoder.checkpoint:
        _save_reused(run, "autoencoder", {"autoencoder": reused_autoencoder(config)})
        return
    stage, loss = make_autoencoder_stage(config), config.autoencoder.loss
    _train(
        run,
        "autoencoder",
        stage,
        feed=make_feed(run, run.train_set, config.autoencoder.batch_size),
        frozen={"lpips": load_lpips(loss.perceptual_net)[0]} if loss.perceptual else {},
        variant=partial(autoencoder_terms, config),
        preview=_preview_reconstructions(run),
    )


def _preview_reconstructions(run: Run) -> Callable[[int, Any], None]:
    """`preview(step, ema_params)` writes test images and their reconstructions to progress/."""
    n, first_stage = RECONSTRUCTED, build_first_stage(run.config)
    padded = -(-n // jax.local_device_count()) * jax.local_device_count()
    images = run.test_set[np.arange(padded) % n % len(run.test_set)]["x"]
    reconstruct = parallel_map(lambda params, batch: first_stage.reconstruct(params, batch["x"]))

    def preview(step: int, ema_params: Params) -> None:
        decoded = reconstruct(ema_params["autoencoder"], {"x": images})
        strip = image_grids.comparison({"original": images[:n], "decoded": decoded[:n]})
        image_grids.save_png(strip, run.workdir / "progress" / f"autoencoder_{step:06d}.png")

    return preview


def reused_autoencoder(config: ConfigDict) -> Params:
    """The parameters in the run folder config.autoencoder.checkpoint; raises InputError if they do not fit."""
    other = Path(config.autoencoder.checkpoint)
    if not other.is_dir():
        raise InputError(f"config.autoencoder.checkpoint={other} does not exist; it must be a run folder")
    groups, own = (each.autoencoder.norm_num_groups for each in (read_with_defaults(other / "config.json"), config))
    if groups != own:  # which the parameters' shapes do not show
        right = f"for config.autoencoder.checkpoint={other} it must be {groups}"
        raise InputError(f"config.autoencoder.norm_num_groups is {own}; {right}")
    like = state_shapes(make_autoencoder_stage(config)).ema_params["autoencoder"]
    return unflatten(flatten(load_autoencoder_params(other)), like, where=f"config.autoencoder.checkpoint={other}")


def note_unfinished(config: ConfigDict, stage: str) -> None:
    """Prints a note if the run whose autoencoder or CLIP is reused has not trained it for all its steps yet."""
    other = Path(config[stage].checkpoint)
    section, done = read_with_defaults(other / "config.json")[stage], max(checkpoint_steps(other / stage))
    if not section.checkpoint and done < section.steps:
        print(f"note: config.{stage}.checkpoint={other} is trained for {done:,} of {section.steps:,} steps so far")


def reused_scale(config: ConfigDict) -> tuple[np.ndarray, np.ndarray, str] | None:
    """(shift [c], scale [c], data set) of the reused autoencoder of a classifier; None = to be measured.

    The classifier needs exactly the latents that it will guide, and measuring on other devices may round differently.
    """
    other = config.autoencoder.checkpoint
    return load_scale(Path(other)) if other and "classifier" in config.stages else None


def measure_latents(run: Run) -> None:
    """Encodes the training images and measures their shift and scale; writes latents/ and autoencoder/scale.json."""
    first_stage, params = build_first_stage(run.config), {"first_stage": load_autoencoder_params(run.workdir)}
    cache = latents.cached_latents(run.config, run.workdir, first_stage, params, run.train_set)
    if reused := reused_scale(run.config):
        shift, scale, measured_on = reused
    else:
        measured_on = f"{run.train_set.name}/{run.train_set.split}"
        shift, scale = latents.measure_scale(cache, gaussian=first_stage.stochastic)
    if jax.process_index() == 0:
        save_scale(run.workdir, shift, scale, measured_on=measured_on)
    share(run.workdir, "scale", "autoencoder")
    print(f"     latents shift {np.round(shift, 3)}, scale {np.round(scale, 3)}", flush=True)


def train_clip(run: Run) -> None:
    """Trains CLIP on images and captions, or reuses that of another run; writes clip/."""
    config, vocabulary, primary = run.config, run.workdir / FOLDER / TOKENIZER, jax.process_index() == 0
    if config.clip.checkpoint:
        reused = clip_data.reused(config)
        if primary:
            clip_data.save_tokenizer(reused.tokenizer, vocabulary)
        _save_reused(run, "clip", reused.params)
        share(run.workdir, "clip", FOLDER)
        return
    if primary:
        clip_data.make_tokenizer(config, vocabulary, run.train_set)
    share(run.workdir, "tokenizer", FOLDER)
    tokenizer = clip_data.make_tokenizer(config, vocabulary, run.train_set)
    stage, batch_size = make_clip_stage(clip_of(config, tokenizer), config), config.clip.batch_size
    _train(
        run,
        "clip",
        stage,
        feed=make_feed(run, run.train_set, batch_size),
        frozen=clip_data.frozen_texts(tokenizer, run.train_set),
        validate=make_validation(stage, run.test_set, num=config.clip.validation_examples, batch_size=batch_size),
    )


def train_diffusion(run: Run) -> None:
    """Trains stage 2; writes diffusion/, sample grids in progress/ and, of LoRA or a token, a file for diffusers."""
    config, (model, params) = run.config, initial_model(run)
    trainable = trainable_of(config, model)
    trained_model, frozen = text_embeddings.freeze(
        model, params, trainable, run.train_set.captions, config, run.workdir / "latents"
    )
    if config.diffusion.objective == "consistency":
        frozen = frozen | {"teacher": jax.device_get(trainable.init(jax.random.key(config.seed), params))}
    stage, save_grid = make_diffusion_stage(trained_model, trainable, config), make_preview(run, model, params)
    state = _train(
        run,
        "diffusion",
        stage,
        params,
        feed=latents_feed(run, model, params, config.diffusion.batch_size),
        frozen=frozen,
        validate=_validation(run, stage, model),
        preview=lambda step, ema_params: save_grid(step, merge_trained(trainable, params, ema_params)),
        init_from=model.origin.fingerprint,
    )
    if not isinstance(trainable, LoRA | TokenVectors):
        return
    trained, token = run.engine.gather(state.ema_params), config.textual_inversion.token
    if isinstance(trainable, LoRA) and jax.process_index() == 0:
        lora.save_lora(run.workdir / lora.FILE, trained["lora"], trainable.scale, trained.get("lora_text", ()))
    if isinstance(trainable, TokenVectors) and jax.process_index() == 0:
        vectors = tuple(map(np.asarray, trained["token"]))
        textual_inversion.write_embedding(run.workdir / textual_inversion.FILE, Embedding(token, vectors))


def train_classifier(run: Run) -> None:
    """Trains a classifier of noisy latents; writes classifier/."""
    config, names = run.config, run.train_set.class_names
    model, params = from_config(config, names), load_first_stage(run.workdir, config)
    stage = make_classifier_stage(model, len(names), config)
    feed = latents_feed(run, model, params, config.classifier.batch_size)
    _train(run, "classifier", stage, feed=feed, frozen=params, validate=_validation(run, stage, model))


def _validation(run: Run, stage: Any, model: LatentDiffusion) -> Callable[[Any, dict, int], dict[str, float]]:
    num, batch_size = run.config.diffusion.validation_examples, run.config.evaluation.batch_size
    return make_validation(stage, run.test_set, num=num, batch_size=batch_size, T=len(model.process))


def _save_reused(run: Run, name: str, params: Params) -> None:
    """Writes the parameters of another run's model as the checkpoint of step 0 of stage `name`."""
    with Checkpoints(run.workdir / name, keep=1, identity=identity(run.config, name)) as checkpoints:
        checkpoints.save({"step": np.int32(0), "ema_params": params})


def _train(
    run: Run,
    name: str,
    stage: Any,
    *initial: Any,
    feed: Any,
    frozen: dict[str, Any],
    validate: Callable[[Any, dict, int], dict[str, float]] | None = None,
    preview: Callable[[int, Params], None] = lambda step, ema_params: None,
    init_from: str = "",
    **options: Any,
) -> Any:
    """Trains stage `name` to its last step, with periodic validation and preview; returns the state.

    Args:
      run, name, stage, feed, frozen, options: see `loop.train`.
      initial: the arguments of `stage.init` after its key.
      validate: (EMA parameters, frozen, seed) -> metrics.
      preview: (step, EMA parameters) writes images to progress/.
      init_from: the fingerprint of the pretrained model.
    """
    config, steps, every = run.config, run.config[name].steps, run.config.sampling.progress_every
    engine = run.engine

    def is_due(step: int) -> bool:
        return bool(every and step) and (step % every == 0 or step == steps)

    def validate_and_preview(step: int, state: Any) -> None:
        jax.block_until_ready(state)  # see `run_folder.sharded.checksums`
        ema_params = jax.block_until_ready(engine.gather(state.ema_params))
        if jax.process_index():
            return
        with run.log.clock.spend("validation"):
            preview(step, ema_params)
            if validate:
                run.log(name, step, **validate(ema_params, frozen, config.seed))

    def begin(state: Any) -> None:
        """Makes up for what a killed process left out after its last checkpoint."""
        step = int(state.step)
        if averages:
            averages.begin(state)
        if is_due(step) and any_host(jax.process_index() == 0 and not _is_validated(run, name, step, bool(validate))):
            validate_and_preview(step, state)

    def after_step(step: int, state: Any) -> None:
        if averages:
            with run.log.clock.spend("checkpoint"):
                averages.save(step, state)
        if is_due(step):
            validate_and_preview(step, state)

    pretrained = {"init_from": init_from} if init_from else {}
    recorded, *earlier = (identity(each, name) | pretrained for each in (config, *run.earlier))
    options |= {field: config[field] for field in ("seed", "log_every", "checkpoint_every")}
    options |= {"steps": steps, "feed": feed, "frozen": frozen, "engine": engine}
    options |= {"begin": begin, "after_step": after_step}
    folder, keep = run.workdir / name, config.keep_checkpoints
    always = [config.sampling.guide_step] if name == "diffusion" and config.sampling.guide_step else []
    with (
        Checkpoints(folder, keep=keep, identity=recorded, earlier=earlier, always=always) as checkpoints,
        _snapshots(run, name, recorded) as averages,
    ):
        state = initial_state(stage.init, config.seed, *initial, engine=engine)
        return train(name, stage, state, checkpoints=checkpoints, log=run.log, watch=run.watch, **options)


def _is_validated(run: Run, name: str, step: int, logged: bool) -> bool:
    """Whether a stage's preview after `step`, and then its validation, if that is `logged`, have been written."""
    if not logged:
        return (run.workdir / "progress" / f"{name}_{step:06d}.png").exists()
    lines = read_metrics(run.workdir / "metrics.jsonl")
    names = {key for line in lines if (line["stage"], line["step"]) == (name, step) for key in line}
    return any(key.startswith("validation_") for key in names)


def _snapshots(run: Run, name: str, identity: dict[str, str]) -> AbstractContextManager[Snapshots | None]:
    """The snapshots of a stage's power function averages; a context of None if it has none."""
    diffusion = run.config.diffusion
    if name != "diffusion" or not diffusion.ema_sigma_rels:
        return nullcontext()
    return Snapshots(run.workdir / SNAPSHOTS, every=diffusion.ema_snapshot_every, identity=identity)
