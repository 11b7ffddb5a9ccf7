"""From noise to pictures: the trained parts put together as one compiled call, and run in batches over the devices."""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict

from ldm_jax.diffusion.denoiser import clip_z0, from_network, paste_known, threshold_z0
from ldm_jax.diffusion.guidance import (
    ClassLogProbabilities,
    classifier_free,
    classifier_guided,
    log_probability,
    similarity_guided,
)
from ldm_jax.diffusion.process import Process
from ldm_jax.diffusion.random import initial_latents, sample_keys
from ldm_jax.diffusion.solve import solve
from ldm_jax.diffusion.tables import Table
from ldm_jax.errors import InputError
from ldm_jax.models.concat_conditioning import MapCondition
from ldm_jax.models.conditioning import make_class_tau, make_tau
from ldm_jax.models.first_stage import FirstStage, from_latents, make_first_stage, to_latents
from ldm_jax.models.pixels import to_pixels, to_uint8
from ldm_jax.models.tiled_autoencoder import tiled
from ldm_jax.pipeline import from_config as pipeline_from_config
from ldm_jax.pipeline import model as pipeline_model
from ldm_jax.pipeline.model import Pretrained, Trained
from ldm_jax.runtime.parallel import map_in_batches, parallel_map
from ldm_jax.sampling.guidance_models import NO_GUIDES, Guides, make_similarity


class Request(NamedTuple):
    """What to draw: sample i has the number ids[i], and depends on it, its label, its guidance and the seed alone."""

    ids: np.ndarray  # [N] int32
    labels: np.ndarray  # [N] int32; -1 = no label; of a model of texts the row of `texts` that each is drawn by
    guidance: np.ndarray  # [N] float32
    seed: int
    z_T: np.ndarray | None = None  # [N, h, w, c] float32 noise; None = drawn from the seed
    start: float = 1.0  # what noise that is all there is, without z0, is multiplied by
    z0: np.ndarray | None = None  # [h, w, c] clean latents: begin from these, noised to the table's first level
    mask: np.ndarray | None = None  # bool [h, w, 1]: where to draw; elsewhere z0 is kept
    negative: int = -1  # the label (or row of `texts`) that guidance leads away from; -1 = no label (the last row)
    texts: Any = None  # of a model of texts: tree of arrays [P, ...], what its `tau` takes of each
    interval: tuple[float, float] = (0.0, 1.0)  # the share t / T of the timesteps that are guided
    rescale: float = 0.0  # see `classifier_free`
    threshold: float = 0.0  # of pixels: the quantile of `threshold_z0`; 0 = clipped at 1
    clip: float = np.inf  # of latents: z0_hat is kept within [-clip, clip]
    classifier_scale: np.ndarray | None = None  # [N] float32: of `classifier_guided`; None = 0, as without a label
    sought: np.ndarray | None = None  # [N, D] float32: a CLIP's embeddings of what each is to be like
    clip_scale: np.ndarray | None = None  # [N] float32: of `similarity_guided`; None = 0
    toward: int | None = None  # the row of `texts` that all are led to from their own
    shares: np.ndarray | None = None  # [N] float32: how far each is, from 0 to 1
    maps: np.ndarray | None = None  # [N, h, w, k] float32, of a model with a map condition: see `Generator.maps`

    def first(self, num: int) -> "Request":
        """The same for the first `num` samples only."""
        names = ("ids", "labels", "guidance", "z_T", "classifier_scale", "sought", "clip_scale", "shares", "maps")
        return self._replace(**{name: value[:num] for name in names if (value := getattr(self, name)) is not None})


def request(num: int, labels: list[int], *, guidance: float, seed: int, **rest: Any) -> Request:
    """`num` samples whose labels go round `labels` ([] = no label), so that each is drawn equally often.

    `rest` is as in `Request`.
    """
    ids = np.arange(num, dtype=np.int32)
    label = np.asarray(labels, np.int32)[ids % len(labels)] if labels else np.full(num, -1, np.int32)
    return Request(ids, label, np.full(num, guidance if labels else 1.0, np.float32), seed, **rest)


