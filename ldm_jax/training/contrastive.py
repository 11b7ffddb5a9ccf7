"""CLIP's contrastive loss (Radford et al. 2021, figure 3) over all devices, for images that share captions."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

MAX_SCALE = 100.0  # of the logits (Radford et al. 2021, section 2.5)


def caption_arrays(ids: np.ndarray) -> dict[str, np.ndarray]:
    """The captions of P classes, K each, as the loss takes them: {"ids", "index"}.

    `ids` are their token ids, int [P, K, L]; "index" int32 [P, K] is the same for equal captions of any classes.
    Raises ValueError for another shape or type.
    """
    if ids.ndim != 3 or 0 in ids.shape or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"captions must be integers [P, K, L] of one or more each; got {ids.dtype} {list(ids.shape)}")
    _, index = np.unique(ids.reshape(-1, ids.shape[2]), axis=0, return_inverse=True)
    return {"ids": ids.astype(np.int32), "index": index.reshape(ids.shape[:2]).astype(np.int32)}


def contrastive_loss(
    text: Array, image: Array, scale: Array, caption: Array, captions: Array, *, axis_name: str | None = None
) -> dict[str, Array]:
    """The symmetric cross-entropy over the similarity matrix of the whole batch.

    Row i of the logits scale * image text^T classifies which text belongs to image i. Text j does if it is one of the
    captions of image i; if several texts do, because of equal captions or several images of a class, the target is
    uniform over them (Yang et al. 2022, "UniCL", equations 3 and 4), else it is that of Radford et al. The same holds
    for the columns.

    Each device computes the rows and columns of its own examples against all examples. The mean over the devices
    (`pmean`) of the loss and of its gradient is that of the whole batch, as the gradient of `all_gather` sums over
    the devices.

    Args:
      text, image: [B, D] float32 of length 1; with `axis_name` those of this device.
      scale: [], the inverse temperature.
      caption: [B] int, the index of the caption that `text` encodes.
      captions: [B, K] int, the indices of all captions of the example, `caption` included.
      axis_name: of the devices.

    Returns:
      For each example, [B]: "loss", in nats; "text_accuracy", whether the nearest text belongs to the image, and
      "image_accuracy", whether the text belongs to the nearest image.
    """

    def gather(a: Array) -> Array:
        return a if axis_name is None else jax.lax.all_gather(a, axis_name, tiled=True)

    def compare(queries: Array, keys: Array, true: Array) -> tuple[Array, Array]:
        """Cross-entropy of each query, and whether its nearest key is true."""
        logits = scale * jnp.matmul(queries, keys.T, precision=jax.lax.Precision.HIGHEST)
        log_p = jnp.where(true, jax.nn.log_softmax(logits), 0.0)
        nearest = jnp.take_along_axis(true, jnp.argmax(logits, axis=1)[:, None], axis=1)[:, 0]
        return -log_p.sum(1) / true.sum(1), nearest.astype(jnp.float32)

    texts = (captions[:, :, None] == gather(caption)).any(1)  # [B, all]: whether text j belongs to image i
    images = (gather(captions) == caption[:, None, None]).any(2)  # [B, all]: whether text i belongs to image j
    text_loss, text_accuracy = compare(image, gather(text), texts)
    image_loss, image_accuracy = compare(text, gather(image), images)
    return {"loss": (text_loss + image_loss) / 2, "text_accuracy": text_accuracy, "image_accuracy": image_accuracy}


def with_bounded_scale(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """`optimizer`, with params["logit_scale"] limited to log(MAX_SCALE)."""

    def limit(updates: dict, state: optax.EmptyState, params: dict) -> tuple[dict, optax.EmptyState]:
        largest = math.log(MAX_SCALE) - params["logit_scale"]
        return updates | {"logit_scale": jnp.minimum(updates["logit_scale"], largest)}, state

    return optax.chain(optimizer, optax.GradientTransformation(lambda params: optax.EmptyState(), limit))
