"""The contrastive loss of CLIP (Radford et al. 2021, figure 3), over all devices, with captions that several pictures
share."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax

MAX_SCALE = 100.0  # of the cosines (Radford et al. 2021, section 2.5)


def caption_arrays(ids: np.ndarray) -> dict[str, np.ndarray]:
    """Captions as the loss takes them: token ids [P, K, L], K captions of each of P classes, to {"ids", "number"}.

    "number" int32 [P, K] is the same for captions that are the same, of whatever class.

    Raises:
      ValueError: for other shapes or types.
    """
    if ids.ndim != 3 or 0 in ids.shape or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"captions must be integers [P, K, L] of one or more each; got {ids.dtype} {list(ids.shape)}")
    _, number = np.unique(ids.reshape(-1, ids.shape[2]), axis=0, return_inverse=True)
    return {"ids": ids.astype(np.int32), "number": number.reshape(ids.shape[:2]).astype(np.int32)}


def contrastive_loss(
    text: jax.Array,
    image: jax.Array,
    scale: jax.Array,
    drawn: jax.Array,
    captions: jax.Array,
    *,
    axis_name: str | None = None,
) -> dict[str, jax.Array]:
    """The symmetric cross-entropy over the similarity matrix of the whole batch.

    Row i of scale * image text^T are the logits of which text is picture i's. The text of example j is true of picture
    i if it is one of i's own captions. Where several are true, by equal captions or several pictures of a class, the
    target is uniform over them (Yang et al. 2022, "UniCL", equations 3 and 4); where only one is, it is that of Radford
    et al. The columns, which picture is text j's, alike.

    Each device has the rows and columns of its own examples, and compares them with those of all. The mean over the
    devices (`pmean`) of loss and gradient is then that of the whole batch, on any number of them: the gradient of
    `all_gather` adds what every device's loss says of an embedding.

    Args:
      text, image: [B, D] float32 of length 1; with `axis_name` this device's.
      scale: [], the inverse temperature.
      drawn: [B] int, the number of the caption that `text` was made of.
      captions: [B, K] int, the numbers of all captions of the example, `drawn` among them.
      axis_name: of the devices.

    Returns:
      Of each example, [B]: "loss", in nats; "text_accuracy" and "image_accuracy", whether the nearest text is true of
      the picture, and the nearest picture one that the text is true of.
    """

    def of_all(a: jax.Array) -> jax.Array:
        return a if axis_name is None else jax.lax.all_gather(a, axis_name, tiled=True)

    def compare(own: jax.Array, others: jax.Array, true: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Cross-entropy, and whether the nearest is true, of each row."""
        logits = scale * jnp.matmul(own, others.T, precision=jax.lax.Precision.HIGHEST)
        log_p = jnp.where(true, jax.nn.log_softmax(logits), 0.0)
        nearest = jnp.take_along_axis(true, jnp.argmax(logits, axis=1)[:, None], axis=1)[:, 0]
        return -log_p.sum(1) / true.sum(1), nearest.astype(jnp.float32)

    texts = (captions[:, :, None] == of_all(drawn)).any(1)  # [B, all]: whether text j is true of picture i
    images = (of_all(captions) == drawn[:, None, None]).any(2)  # [B, all]: whether text i is true of picture j
    to_text, right_text = compare(image, of_all(text), texts)
    to_image, right_image = compare(text, of_all(image), images)
    return {"loss": (to_text + to_image) / 2, "text_accuracy": right_text, "image_accuracy": right_image}


def with_bounded_scale(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """`optimizer`, whose updates take params["logit_scale"] to log(MAX_SCALE) at most."""

    def bound(updates: dict, state: optax.EmptyState, params: dict) -> tuple[dict, optax.EmptyState]:
        room = math.log(MAX_SCALE) - params["logit_scale"]
        return updates | {"logit_scale": jnp.minimum(updates["logit_scale"], room)}, state

    return optax.chain(optimizer, optax.GradientTransformation(lambda params: optax.EmptyState(), bound))
