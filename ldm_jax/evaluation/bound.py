"""The variational bound on -log p(z0), in bits per dimension, of held-out images, by ranges of timesteps.

The bound is the prior term plus one term for each of T timesteps (Ho 2020, eq. 5). Instead of all T, each image is
measured at one timestep of each range, drawn evenly from it; times the range's width that is an unbiased estimate of
the sum over it. The terms fall by decades from t = 0 on, so the ranges double: {0}, {1}, {2, 3}, {4 ... 7} ...
"""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from ldm_jax.diffusion.denoiser import Estimate, clip_z0, from_network
from ldm_jax.diffusion.forward import noise_level, q_sample
from ldm_jax.diffusion.likelihood import prior_kl, vlb_term
from ldm_jax.diffusion.process import Process
from ldm_jax.diffusion.random import Stream, example_keys
from ldm_jax.evaluation.cards import Card
from ldm_jax.evaluation.features import fingerprint
from ldm_jax.models.concat_conditioning import MapCondition
from ldm_jax.models.first_stage import FirstStage, to_latents
from ldm_jax.models.pixels import to_pixels
from ldm_jax.runtime.parallel import map_in_batches, parallel_map


class Bound(NamedTuple):
    """Bits per dimension; `std` are standard errors of the mean over images."""

    total: float
    std: float | None  # None of a single image
    prior: float
    first: list[int]  # the first timestep of each range
    ranges: list[float]  # the sum of the terms in each
    terms: list[float | None]  # [T] each timestep's own; None where no image was measured


def range_edges(T: int) -> np.ndarray:
    """0, 1, 2, 4, 8 ... T: range j is edges[j] ... edges[j + 1] - 1."""
    return np.array([0, *(2**k for k in range((T - 1).bit_length())), T])


def stratified_timesteps(n: int, T: int, seed: int) -> np.ndarray:
    """[n, ranges] int32, one timestep of each range for each of n images.

    By itself each is uniform over its range; all images together go through the range as evenly as n allows.
    """
    edges, rng = range_edges(T), np.random.default_rng(seed)
    width = np.diff(edges)
    place = np.stack([(rng.permutation(n) + rng.random()) / n for _ in width], axis=1)  # in [0, 1)
    return (edges[:-1] + np.minimum(place * width, width - 1e-6)).astype(np.int32)


def make_bound(
    *,
    unet: nn.Module,
    conditioner: nn.Module,
    first_stage: FirstStage,
    process: Process,
    prediction: str,
    clip: float,
    levels: int | None,
    batch_size: int,
    map_condition: MapCondition | None = None,
) -> Callable[[Any, dict[str, np.ndarray], int], Bound]:
    """`measure(params, examples, seed)` -> Bound, for replicated `params` as `generate.make_generator` takes them.

    `examples` holds `x` uint8 [N, H, W, C], in labelled sets `label` [N], and what `map_condition` needs. z0_hat stays
    within [-clip, clip]; `levels` is that of `likelihood.vlb_term`. The variance is the learned one if the UNet has
    it, else fixed_large.
    """
    T = len(process)

    def bits(params: Any, batch: dict[str, jax.Array], seed: jax.Array) -> jax.Array:
        """[B, 1 + ranges]: the prior term, and the terms at the timesteps `t` [B, ranges]."""
        keys = example_keys(seed, Stream.LIKELIHOOD, 0, batch["id"])
        moments = first_stage.encode(params["autoencoder"], to_pixels(batch["x"]))
        z0 = to_latents(first_stage.draw(moments, _fold(keys, T)), params["shift"], params["scale"])
        context = conditioner.apply({"params": params["conditioner"]}, batch["label"])
        beside = jnp.zeros((*z0.shape[:-1], 0))
        if map_condition:
            beside = map_condition.to_map(params, map_condition.know(batch, _fold(keys, T + 1)))

        def network(z_t: jax.Array, t: jax.Array, context: jax.Array) -> jax.Array:
            return unet.apply({"params": params["unet"]}, jnp.concatenate([z_t, beside], axis=-1), t, context)

        from_unet = from_network(network, prediction, process)
        denoise = clip_z0(lambda z_t, level: from_unet(z_t, level, context), clip)

        def terms(t: jax.Array) -> jax.Array:
            eps = jax.vmap(lambda key: jax.random.normal(key, z0.shape[1:]))(jax.vmap(jax.random.fold_in)(keys, t))
            z_t = q_sample(z0, t, eps, process)
            said = denoise(z_t, noise_level(t, process))
            if isinstance(said, Estimate):
                options = {"variance": "learned", "var_frac": said.var_frac}
                return vlb_term(z0, z_t, said.z0, t, process, num_bins=levels, **options)
            return vlb_term(z0, z_t, said, t, process, num_bins=levels, variance="fixed_large")

        return jnp.concatenate([prior_kl(z0, process)[:, None], jax.lax.map(terms, batch["t"].T).T], axis=1)

    compiled = parallel_map(bits)

    def measure(params: Any, examples: dict[str, np.ndarray], seed: int) -> Bound:
        n = len(examples["x"])
        t = stratified_timesteps(n, T, seed)
        label = {"label": np.full(n, conditioner.null, np.int32)}
        batch = label | examples | {"id": np.arange(n, dtype=np.int32), "t": t}
        found = map_in_batches(lambda *inputs: compiled(*inputs, np.uint32(seed)), params, batch, batch_size)
        return _summary(found[:, 0].astype(np.float64), found[:, 1:].astype(np.float64), t, T)

    return measure


def _fold(keys: jax.Array, name: int) -> jax.Array:
    return jax.vmap(jax.random.fold_in, (0, None))(keys, name)


def _summary(prior: np.ndarray, terms: np.ndarray, t: np.ndarray, T: int) -> Bound:
    edges = range_edges(T)
    summed = terms * np.diff(edges)  # [N, ranges]
    totals = prior + summed.sum(1)
    count = np.bincount(t.ravel(), minlength=T)
    by_timestep = np.bincount(t.ravel(), terms.ravel(), minlength=T) / np.maximum(count, 1)
    return Bound(
        total=float(totals.mean()),
        std=float(totals.std(ddof=1) / np.sqrt(len(totals))) if len(totals) > 1 else None,
        prior=float(prior.mean()),
        first=edges[:-1].tolist(),
        ranges=summed.mean(0).tolist(),
        terms=[float(term) if seen else None for term, seen in zip(by_timestep, count)],
    )


def bound_card(
    bound: Bound, images: np.ndarray, *, split: str, latents: bool, labelled: bool, learned: bool
) -> dict[str, dict[str, Any]]:
    """{name: card} of a bound measured on `images` uint8 [N, H, W, C], which says what it is a bound of.

    Latents are continuous, so theirs is a density, whose bits may be negative, and not to be compared with bits/dim of
    pixels.
    """
    what = "the density of the scaled latents, Gaussian decoder" if latents else "the probability of the 8-bit pixels"
    score = "bits/dim (latents)" if latents else "bits/dim"
    card = Card(
        score=score,
        value=bound.total,
        better="lower",
        n=len(images),
        reference=split,
        reference_n=len(images),
        reference_sha256=fingerprint(images),
        method=f"variational bound on {what}{', given the class' if labelled else ''}; "
        f"{'learned' if learned else 'fixed_large'} variance; {len(bound.terms)} timesteps in {len(bound.first)} "
        "ranges, one of each for an image",
        std=bound.std,
    )
    return {score: asdict(card)}