class Generator(NamedTuple):
    """Noise to pictures, `batch_size` at a time. Only another batch size compiles again.

    latents: (params, request, table) -> an iterator, in the order of the request, over the batches'
        (z [b, h, w, c], z0_hat on the way [b, snapshots, h, w, c]).
    decode: (params, z [b, h, w, c]) -> images uint8 [b, H, W, C].
    encode: (params, images uint8 [b, H, W, C]) -> z [b, h, w, c], the most likely ones.
    maps: (params, known) -> [N, h, w, k]: `MapCondition.to_map` for any N.
    """

    latents: Callable[[Any, Request, Table], Iterator[tuple[np.ndarray, np.ndarray]]]
    decode: Callable[[Any, np.ndarray], np.ndarray]
    encode: Callable[[Any, np.ndarray], np.ndarray]
    maps: Callable[[Any, dict[str, np.ndarray]], np.ndarray]

    def images(self, params: Any, request: Request, table: Table) -> Iterator[np.ndarray]:
        """Yields the pictures, uint8 [batch_size or fewer, H, W, C], in the order of the request."""
        for z, _ in self.latents(params, request, table):
            yield self.decode(params, z)

    def denoising(self, params: Any, request: Request, table: Table) -> np.ndarray:
        """What z0_hat looked like on the way: uint8 [snapshots, N, H, W, C]."""
        frames = [
            np.stack([self.decode(params, z) for z in np.moveaxis(on_the_way, 1, 0)])
            for _, on_the_way in self.latents(params, request, table)
        ]
        return np.concatenate(frames, axis=1)


