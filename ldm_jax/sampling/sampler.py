"""The sampler of a model: from noise to images, compiled, in batches over the devices."""

import math
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.diffusion import guidance
from ldm_jax.diffusion.denoiser import (
    ConditionalDenoiser,
    Denoiser,
    clip_z0,
    from_network,
    over_interval,
    paste_known,
    threshold_z0,
)
from ldm_jax.diffusion.guidance import PLAIN, Projection
from ldm_jax.diffusion.random import initial_latents, sample_keys
from ldm_jax.diffusion.solve import State, initial_state, solve, solve_rows
from ldm_jax.diffusion.tables import HISTORY, Table
from ldm_jax.models.classifier import NoisyClassifier
from ldm_jax.models.clip_vision import CLIP
from ldm_jax.models.conditioning import interpolate
from ldm_jax.models.pixels import to_uint8
from ldm_jax.pipeline.model import LatentDiffusion, Params, apply_denoiser, decode_latents, encode_images
from ldm_jax.runtime.parallel import map_in_batches, parallel_map

SNAPSHOTS = 24  # of the trajectory: the frames of denoising.gif
PREVIEWS = 12  # of each batch, for `watch`


class PerSample(NamedTuple):
    """Arrays [N, ...] of N samples: sample k depends on row k, the shared arrays and the seed alone."""

    index: np.ndarray  # int32: of each sample's noise, within the seed
    cond: Any  # rows of the conditioning's table
    guidance: np.ndarray  # float32: the scale of classifier-free guidance
    z_T: np.ndarray | None = None  # [N, h, w, c] float32 initial noise; None: from the seed
    concat: dict[str, np.ndarray] | None = None  # "concat" [N, h, w, k] and further arguments of the denoiser
    label: np.ndarray | None = None  # int32: class of classifier guidance; -1 = none
    classifier_scale: np.ndarray | None = None  # float32
    text_embeds: np.ndarray | None = None  # [N, D] float32: of CLIP guidance
    clip_guidance_scale: np.ndarray | None = None  # float32
    interpolate_to: Any = None  # rows of the table
    interpolate_weight: np.ndarray | None = None  # float32 from 0 (cond) to 1 (interpolate_to)


class Shared(NamedTuple):
    """Arrays shared by all samples."""

    null_cond: Any  # a row of the conditioning's table: the null condition, or a negative one
    interval: np.ndarray  # [2] float32: guidance is applied at t / T in it
    rescale: np.ndarray  # [] float32: see `classifier_free`
    threshold: np.ndarray  # [] float32: quantile of dynamic thresholding of pixels; 0: clipped at 1
    clip_sample_range: np.ndarray  # [] float32: z0_hat of latents is clipped to [-range, range]
    z0: np.ndarray  # [h, w, c] float32 clean latents of the known region
    mask: np.ndarray  # bool [h, w, 1]: True = sampled, False = known
    projection: Projection = PLAIN  # scalars: of adaptive projected guidance
    guide_null: np.ndarray = np.bool_(False)  # [] bool: null_cond is the condition of autoguidance's weaker model


class SampleInputs(NamedTuple):
    """The inputs of sampling: with the model and the solver's table, all that samples depend on."""

    samples: PerSample
    shared: Shared
    seed: int
    init_image: bool = False  # start from shared.z0 noised to the first level of the table, not from noise alone
    scaled_initial_noise: bool = False  # noise alone is multiplied by sigma of the first level

    def first(self, num: int) -> "SampleInputs":
        """The inputs of the first `num` samples."""
        return self._replace(samples=jax.tree.map(lambda rows: rows[:num], self.samples))


class Progress(NamedTuple):
    """The progress of sampling, for previews."""

    z0_hat: np.ndarray  # [b, h, w, c] clean latents that the last network call predicts, of this batch
    first: int  # number of samples before this batch
    fraction: float  # of this batch's rows


class Sampler(NamedTuple):
    """A compiled sampler of `batch_size` images at a time; solver, steps, guidance and seed are arguments.

    Attributes:
      latents: (params, inputs, table) -> iterator over batches, in order, of
        (z [b, h, w, c], z0_hat of the trajectory [b, SNAPSHOTS, h, w, c]).
      watched_latents: (params, inputs, table, watch) -> iterator over the same batches z [b, h, w, c]; `watch` is
        called with `Progress` PREVIEWS times a batch, and may stop the run by an exception.
      decode: (params, z [N, h, w, c]) -> images uint8 [N, H, W, C].
      encode: (params, images uint8 [N, H, W, C]) -> z [N, h, w, c], the mode of the posterior.
      concat: (params, degraded images) -> [N, h, w, k]: `ConcatConditioning.encode` for any N.
    """

    latents: Callable[[Any, SampleInputs, Table], Iterator[tuple[np.ndarray, np.ndarray]]]
    watched_latents: Callable[[Any, SampleInputs, Table, Callable[[Progress], None]], Iterator[np.ndarray]]
    decode: Callable[[Any, np.ndarray], np.ndarray]
    encode: Callable[[Any, np.ndarray], np.ndarray]
    concat: Callable[[Any, dict[str, np.ndarray]], np.ndarray]

    def images(self, params: Any, inputs: SampleInputs, table: Table) -> Iterator[np.ndarray]:
        """Yields batches of images, uint8 [batch_size or fewer, H, W, C], in order."""
        for z, _ in self.latents(params, inputs, table):
            yield self.decode(params, z)

    def trajectory(self, params: Any, inputs: SampleInputs, table: Table) -> np.ndarray:
        """The trajectory of sampling: z0_hat as images, uint8 [SNAPSHOTS, N, H, W, C]."""
        batches = [np.moveaxis(z0_hats, 1, 0) for _, z0_hats in self.latents(params, inputs, table)]
        return np.concatenate([np.stack([self.decode(params, z) for z in batch]) for batch in batches], axis=1)


