"""The duration of a run's training, estimated before it starts from a few compiled steps of each stage.

The compiled steps are those that training runs, so that nothing compiles twice; the measured steps have parameters of
zeros and change nothing.
"""

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np

from ldm_jax.interop.lpips_weights import load_lpips
from ldm_jax.models.conditioning import EncodedConditioning, TextConditioning
from ldm_jax.pipeline.clip import clip_of
from ldm_jax.pipeline.from_config import build_first_stage, identity_scale
from ldm_jax.pipeline.from_run import on_paper
from ldm_jax.pipeline.model import Params
from ldm_jax.pipeline.trainable import trainable_of
from ldm_jax.run_folder.layout import checkpoint_steps
from ldm_jax.training.contrastive import caption_arrays
from ldm_jax.training.from_config import (
    autoencoder_terms,
    make_autoencoder_stage,
    make_classifier_stage,
    make_clip_stage,
    make_diffusion_stage,
)
from ldm_jax.training.latents import Latents
from ldm_jax.training.run import Run, make_feed
from ldm_jax.training.text_embeddings import index_captions

FEW = 500  # steps: a shorter training is not worth measuring
MEASURED = 4  # steps


class Measured(NamedTuple):
    """A stage to measure: its step's arguments."""

    stage: Any
    arguments: tuple[Any, ...]  # of `stage.init` after its key
    frozen: Params
    source: Any  # of the feed


def print_estimate(run: Run) -> None:
    """Prints how long the stages of a run will train that are not trained yet; nothing for few steps or init_from."""
    made = {name: max(checkpoint_steps(run.workdir / name), default=0) for name in run.config.stages}
    left = {name: max(0, run.config[name].steps - made[name]) for name in made}
    if run.config.init_from or sum(left.values()) < FEW:
        return
    seconds = {name: _seconds(run, name, to_measure, made[name]) for name, to_measure in _stages(run) if left[name]}
    parts = ", ".join(f"{name} {_duration(value)}" for name, value in seconds.items())
    if jax.process_index() == 0 and seconds:
        print(f"Training takes about {_duration(sum(seconds.values()))} ({parts}), by {MEASURED} steps of each stage; "
              "then come samples and scores", flush=True)  # fmt: skip


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _seconds(run: Run, name: str, measured: Measured, done: int) -> float:
    """The duration of the steps of a stage that are left."""
    config, steps = run.config, run.config[name].steps
    if name != "autoencoder":
        return (steps - done) * _seconds_per_step(run, name, measured)
    parts = Counter(tuple(autoencoder_terms(config, step).items()) for step in range(done, steps))
    return sum(n * _seconds_per_step(run, name, measured, **dict(terms)) for terms, n in parts.items())


def _seconds_per_step(run: Run, name: str, measured: Measured, **variant: bool) -> float:
    """The duration of a step, by MEASURED of them after one that compiles."""
    (stage, arguments, frozen, source), engine = measured, run.engine
    feed, step = make_feed(run, source, run.config[name].batch_size), engine.step(stage, **variant)
    state = engine.place_params(_zeros(jax.eval_shape(stage.init, jax.random.key(0), *arguments)))
    frozen, resident, seed = engine.place_params(frozen), engine.place(feed.resident), np.uint32(run.config.seed)
    state, metrics = step(state, frozen, resident, engine.shard_batch(feed(0)), np.int32(0), seed)
    jax.block_until_ready((state, metrics))
    start = time.monotonic()
    for index in range(MEASURED):
        state, metrics = step(state, frozen, resident, engine.shard_batch(feed(index)), np.int32(index), seed)
    jax.block_until_ready((state, metrics))
    return (time.monotonic() - start) / MEASURED


def _stages(run: Run) -> Iterator[tuple[str, Measured]]:
    """The stages that a run trains, with arguments of the shapes that they will have."""
    config, train_set = run.config, run.train_set
    if "autoencoder" in config.stages and config.autoencoder.type != "none" and not config.autoencoder.checkpoint:
        loss = config.autoencoder.loss
        frozen = {"lpips": load_lpips(loss.perceptual_net)[0]} if loss.perceptual else {}
        yield "autoencoder", Measured(make_autoencoder_stage(config), (), frozen, train_set)
    if "clip" in config.stages and not config.clip.checkpoint:
        captions, most = train_set.captions, max(map(len, train_set.captions))
        texts = {"texts": caption_arrays(np.zeros((len(captions), most, config.clip.max_length), np.int32))}
        yield "clip", Measured(make_clip_stage(clip_of(config), config), (), texts, train_set)
    if {"diffusion", "classifier"} & set(config.stages):
        yield from _latent_stages(run)


def _latent_stages(run: Run) -> Iterator[tuple[str, Measured]]:
    config, names = run.config, run.train_set.class_names
    model, params = on_paper(config, names)
    params = _zeros(params) | {"first_stage": {}, **identity_scale(model.latent_shape[-1])}
    if model.first_stage.module is not None:
        state = jax.eval_shape(make_autoencoder_stage(config).init, jax.random.key(0))
        params["first_stage"] = _zeros(state.params["autoencoder"])
    source = _latents(run) if model.first_stage.module is not None and model.concat is None else run.train_set
    if "diffusion" in config.stages:
        trainable, trained_model = trainable_of(config, model), model
        frozen = trainable.frozen(params)
        if not isinstance(model.conditioning, TextConditioning):
            frozen["table"] = model.conditioning.table()
        elif not trainable.trains("conditioning"):
            texts, rows = index_captions(run.train_set.captions)
            shape = (len(texts) + 1, config.clip.max_length, config.clip.text_width)
            frozen = {name: tree for name, tree in frozen.items() if name != "conditioning"}
            frozen |= {"table": {"context": np.zeros(shape, np.float32)}}
            frozen |= {"captions": rows} if rows.shape[1] > 1 else {}
            trained_model = replace(model, conditioning=EncodedConditioning())
        if "table" in frozen:
            yield (
                "diffusion",
                Measured(make_diffusion_stage(trained_model, trainable, config), (params,), frozen, source),
            )
    if "classifier" in config.stages:
        frozen = {name: params[name] for name in ("first_stage", "shift", "scale")}
        yield "classifier", Measured(make_classifier_stage(model, len(names), config), (), frozen, source)


def _latents(run: Run) -> Latents:
    """Latents of zeros, of the shapes of the cached ones."""
    first_stage, num = build_first_stage(run.config), len(run.train_set)
    size, channels = run.config.data.image_size // first_stage.downsampling, run.config.autoencoder.latent_channels
    shape = (num, 1 + run.config.data.flip, size, size, (1 + first_stage.stochastic) * channels)
    labels = {"label": np.zeros(num, np.int32)} if run.train_set.class_names else {}
    return Latents({"moments": np.zeros(shape, np.float32)} | labels)


def _zeros(shapes: Any) -> Any:
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
