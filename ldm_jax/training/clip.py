"""CLIP as a stage of its own (Radford et al. 2021): pictures and captions to one space, in one pure step."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ldm_jax.data.augmentation import check_ranges, move_and_zoom
from ldm_jax.diffusion.random import Stream, example_keys, split_keys
from ldm_jax.models.clip_vision import CLIP
from ldm_jax.models.pixels import flip_images, to_pixels
from ldm_jax.training.contrastive import contrastive_loss, with_bounded_scale
from ldm_jax.training.state import TrainState, update_if_finite


class CLIPStage(NamedTuple):
    """The pure functions of the stage. `frozen` is {"texts": `contrastive.caption_arrays` of the captions}."""

    init: Callable[[jax.Array], TrainState]
    step: Callable[..., tuple[TrainState, dict[str, jax.Array]]]
    validate: Callable[..., dict[str, jax.Array]]
    trace: Callable[..., dict[str, Any]]


def make_clip_stage(
    *,
    clip: CLIP,
    flip: bool,
    max_shift: int,
    max_zoom: float,
    optimizer: optax.GradientTransformation,
    ema_decay: float,
) -> CLIPStage:
    """Builds the stage for the loss of Radford et al. 2021, figure 3; see `contrastive_loss`.

    A batch holds `id` [B] int32, `x` [B, H, W, C] uint8 and `label` [B] int32, the class of which one of the captions
    is drawn anew at each step. `flip` is whether pictures are mirrored at random; `max_shift` and `max_zoom` are those
    of `move_and_zoom`, 0 and 0.0 for none.

    Raises:
      ValueError: for encoders that do not fit together, or a shift or zoom out of range.
    """
    clip.check_fields()
    check_ranges(max_shift, max_zoom)
    optimizer = with_bounded_scale(optimizer)

    def init(rng: jax.Array) -> TrainState:
        ids = jnp.zeros((1, clip.text.max_position_embeddings), jnp.int32)
        x = jnp.zeros((1, clip.image.image_size, clip.image.image_size, clip.image.num_channels))
        params = clip.init(rng, ids, x)["params"]
        ema_params = jax.tree.map(jnp.copy, params)  # a copy: donating one buffer twice is an error
        return TrainState(jnp.zeros((), jnp.int32), params, ema_params, optimizer.init(params))

    def pair(batch: dict, frozen: dict, keys: jax.Array) -> dict[str, jax.Array]:
        """Pictures as they are, each with one of its captions."""
        ids, number = (frozen["texts"][name][batch["label"]] for name in ("ids", "number"))
        k = jax.vmap(lambda key: jax.random.randint(key, (), 0, number.shape[1]))(keys)
        rows = jnp.arange(len(k))
        return {"x": to_pixels(batch["x"]), "ids": ids[rows, k], "drawn": number[rows, k], "captions": number}

    def augmented(batch: dict, frozen: dict, seed: jax.Array) -> dict[str, jax.Array]:
        key_caption, key_flip, key_move = split_keys(example_keys(seed, Stream.CLIP, batch["step"], batch["id"]), 3)
        example = pair(batch, frozen, key_caption)
        if flip:
            example["x"] = flip_images(example["x"], key_flip)
        if max_shift or max_zoom:
            example["x"] = move_and_zoom(example["x"], key_move, max_shift=max_shift, max_zoom=max_zoom)
        return example

    def measure(params: dict, example: dict, axis_name: str | None) -> tuple[dict[str, jax.Array], jax.Array]:
        text, image, scale = clip.apply({"params": params}, example["ids"], example["x"])
        told = example["drawn"], example["captions"]
        return contrastive_loss(text, image, scale, *told, axis_name=axis_name), scale

    def loss_fn(params: dict, example: dict, axis_name: str | None) -> tuple[jax.Array, dict[str, jax.Array]]:
        measured, scale = measure(params, example, axis_name)
        means = jax.tree.map(jnp.mean, measured) | {"scale": scale}
        return means["loss"], means

    def step(state, frozen, batch, seed, *, axis_name=None):
        example = augmented(batch, frozen, seed)
        (_, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, example, axis_name)
        if axis_name is not None:
            metrics, grads = jax.lax.pmean((metrics, grads), axis_name)
        state, grad_norm = update_if_finite(
            state, batch["step"], metrics["loss"], grads, optimizer=optimizer, ema_decay=ema_decay
        )
        return state, metrics | {"grad_norm": grad_norm}

    def validate(params, frozen, batch, seed, *, axis_name=None):
        """{"loss", "text_accuracy", "image_accuracy"} of each example [B] among those of the whole batch, its pictures
        as they are; an example's caption is the same each time."""
        keys = example_keys(seed, Stream.CLIP_VALIDATION, 0, batch["id"])
        return measure(params, pair(batch, frozen, keys), axis_name)[0]

    def trace(state, frozen, batch, seed) -> dict[str, Any]:
        """Every tensor of the step in the order it arises, by name: for the report on the first that is not finite."""
        example = augmented(batch, frozen, seed)
        _, seen = clip.apply({"params": state.params}, example["ids"], example["x"], capture_intermediates=True)
        (loss, _), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, example, None)
        return {"params": state.params, "x": example["x"], "ids": example["ids"],
                **{name: seen["intermediates"][name] for name in ("text", "image")},
                "loss": loss, "gradient": grads}  # fmt: skip

    return CLIPStage(init, step, validate, trace)