def guided_denoiser(
    model: LatentDiffusion,
    params: Params,
    samples: PerSample,
    shared: Shared,
    classifier: NoisyClassifier | None = None,
    clip: CLIP | None = None,
    guide: LatentDiffusion | None = None,
    *,
    cfgpp: bool = False,
) -> Denoiser:
    """The denoiser of a model with all its guidance, for use inside a compiled call.

    `params` has "classifier", "clip" and "guide_model" of the guidance models. The first two go with
    `samples.classifier_scale` and `samples.clip_guidance_scale`; raises ValueError if only one of the two is there. The
    `guide` is the weaker model of autoguidance, instead of classifier-free guidance, with the condition of the samples
    or, with `shared.guide_null`, the null condition; `cfgpp` is CFG++ instead of both.
    """
    for name, module in (("classifier_scale", classifier), ("clip_guidance_scale", clip)):
        if (getattr(samples, name) is None) != (module is None):
            raise ValueError(f"{name} and the model that guides by it go together; one of the two is missing")
    interval, concat, scale = shared.interval * len(model.process), samples.concat or {}, samples.guidance
    if model.guidance_dim is not None:  # an input of the denoiser, which is called once
        concat, scale = concat | {"guidance": scale}, jnp.ones_like(scale)
    options = {"interval": interval, "rescale": shared.rescale, "prediction": model.prediction}
    options["projection"] = shared.projection
    denoise, cond = _conditional(model, params, samples, concat)
    if guide is None:
        null_cond = _null(model, params, shared, concat)
        if cfgpp:
            denoise = guidance.cfg_plus_plus(denoise, cond, null_cond, scale, interval=interval)
        else:
            denoise = guidance.classifier_free(denoise, cond, null_cond, scale, **options)
    else:
        weak, weak_cond = _conditional(guide, params["guide_model"], samples, concat)
        weak_null = _null(guide, params["guide_model"], shared, concat)
        weak_cond = jax.tree.map(partial(jnp.where, shared.guide_null), weak_null, weak_cond)
        denoise = guidance.autoguided(
            lambda z_t, level, denoise=denoise: denoise(z_t, level, cond),
            lambda z_t, level: weak(z_t, level, weak_cond),
            scale,
            **options,
        )
    if clip is not None:

        def similarity(z0: jax.Array) -> jax.Array:
            return clip_logits(clip, params["clip"], decode_latents(model, params, z0), samples.text_embeds)

        denoise = guidance.similarity_guided(denoise, similarity, samples.clip_guidance_scale, interval=interval)
    if classifier is not None:
        log_p = guidance.class_log_probabilities(classifier.apply, model.process)
        label = jnp.maximum(samples.label, 0)
        denoise = guidance.classifier_guided(
            denoise,
            lambda z_t, t: guidance.log_probability(log_p(params["classifier"], z_t, t), label),
            jnp.where(samples.label < 0, 0.0, samples.classifier_scale),
            interval=interval,
        )
    if model.mean_flow:  # over an interval z0_hat = z_t - t u is no estimate of the data
        return denoise
    if model.first_stage.module is None:
        return threshold_z0(denoise, shared.threshold)
    return clip_z0(denoise, shared.clip_sample_range)


def _conditional(
    model: LatentDiffusion, params: Params, samples: PerSample, concat: dict[str, Any]
) -> tuple[ConditionalDenoiser, dict[str, Any]]:
    """The denoiser of a model without guidance, and its condition of each sample."""
    encode = model.conditioning.encode
    cond = encode(params["conditioning"], samples.cond)
    if samples.interpolate_to is not None:
        other = encode(params["conditioning"], samples.interpolate_to)
        cond = interpolate(cond, other, samples.interpolate_weight)
    network = from_network(partial(apply_denoiser, model, params), model.prediction, model.process)
    return over_interval(network) if model.mean_flow else network, cond | concat


def _null(model: LatentDiffusion, params: Params, shared: Shared, concat: dict[str, Any]) -> dict[str, Any]:
    """The null condition, or a negative one, broadcastable to that of the samples."""
    return model.conditioning.encode(params["conditioning"], shared.null_cond) | concat


