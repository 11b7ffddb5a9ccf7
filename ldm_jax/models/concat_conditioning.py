"""Conditions as maps: what is known of a picture, laid beside its latents as further channels of the UNet's input.

Rombach 2022, section 3.3. Pure functions, as in `first_stage`: `know` takes from a picture what a user would give, and
`to_map` makes a map of the latents' size of it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ldm_jax.models.first_stage import FirstStage, to_latents
from ldm_jax.models.pixels import to_pixels, to_uint8

KINDS = ("low_resolution", "inpainting", "segments")
BOXES = 3  # that hide parts of a picture, of a fifth to three fifths of its side each


class MapCondition(NamedTuple):
    """A kind of map.

    channels: of the map.
    know: (examples {"x": uint8 [B, H, W, C], "segments": uint8 [B, H, W, 1], if there are}, keys [B]) -> what is known
        of them, a dict of uint8 arrays [B, ...].
    to_map: (frozen {"autoencoder", "shift", "scale"}, known) -> [B, h, w, channels] float32.
    """

    channels: int
    know: Callable[[dict, jax.Array], dict[str, jax.Array]]
    to_map: Callable[[Any, dict], jax.Array]


def make_map_condition(
    kind: str, *, first_stage: FirstStage, latent_shape: tuple[int, int, int], channels: int, factor: int, segments: int
) -> MapCondition:
    """The condition of a kind: see `low_resolution`, `inpainting` and `segments_map`.

    Args:
      kind: one of KINDS.
      first_stage: encodes what an inpainting model sees of the picture.
      latent_shape: (h, w, c) of one example's latents.
      channels: of the pictures.
      factor: low_resolution's: how many times smaller the given picture is.
      segments: how many classes a map of segments tells apart.

    Raises:
      ValueError: unknown kind.
    """
    if kind == "low_resolution":
        return low_resolution(latent_shape, channels, factor)
    if kind == "inpainting":
        return inpainting(first_stage, latent_shape)
    if kind == "segments":
        return segments_map(latent_shape, segments)
    raise ValueError(f"the kind of map must be one of {', '.join(KINDS)}, got {kind!r}")


def low_resolution(latent_shape: tuple[int, int, int], channels: int, factor: int) -> MapCondition:
    """The picture `factor` times smaller (bicubic, antialiased), in the latents' size: Rombach 2022, section 4.4."""

    def know(examples: dict, keys: jax.Array) -> dict[str, jax.Array]:
        b, height, width, c = examples["x"].shape
        small = (b, height // factor, width // factor, c)
        return {"small": to_uint8(jax.image.resize(to_pixels(examples["x"]), small, "cubic"))}

    def to_map(frozen: Any, known: dict) -> jax.Array:
        x = to_pixels(known["small"])
        return jax.image.resize(x, (len(x), *latent_shape[:2], channels), "cubic")

    return MapCondition(channels, know, to_map)


def inpainting(first_stage: FirstStage, latent_shape: tuple[int, int, int]) -> MapCondition:
    """Where to draw, and the latents of the picture with that part grey: Rombach 2022, section 4.5.

    Channels, their order and the mask's way to the latents' size (every so-many-th pixel) are those of Stable
    Diffusion's inpainting models in diffusers. In training, random boxes are hidden.
    """
    h, w, c = latent_shape

    def know(examples: dict, keys: jax.Array) -> dict[str, jax.Array]:
        x = examples["x"]
        return {"x": x, "mask": jax.vmap(lambda key: random_boxes(key, x.shape[1:3]))(keys).astype(jnp.uint8)}

    def to_map(frozen: Any, known: dict) -> jax.Array:
        mask = known["mask"].astype(jnp.float32)
        moments = first_stage.encode(frozen["autoencoder"], to_pixels(known["x"]) * (1 - mask))
        z = to_latents(first_stage.mode(moments), frozen["shift"], frozen["scale"])
        small = mask[:, :: mask.shape[1] // h, :: mask.shape[2] // w]
        return jnp.concatenate([small, z], axis=-1)

    return MapCondition(1 + c, know, to_map)


def random_boxes(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """bool [H, W, 1]: the union of BOXES random boxes, whose centres lie anywhere in the picture."""
    key_side, key_centre = jax.random.split(key)
    side = jax.random.uniform(key_side, (BOXES, 2), minval=0.2, maxval=0.6)
    centre = jax.random.uniform(key_centre, (BOXES, 2))

    def inside(axis: int) -> jax.Array:  # [BOXES, pixels]
        at = (jnp.arange(shape[axis]) + 0.5) / shape[axis]
        return jnp.abs(at - centre[:, axis, None]) < side[:, axis, None] / 2

    return (inside(0)[:, :, None] & inside(1)[:, None, :]).any(0)[..., None]


def segments_map(latent_shape: tuple[int, int, int], segments: int) -> MapCondition:
    """A map of classes, one channel each: the share that a class has of a latent's place."""

    def know(examples: dict, keys: jax.Array) -> dict[str, jax.Array]:
        return {"segments": examples["segments"]}

    def to_map(frozen: Any, known: dict) -> jax.Array:
        one_hot = jax.nn.one_hot(known["segments"][..., 0], segments)
        return jax.image.resize(one_hot, (len(one_hot), *latent_shape[:2], segments), "linear")

    return MapCondition(segments, know, to_map)