def make_generator(
    *,
    unet: nn.Module,
    tau: Callable[[Any, Any], dict[str, jax.Array]],
    null: int | None,
    map_condition: MapCondition | None,
    first_stage: FirstStage,
    latent_shape: tuple[int, int, int],
    process: Process,
    prediction: str,
    pixels: bool,
    batch_size: int,
    snapshots: int,
    classify: ClassLogProbabilities | None = None,
    similarity: Callable[[Any, jax.Array, jax.Array], jax.Array] | None = None,
) -> Generator:
    """Builds a generator for replicated `params` {"unet", "conditioner", "autoencoder", "shift", "scale"}.

    `tau` makes of params["conditioner"] and y [B, ...] the arguments by which the UNet is told of y (Rombach 2022,
    section 3.3). y is a label, of which `null` stands for none, or with `null` None a row of the request's texts.

    Seed, labels, guidance, solver and steps are arguments of the compiled calls. Of `pixels`, z0_hat is kept within
    [-1, 1], by dynamic thresholding if the request asks for it; latents by its `clip`. With `classify`, which takes
    params["classifier"], a request's `classifier_scale` guides as well; with `similarity`, which takes params["clip"],
    pictures [b, H, W, C] in [-1, 1] and what is `sought` [b, D], its `clip_scale` does.
    """

    def solve_batch(params, batch, table, seed, options):
        def network(z_t, t, condition):
            seen = jnp.concatenate([z_t, condition["map"]], axis=-1) if map_condition else z_t
            return unet.apply({"params": params["unet"]}, seen, t, **condition["told"])

        def condition(told):
            return {"told": told} | ({"map": batch["map"]} if map_condition else {})

        told = tau(params["conditioner"], batch["y"])
        if "toward" in batch:
            told = _between(told, tau(params["conditioner"], batch["toward"]), batch["share"])
        guided = classifier_free(
            from_network(network, prediction, process),
            condition(told),
            condition(tau(params["conditioner"], options["negative"])),
            batch["guidance"],
            interval=options["interval"],
            rescale=options["rescale"],
            prediction=prediction,
        )
        if similarity is not None:
            guided = similarity_guided(
                guided,
                lambda z0: similarity(params["clip"], decoded(params, z0), batch["sought"]),
                batch["clip_scale"],
                interval=options["interval"],
            )
        if classify is not None:
            label = jnp.maximum(batch["label"], 0)
            guided = classifier_guided(
                guided,
                lambda z_t, t: log_probability(classify(params["classifier"], z_t, t), label),
                jnp.where(batch["label"] < 0, 0.0, batch["classifier_scale"]),
                interval=options["interval"],
            )
        z, on_the_way = solve(
            threshold_z0(guided, options["threshold"]) if pixels else clip_z0(guided, options["clip"]),
            batch["z_T"],
            table,
            sample_keys(seed, batch["id"]),
            project=paste_known(options["z0"], options["mask"]),
            snapshots=snapshots,
        )
        return z, jnp.moveaxis(on_the_way.z0_hat, 0, 1)

    def encode_batch(params, batch):
        raw = first_stage.mode(first_stage.encode(params["autoencoder"], to_pixels(batch["images"])))
        return to_latents(raw, params["shift"], params["scale"])

    def decoded(params, z):
        return first_stage.decode(params["autoencoder"], from_latents(z, params["shift"], params["scale"]))

    def decode_batch(params, batch):
        return to_uint8(decoded(params, batch["z"]))

    compiled_solve, compiled_decode = parallel_map(solve_batch), parallel_map(decode_batch)
    compiled_encode = parallel_map(encode_batch)
    compiled_to_map = parallel_map(map_condition.to_map) if map_condition else None
    draw = jax.jit(lambda seed, ids: initial_latents(sample_keys(seed, ids), latent_shape))

    def y_of(request: Request, labels: np.ndarray) -> Any:
        if null is None:
            return jax.tree.map(lambda rows: rows[labels], request.texts)
        return np.where(labels < 0, np.int32(null), labels)

    def latents(params: Any, request: Request, table: Table) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        options = {
            "negative": y_of(request, np.array([request.negative], np.int32)),
            "interval": np.asarray(request.interval, np.float32) * len(process),
            "rescale": np.float32(request.rescale),
            "threshold": np.float32(request.threshold),
            "clip": np.float32(request.clip),
            "z0": np.zeros(latent_shape, np.float32) if request.z0 is None else request.z0,
            "mask": np.ones((*latent_shape[:2], 1), bool) if request.mask is None else request.mask,
        }
        nothing = np.zeros(len(request.ids), np.float32)
        scale, clip_scale = (nothing if s is None else s for s in (request.classifier_scale, request.clip_scale))
        if scale.any() and classify is None:
            raise ValueError("a request with classifier_scale needs a generator with a classifier")
        if clip_scale.any() and similarity is None:
            raise ValueError("a request with clip_scale needs a generator with a similarity")
        for start in range(0, len(request.ids), batch_size):
            rows = np.arange(start, min(start + batch_size, len(request.ids)))
            padded = np.pad(rows, (0, batch_size - len(rows)), mode="edge")
            ids = request.ids[padded]
            z_T = draw(np.uint32(request.seed), ids) if request.z_T is None else request.z_T[padded]
            if request.z0 is not None:
                z_T = table.alpha[0] * request.z0 + table.sigma[0] * np.asarray(z_T)
            elif request.start != 1:
                z_T = request.start * np.asarray(z_T)
            batch = {
                "id": ids,
                "label": request.labels[padded],
                "y": y_of(request, request.labels[padded]),
                "guidance": request.guidance[padded],
                "z_T": np.asarray(z_T, np.float32),
            }
            if map_condition:
                batch["map"] = request.maps[padded]
            if classify is not None:
                batch["classifier_scale"] = scale[padded]
            if similarity is not None:
                batch |= {"sought": request.sought[padded], "clip_scale": clip_scale[padded]}
            if request.toward is not None:
                toward = y_of(request, np.full(batch_size, request.toward))
                batch |= {"toward": toward, "share": request.shares[padded]}
            z, on_the_way = compiled_solve(params, batch, table, np.uint32(request.seed), options)
            yield z[: len(rows)], on_the_way[: len(rows)]

    def decode(params: Any, z: np.ndarray) -> np.ndarray:
        padded = np.pad(z, [(0, batch_size - len(z)), (0, 0), (0, 0), (0, 0)])
        return compiled_decode(params, {"z": padded})[: len(z)]

    def encode(params: Any, images: np.ndarray) -> np.ndarray:
        return map_in_batches(compiled_encode, params, {"images": images}, batch_size)

    def maps(params: Any, known: dict[str, np.ndarray]) -> np.ndarray:
        return map_in_batches(compiled_to_map, params, known, batch_size)

    return Generator(latents, decode, encode, maps)


