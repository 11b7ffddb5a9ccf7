"""The variational lower bound (VLB) on log p(z0) of held-out images, in bits per dimension, by ranges of timesteps.

The VLB is the prior term plus one term for each of T timesteps (Ho 2020, eq. 5). Instead of all T, each image is
evaluated at one timestep of each range, uniform over it; times the range's width that is an unbiased estimate of
the sum over it. The terms fall by decades from t = 0 on, so the ranges double: {0}, {1}, {2, 3}, {4 ... 7} ...
"""

from collections.abc import Callable
from dataclasses import asdict
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.diffusion.denoiser import Estimate, clip_z0, from_network
from ldm_jax.diffusion.forward import noise_level, q_sample
from ldm_jax.diffusion.likelihood import prior_kl, vlb_term
from ldm_jax.diffusion.random import Stream, example_keys
from ldm_jax.evaluation.cards import Card, Cards, reference_fields
from ldm_jax.models.concat_conditioning import concat_arguments
from ldm_jax.models.first_stage import to_latents
from ldm_jax.models.pixels import to_pixels
from ldm_jax.pipeline.model import LatentDiffusion, Params, apply_denoiser
from ldm_jax.runtime.parallel import map_in_batches, parallel_map


class BitsPerDim(NamedTuple):
    """The VLB in bits per dimension; `std` is the standard error of the mean over images."""

    total: float
    std: float | None  # None for a single image
    prior: float
    first: list[int]  # the first timestep of each range
    ranges: list[float]  # the sum of the terms in each range
    terms: list[float | None]  # [T] the term of each timestep; None where no image was evaluated


def range_edges(T: int) -> np.ndarray:
    """0, 1, 2, 4, 8 ... T: range j of timesteps is edges[j] ... edges[j + 1] - 1."""
    return np.array([0, *(2**k for k in range((T - 1).bit_length())), T])


def stratified_timesteps(n: int, T: int, seed: int) -> np.ndarray:
    """[n, ranges] int32, one timestep of each range for each of n images.

    Each is uniform over its range; together, the images cover the range as evenly as n allows.
    """
    edges, rng = range_edges(T), np.random.default_rng(seed)
    width = np.diff(edges)
    place = np.stack([(rng.permutation(n) + rng.random()) / n for _ in width], axis=1)  # in [0, 1)
    return (edges[:-1] + np.minimum(place * width, width - 1e-6)).astype(np.int32)


@lru_cache(maxsize=4)
def make_vlb(model: LatentDiffusion, batch_size: int) -> Callable[[Params, dict[str, Any], int], BitsPerDim]:
    """Makes `measure(params, examples, seed)` -> BitsPerDim, the VLB under a model with replicated parameters.

    `examples` hold `x` uint8 [N, H, W, C], `cond` [N, ...] rows of the conditioning's table, and the arrays that
    `concat.degrade` needs. z0_hat of pixels is clipped to [-1, 1]. The reverse variance is the learned one if the
    model has it, else fixed_large.
    """
    T, latents = len(model.process), model.first_stage.module is not None

    def denoiser_of(params: Params, batch: dict[str, Any], keys: jax.Array) -> Callable:
        cond = model.conditioning.encode(params.get("conditioning"), batch["cond"])
        if model.concat:
            size, keys = model.latent_shape[:2], _fold(keys, T + 1)
            cond |= concat_arguments(model.concat, model.first_stage, params, batch, keys, size)
        denoise = from_network(partial(apply_denoiser, model, params), model.prediction, model.process)
        return clip_z0(lambda z_t, level: denoise(z_t, level, cond), np.inf if latents else 1.0)

    def bits(params: Params, batch: dict[str, Any], seed: jax.Array) -> jax.Array:
        """[B, 1 + ranges]: the prior term, and the terms at the timesteps `t` [B, ranges]."""
        keys = example_keys(seed, Stream.LIKELIHOOD, 0, batch["id"])
        moments = model.first_stage.encode(params["first_stage"], to_pixels(batch["x"]))
        raw = model.first_stage.sample(moments, _fold(keys, T))
        z0 = to_latents(raw, params["shift"], params["scale"])
        denoise = denoiser_of(params, batch, keys)

        def term(t: jax.Array) -> jax.Array:
            eps = jax.vmap(lambda key: jax.random.normal(key, z0.shape[1:]))(jax.vmap(jax.random.fold_in)(keys, t))
            z_t = q_sample(z0, t, eps, model.process)
            estimate, options = denoise(z_t, noise_level(t, model.process)), {"variance": "fixed_large"}
            if isinstance(estimate, Estimate):
                estimate, options = estimate.z0, {"variance": "learned", "var_frac": estimate.var_frac}
            return vlb_term(z0, z_t, estimate, t, model.process, num_bins=model.num_bins, **options)

        return jnp.concatenate([prior_kl(z0, model.process)[:, None], jax.lax.map(term, batch["t"].T).T], axis=1)

    compiled = parallel_map(bits)

    def measure(params: Params, examples: dict[str, Any], seed: int) -> BitsPerDim:
        n = len(examples["x"])
        t = stratified_timesteps(n, T, seed)
        batch = examples | {"id": np.arange(n, dtype=np.int32), "t": t}
        terms = map_in_batches(lambda *inputs: compiled(*inputs, np.uint32(seed)), params, batch, batch_size)
        return _summary(terms[:, 0].astype(np.float64), terms[:, 1:].astype(np.float64), t, T)

    return measure


def _fold(keys: jax.Array, data: int) -> jax.Array:
    return jax.vmap(jax.random.fold_in, (0, None))(keys, data)


def _summary(prior: np.ndarray, terms: np.ndarray, t: np.ndarray, T: int) -> BitsPerDim:
    edges = range_edges(T)
    summed = terms * np.diff(edges)  # [N, ranges]
    totals = prior + summed.sum(1)
    count = np.bincount(t.ravel(), minlength=T)
    by_timestep = np.bincount(t.ravel(), terms.ravel(), minlength=T) / np.maximum(count, 1)
    return BitsPerDim(
        total=float(totals.mean()),
        std=float(totals.std(ddof=1) / np.sqrt(len(totals))) if len(totals) > 1 else None,
        prior=float(prior.mean()),
        first=edges[:-1].tolist(),
        ranges=summed.mean(0).tolist(),
        terms=[float(term) if n else None for term, n in zip(by_timestep, count)],
    )


def vlb_card(model: LatentDiffusion, vlb: BitsPerDim, images: np.ndarray, *, split: str, condition: str) -> Cards:
    """{name: card} of the VLB of `images` uint8 [N, H, W, C] of a split.

    `condition` is "class", "caption", or "" for an unconditional model. On latents, which are continuous, the VLB is
    of a density: its bits may be negative, and cannot be compared with bits/dim of pixels.
    """
    latents = model.first_stage.module is not None
    score = "bits/dim (latents)" if latents else "bits/dim"
    what = "the density of the scaled latents, Gaussian decoder" if latents else "the probability of the 8-bit pixels"
    given = f", given the {condition}" if condition else ""
    variance = "learned" if model.learned_variance else "fixed_large"
    timesteps = f"{len(vlb.terms)} timesteps in {len(vlb.first)} ranges, one of each for an image"
    method = f"variational bound on {what}{given}; {variance} variance; {timesteps}"
    scores = {"score": score, "value": vlb.total, "std": vlb.std, "better": "lower", "n": len(images)}
    return {score: asdict(Card(**scores, method=method, **reference_fields(split, images)))}