def clip_logits(clip: CLIP, params: Any, x: jax.Array, text_embeds: jax.Array) -> jax.Array:
    """CLIP's logits [B] of images x [B, H, W, C] in [-1, 1] with text embeddings [B, D] (Radford 2021, section 2.3)."""
    resized = jax.image.resize(x, (len(x), *(clip.image.image_size,) * 2, x.shape[-1]), "linear")
    image = clip.apply({"params": params}, resized, method="embed_image")
    return jnp.exp(params["logit_scale"]) * jnp.sum(image * text_embeds, axis=-1)


@lru_cache(maxsize=16)
def make_sampler(
    model: LatentDiffusion,
    batch_size: int,
    classifier: NoisyClassifier | None = None,
    clip: CLIP | None = None,
    guide: LatentDiffusion | None = None,
    cfgpp: bool = False,
) -> Sampler:
    """The sampler of a model, for replicated parameters (see `runtime.parallel.replicate`); equal models share it.

    `batch_size` is a multiple of the local devices. The other arguments: see `guided_denoiser`.
    """
    shape = model.latent_shape

    def problem(params: Any, samples: PerSample, seed: jax.Array, shared: Shared) -> tuple[Denoiser, jax.Array, dict]:
        denoise = guided_denoiser(model, params, samples, shared, classifier, clip, guide, cfgpp=cfgpp)
        return denoise, sample_keys(seed, samples.index), {"project": paste_known(shared.z0, shared.mask)}

    def solve_batch(params: Any, samples: PerSample, table: Table, seed: jax.Array, shared: Shared) -> tuple:
        denoise, keys, project = problem(params, samples, seed, shared)
        z, trajectory = solve(denoise, samples.z_T, table, keys, **project, snapshots=SNAPSHOTS)
        return z, jnp.moveaxis(trajectory.z0_hat, 0, 1)

    def solve_part(params: Any, batch: tuple, table: Table, seed: jax.Array, shared: Shared, rows: jax.Array) -> tuple:
        samples, z, *old = batch  # old: the state's old_z and old_z0 as [B, HISTORY, ...]
        denoise, keys, project = problem(params, samples, seed, shared)
        state = State(z, *(jnp.moveaxis(each, 1, 0) for each in old), initial_state(z).kept)
        state = solve_rows(denoise, state, table, keys, rows[0], rows[1], **project)
        return state.z, *(jnp.moveaxis(each, 0, 1) for each in (state.old_z, state.old_z0))

    compiled_solve, compiled_part = parallel_map(solve_batch), parallel_map(solve_part)
    initial = jax.jit(lambda seed, index: initial_latents(sample_keys(seed, index), shape))

    def batches(inputs: SampleInputs, table: Table) -> Iterator[tuple[int, PerSample]]:
        samples, seed = inputs.samples, np.uint32(inputs.seed)
        n = len(samples.index)
        for start in range(0, n, batch_size):
            rows = np.minimum(np.arange(start, start + batch_size), n - 1)
            batch = jax.tree.map(lambda values, rows=rows: values[rows], samples)
            z_T = np.asarray(initial(seed, batch.index) if batch.z_T is None else batch.z_T)
            if inputs.init_image:
                z_T = table.alpha[0] * inputs.shared.z0 + table.sigma[0] * z_T
            elif inputs.scaled_initial_noise:
                z_T = float(table.sigma[0]) * z_T
            yield start, batch._replace(z_T=np.asarray(z_T, np.float32))

    def latents(params: Any, inputs: SampleInputs, table: Table) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for start, batch in batches(inputs, table):
            z, z0_hats = compiled_solve(params, batch, table, np.uint32(inputs.seed), inputs.shared)
            n = len(inputs.samples.index) - start
            yield z[:n], z0_hats[:n]

    def watched_latents(
        params: Any, inputs: SampleInputs, table: Table, watch: Callable[[Progress], None]
    ) -> Iterator[np.ndarray]:
        for start, batch in batches(inputs, table):
            n, z = len(inputs.samples.index) - start, batch.z_T
            old = np.zeros((2, len(z), HISTORY, *shape), np.float32)
            state = (z, *old)
            ends = np.unique(np.linspace(0, int(table.rows), PREVIEWS + 1).round().astype(np.int32))
            for rows in pairwise(ends):
                part = (table, np.uint32(inputs.seed), inputs.shared, np.array(rows))
                state = compiled_part(params, (batch, *state), *part)
                watch(Progress(state[2][:n, 0], start, float(rows[1] / table.rows)))
            yield state[0][:n]

    def in_batches(function: Callable) -> Callable:
        return partial(map_in_batches, parallel_map(function), batch_size=batch_size)

    return Sampler(
        latents,
        watched_latents,
        decode=in_batches(lambda params, z: to_uint8(decode_latents(model, params, z))),
        encode=in_batches(lambda params, images: encode_images(model, params, images)),
        concat=in_batches(lambda params, degraded: model.concat.encode(model.first_stage, params, degraded, shape[:2])),
    )


def smallest_batch(num: int, batch_size: int, devices: int) -> int:
    """The batch to compile for `num` samples, a multiple of the devices: `batch_size` rounded down, or fewer."""
    return min(max(batch_size // devices, 1), math.ceil(num / devices)) * devices