def _between(told: Any, others: Any, share: jax.Array) -> Any:
    """Some `share` [b] of the way from what is told of one text to what is told of another; whole numbers, such as
    sizes, are those of the first."""

    def between(one: jax.Array, other: jax.Array) -> jax.Array:
        if not jnp.issubdtype(one.dtype, jnp.floating):
            return one
        return one + share.reshape(-1, *[1] * (one.ndim - 1)).astype(one.dtype) * (other - one)

    return jax.tree.map(between, told, others)


def smallest_batch(num: int, batch_size: int, devices: int) -> int:
    """The batch to compile for `num` samples: no more than `batch_size`, a multiple of the devices."""
    return min(batch_size, math.ceil(num / devices) * devices)


SNAPSHOTS = 24  # frames of denoising.gif


def generator_of(model: Trained, batch_size: int, guides: Guides = NO_GUIDES, *, vae_tiling: bool = False) -> Generator:
    """The generator of a trained model; `vae_tiling`: the autoencoder of a diffusers model works in tiles."""
    if model.pretrained:
        shape = pipeline_from_config.latent_shape(model.config)
        return _pretrained_generator(model.pretrained, shape, batch_size, guides, vae_tiling)
    return build_generator(model.config, len(model.class_names), batch_size, guides)


def build_generator(config: ConfigDict, num_classes: int, batch_size: int, guides: Guides = NO_GUIDES) -> Generator:
    """The generator of a config (see `generate.make_generator`)."""
    tau, null = pipeline_from_config.build_tau(config, num_classes)
    return make_generator(
        unet=pipeline_from_config.build_unet(config),
        tau=tau,
        null=null,
        map_condition=pipeline_from_config.build_map_condition(config),
        first_stage=pipeline_from_config.build_first_stage(config),
        latent_shape=pipeline_from_config.latent_shape(config),
        process=pipeline_from_config.build_process(config),
        prediction=config.diffusion.prediction,
        pixels=config.autoencoder.kind == "none",
        batch_size=batch_size,
        snapshots=SNAPSHOTS,
        classify=pipeline_from_config.build_classify(guides.classifier.config, num_classes)
        if guides.classifier
        else None,
        similarity=make_similarity(guides.clip) if guides.clip else None,
    )


def _pretrained_generator(
    model: Pretrained, latent_shape: tuple[int, int, int], batch_size: int, guides: Guides, vae_tiling: bool
) -> Generator:
    """Noise to pictures, as `generate.make_generator` makes it; raises InputError for tiles of no whole latents."""
    first_stage, scheduler = make_first_stage(model.autoencoder), pipeline_model.scheduler_of(model)
    if vae_tiling:
        try:
            first_stage = tiled(first_stage, model.tile, model.autoencoder.downsampling)
        except ValueError as error:
            raise InputError(f"--vae_tiling: the autoencoder's sample_size says so, but {error}") from error
    classes = model.classes
    return make_generator(
        unet=model.unet,
        tau=make_class_tau(classes) if classes else make_tau(model.encoders, upscales=model.upscaling is not None),
        null=None if model.encoders else classes.null if classes else 0,
        map_condition=pipeline_model.map_condition_of(model, first_stage, latent_shape),
        first_stage=first_stage,
        latent_shape=latent_shape,
        process=scheduler.process,
        prediction=scheduler.prediction,
        pixels=False,
        batch_size=batch_size,
        snapshots=SNAPSHOTS,
        similarity=make_similarity(guides.clip) if guides.clip else None,
    )
