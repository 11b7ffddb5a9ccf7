"""The arguments of each stage's training step as shapes, before anything is trained, encoded or loaded.

Steps that are compiled for them are those that training runs, so that nothing compiles twice.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np

from ldm_jax.interop.lpips_weights import load_lpips
from ldm_jax.models.conditioning import EncodedConditioning, TextConditioning
from ldm_jax.pipeline.clip import clip_of
from ldm_jax.pipeline.from_config import identity_scale
from ldm_jax.pipeline.from_run import on_paper
from ldm_jax.pipeline.model import LatentDiffusion, Params
from ldm_jax.pipeline.trainable import Trainable, trainable_of
from ldm_jax.runtime.engine import Engine
from ldm_jax.training.contrastive import caption_arrays
from ldm_jax.training.from_config import (
    autoencoder_terms,
    make_autoencoder_stage,
    make_classifier_stage,
    make_clip_stage,
    make_diffusion_stage,
)
from ldm_jax.training.latents import Latents
from ldm_jax.training.run import Run, fits_on_device
from ldm_jax.training.state import state_shapes
from ldm_jax.training.text_embeddings import index_captions


class StageInputs(NamedTuple):
    """A stage, and what its step is called with; arrays may be shapes."""

    name: str
    stage: Any
    arguments: tuple[Any, ...]  # of `stage.init` after its key
    frozen: Params
    source: Any  # of the feed: a data set or cached latents

    def state(self) -> Any:
        """The shapes of the state."""
        if not self.arguments:
            return state_shapes(self.stage)
        return jax.eval_shape(self.stage.init, jax.random.key(0), *self.arguments)

    def variant(self, run: Run) -> dict[str, bool]:
        """The static arguments of the last step, which has all terms of the loss."""
        return autoencoder_terms(run.config, run.config[self.name].steps - 1) if self.name == "autoencoder" else {}

    def step_shapes(self, run: Run, engine: Engine, hosts: int) -> tuple[Any, ...]:
        """The arguments of the engine's step as shapes, on one of `hosts`."""
        rows = run.config[self.name].batch_size // hosts
        batch, resident = {"id": jax.ShapeDtypeStruct((rows,), np.int32)}, {}
        if fits_on_device(run, self.source) and not run.config.data.bucket_step:
            resident, batch["index"] = self.source.arrays, batch["id"]
        else:
            row = self.source[np.zeros(1, np.int64)]
            batch |= {name: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype) for name, x in row.items()}
        return engine.shapes(self.state(), self.frozen, resident, batch)


def stage_inputs(run: Run) -> Iterator[StageInputs]:
    """The stages that a run trains, in order."""
    config, train_set = run.config, run.train_set
    if "autoencoder" in config.stages and config.autoencoder.type != "none" and not config.autoencoder.checkpoint:
        loss = config.autoencoder.loss
        frozen = {"lpips": load_lpips(loss.perceptual_net)[0]} if loss.perceptual else {}
        yield StageInputs("autoencoder", make_autoencoder_stage(config), (), frozen, train_set)
    if "clip" in config.stages and not config.clip.checkpoint:
        captions, most = train_set.captions, max(map(len, train_set.captions))
        texts = {"texts": caption_arrays(np.zeros((len(captions), most, config.clip.max_length), np.int32))}
        yield StageInputs("clip", make_clip_stage(clip_of(config), config), (), texts, train_set)
    if {"diffusion", "classifier"} & set(config.stages):
        yield from _latent_stages(run)


def _latent_stages(run: Run) -> Iterator[StageInputs]:
    config, names = run.config, run.train_set.class_names
    model, params = run.base or on_paper(config, names)
    params = jax.eval_shape(lambda tree: tree, params)
    if not run.base:
        params |= {"first_stage": {}, **identity_scale(model.latent_shape[-1])}
        if model.first_stage.module is not None:
            params["first_stage"] = _autoencoder_shapes(run)
    encodes = model.first_stage.module is not None and model.concat is None
    source = _latents(run, model) if encodes else run.train_set
    if "diffusion" in config.stages:
        trainable = trainable_of(config, model)
        trained_model, frozen = _freeze(run, model, params, trainable)
        if config.diffusion.objective == "consistency":
            frozen["teacher"] = jax.eval_shape(trainable.init, jax.random.key(0), params)
        stage = make_diffusion_stage(trained_model, trainable, config)
        yield StageInputs("diffusion", stage, (params,), frozen, source)
    if "classifier" in config.stages:
        frozen = {name: params[name] for name in ("first_stage", "shift", "scale")}
        yield StageInputs("classifier", make_classifier_stage(model, len(names), config), (), frozen, source)


def _autoencoder_shapes(run: Run) -> Params:
    """The shapes of the parameters of the autoencoder that the run trains."""
    return state_shapes(make_autoencoder_stage(run.config)).params["autoencoder"]


def _freeze(
    run: Run, model: LatentDiffusion, params: Params, trainable: Trainable
) -> tuple[LatentDiffusion, dict[str, Any]]:
    """As `text_embeddings.freeze`, with shapes."""
    frozen, conditioning = trainable.frozen(params), model.conditioning
    if not isinstance(conditioning, TextConditioning):
        return model, frozen | {"table": conditioning.table()}
    texts, rows = index_captions(run.train_set.captions)
    table = _token_shapes(run, model, texts[:1])
    if not trainable.trains("conditioning"):
        table = jax.eval_shape(conditioning.encode, params["conditioning"], table)
        table = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, np.float32), table)
        frozen = {name: tree for name, tree in frozen.items() if name != "conditioning"}
        model = replace(model, conditioning=EncodedConditioning())
    table = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((len(texts) + 1, *leaf.shape[1:]), leaf.dtype), table)
    return model, frozen | {"table": table} | ({"captions": rows} if rows.shape[1] > 1 else {})


def _token_shapes(run: Run, model: LatentDiffusion, texts: tuple[str, ...]) -> Any:
    """The table of one text and the null condition; of a run's CLIP the vocabulary may not exist yet."""
    if run.base:
        return model.conditioning.table(texts, None, model.image_shape[:2])[0]
    ids = [np.zeros((2, run.config.clip.max_length), np.int32)]
    return {"ids": ids, "zeros": np.zeros(2, bool), "time_ids": np.zeros((2, 6), np.float32)}


def _latents(run: Run, model: LatentDiffusion) -> Latents:
    """Latents of the shapes of the cached ones, which take no memory."""
    num, size = len(run.train_set), run.config.data.image_size // model.first_stage.downsampling
    channels = (1 + model.first_stage.stochastic) * model.latent_shape[-1]
    shapes = {"moments": ((num, 1 + run.config.data.flip, size, size, channels), np.float32)}
    if run.train_set.class_names:
        shapes["label"] = ((num,), np.int32)
    return Latents({name: np.broadcast_to(np.zeros((), dtype), shape) for name, (shape, dtype) in shapes.items()})
