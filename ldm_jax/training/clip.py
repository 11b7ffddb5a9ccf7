"""CLIP as a stage of its own (Radford et al. 2021): images and captions to one embedding space, in one pure step."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ldm_jax.data.augmentation import check_ranges, move_and_zoom
from ldm_jax.diffusion.random import Stream, example_keys, split_keys
from ldm_jax.models.clip_vision import CLIP
from ldm_jax.models.pixels import flip_images, to_pixels
from ldm_jax.training.contrastive import contrastive_loss, with_bounded_scale
from ldm_jax.training.state import AdamW, TrainState, init_state, make_optimizer, update_if_finite


@dataclass(frozen=True)
class CLIPStage:
    """The contrastive loss of Radford et al. 2021, figure 3, as pure functions; see `contrastive_loss`.

    A batch holds `id` [B] int32, `x` [B, H, W, C] uint8 and `label` [B] int32, the class of which one of the captions
    is chosen anew at each step. `frozen` is {"texts": `contrastive.caption_arrays` of the captions}.

    Attributes:
      clip: both encoders.
      flip: images are mirrored at random.
      max_shift, max_zoom: of `move_and_zoom`, 0 and 0.0 for none.
      adamw, ema_decay: of `state.make_optimizer` and `state.update_if_finite`.

    Raises:
      ValueError: for encoders that do not fit together, or a shift or zoom out of range.
    """

    clip: CLIP
    flip: bool
    max_shift: int
    max_zoom: float
    adamw: AdamW
    ema_decay: float

    def __post_init__(self) -> None:
        self.clip.check_fields()
        check_ranges(self.max_shift, self.max_zoom)

    @property
    def optimizer(self) -> optax.GradientTransformation:
        """Which keeps the logit scale bounded."""
        return with_bounded_scale(make_optimizer(self.adamw))

    def init(self, rng: jax.Array) -> TrainState:
        """The state before the first update."""
        size = self.clip.image.image_size
        ids = jnp.zeros((1, self.clip.text.max_position_embeddings), jnp.int32)
        params = self.clip.init(rng, ids, jnp.zeros((1, size, size, self.clip.image.num_channels)))["params"]
        return init_state(params, self.optimizer)

    def step(
        self, state: TrainState, frozen: dict, batch: dict, seed: jax.Array, *, axis_name: str | None = None
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """One update by the batch; the metrics are scalars."""
        example = self._augmented(batch, frozen, seed)
        (_, metrics), grads = jax.value_and_grad(self._loss, has_aux=True)(state.params, example, axis_name)
        if axis_name is not None:
            metrics, grads = jax.lax.pmean((metrics, grads), axis_name)
        state, grad_norm = update_if_finite(
            state, batch["step"], metrics["loss"], grads, self.optimizer, self.ema_decay
        )
        return state, metrics | {"grad_norm": grad_norm}

    def validate(
        self, params: Any, frozen: dict, batch: dict, seed: jax.Array, *, axis_name: str | None = None
    ) -> dict[str, jax.Array]:
        """{"loss", "text_accuracy", "image_accuracy"} of each example [B] among those of the whole batch, without
        augmentation; an example's caption is the same each time."""
        keys = example_keys(seed, Stream.CLIP_VALIDATION, 0, batch["id"])
        return self._measure(params, _pair(batch, frozen, keys), axis_name)[0]

    def trace(self, state: TrainState, frozen: dict, batch: dict, seed: jax.Array) -> dict[str, Any]:
        """Every tensor of the step in the order it arises, by name: for the report on the first that is not finite."""
        example = self._augmented(batch, frozen, seed)
        _, tensors = self.clip.apply({"params": state.params}, example["ids"], example["x"], capture_intermediates=True)
        (loss, _), grads = jax.value_and_grad(self._loss, has_aux=True)(state.params, example, None)
        return {"params": state.params, "x": example["x"], "ids": example["ids"],
                **{name: tensors["intermediates"][name] for name in ("text", "image")},
                "loss": loss, "gradient": grads}  # fmt: skip

    def _augmented(self, batch: dict, frozen: dict, seed: jax.Array) -> dict[str, jax.Array]:
        key_caption, key_flip, key_move = split_keys(example_keys(seed, Stream.CLIP, batch["step"], batch["id"]), 3)
        example = _pair(batch, frozen, key_caption)
        if self.flip:
            example["x"] = flip_images(example["x"], key_flip)
        if self.max_shift or self.max_zoom:
            ranges = {"max_shift": self.max_shift, "max_zoom": self.max_zoom}
            example["x"] = move_and_zoom(example["x"], key_move, **ranges)
        return example

    def _measure(self, params: Any, example: dict, axis_name: str | None) -> tuple[dict[str, jax.Array], jax.Array]:
        text, image, scale = self.clip.apply({"params": params}, example["ids"], example["x"])
        captions = example["caption"], example["captions"]
        return contrastive_loss(text, image, scale, *captions, axis_name=axis_name), scale

    def _loss(self, params: Any, example: dict, axis_name: str | None) -> tuple[jax.Array, dict[str, jax.Array]]:
        measured, scale = self._measure(params, example, axis_name)
        means = jax.tree.map(jnp.mean, measured) | {"scale": scale}
        return means["loss"], means


def _pair(batch: dict, frozen: dict, keys: jax.Array) -> dict[str, jax.Array]:
    """Each image with one of its captions, chosen at random."""
    ids, number = (frozen["texts"][name][batch["label"]] for name in ("ids", "number"))
    k = jax.vmap(lambda key: jax.random.randint(key, (), 0, number.shape[1]))(keys)
    rows = jnp.arange(len(k))
    return {"x": to_pixels(batch["x"]), "ids": ids[rows, k], "caption": number[rows, k], "captions": number}
