"""The stage of CLIP (Radford et al. 2021): contrastive training of a text encoder and an image encoder."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from ldm_jax.data.augmentation import check_ranges, move_and_zoom
from ldm_jax.diffusion.random import Stream, example_keys, split_keys
from ldm_jax.models.clip_vision import CLIP
from ldm_jax.models.pixels import flip_images, to_pixels
from ldm_jax.training.contrastive import contrastive_loss, with_bounded_scale
from ldm_jax.training.state import GradientStage, Metrics, TrainState, init_state, make_optimizer


@dataclass(frozen=True)
class CLIPStage(GradientStage):
    """The contrastive loss of Radford et al. 2021, figure 3 (see `contrastive_loss`), as pure functions.

    A batch holds `id` [B] int32, `x` [B, H, W, C] uint8 and `label` [B] int32, the class, one of whose captions is
    sampled at each step. `frozen` is {"texts": `contrastive.caption_arrays` of the captions}.

    Attributes:
      clip: both encoders.
      max_shift, max_zoom: see `move_and_zoom`; 0 and 0.0 for none.

    Raises:
      ValueError: the encoders do not fit together, or max_shift or max_zoom is out of range.
    """

    clip: CLIP
    max_shift: int
    max_zoom: float

    def __post_init__(self) -> None:
        self.clip.check_fields()
        check_ranges(self.max_shift, self.max_zoom)

    @property
    def optimizer(self) -> optax.GradientTransformation:
        """The stage's, with a bounded logit scale."""
        return with_bounded_scale(make_optimizer(self.optimization))

    def init(self, rng: Array) -> TrainState:
        """The state before the first update."""
        size = self.clip.image.image_size
        ids = jnp.zeros((1, self.clip.text.max_position_embeddings), jnp.int32)
        params = self.clip.init(rng, ids, jnp.zeros((1, size, size, self.clip.image.num_channels)))["params"]
        return init_state(params, self.optimizer)

    def validate(self, params: Any, frozen: dict, batch: dict, seed: Array, *, axis_name: str | None = None) -> Metrics:
        """{"loss", "text_accuracy", "image_accuracy"} of each example [B] among the whole batch, with a fixed caption
        and without augmentation."""
        keys = example_keys(seed, Stream.CLIP_VALIDATION, 0, batch["id"])
        return self._measure(params, _pair(batch, frozen, keys), axis_name)[0]

    def _tensors(self, params: Any, frozen: dict, example: dict) -> dict[str, Any]:
        ids, x = example["ids"], example["x"]
        _, tensors = self.clip.apply({"params": params}, ids, x, capture_intermediates=True)
        return {"x": x, "ids": ids} | {name: tensors["intermediates"][name] for name in ("text", "image")}

    def _example(self, batch: dict, frozen: dict, seed: Array) -> dict[str, Array]:
        key_caption, key_flip, key_move = split_keys(example_keys(seed, Stream.CLIP, batch["step"], batch["id"]), 3)
        example = _pair(batch, frozen, key_caption)
        if self.flip:
            example["x"] = flip_images(example["x"], key_flip)
        if self.max_shift or self.max_zoom:
            example["x"] = move_and_zoom(example["x"], key_move, max_shift=self.max_shift, max_zoom=self.max_zoom)
        return example

    def _measure(self, params: Any, example: dict, axis_name: str | None) -> tuple[Metrics, Array]:
        text, image, scale = self.clip.apply({"params": params}, example["ids"], example["x"])
        captions = example["caption"], example["captions"]
        return contrastive_loss(text, image, scale, *captions, axis_name=axis_name), scale

    def _loss(self, params: Any, frozen: dict, example: dict, axis_name: str | None) -> tuple[Array, dict[str, Array]]:
        measured, scale = self._measure(params, example, axis_name)
        means = jax.tree.map(jnp.mean, measured) | {"scale": scale}
        return means.pop("loss"), means


def _pair(batch: dict, frozen: dict, keys: Array) -> dict[str, Array]:
    """Each image with one of its captions, sampled by its key."""
    ids, index = (frozen["texts"][name][batch["label"]] for name in ("ids", "index"))
    k = jax.vmap(lambda key: jax.random.randint(key, (), 0, index.shape[1]))(keys)
    rows = jnp.arange(len(k))
    return {"x": to_pixels(batch["x"]), "ids": ids[rows, k], "caption": index[rows, k], "captions": index}
