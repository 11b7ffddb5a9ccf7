"""The evaluation classifier of Fashion-MNIST: its predicted classes and features evaluate samples.

It is trained on real images only and is independent of the evaluated models.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from ldm_jax.models.pixels import flip_images, to_pixels


class Classifier(nn.Module):
    """A CNN with 3x3 convolutions and group norm, 128 features and class logits."""

    num_classes: int = 10
    features: int = 128

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Pixels [B, 28, 28, 1] in [-1, 1] -> features [B, 128], logits [B, 10]."""
        for width in (32, 64, 128):
            x = nn.relu(nn.GroupNorm(8)(nn.Conv(width, (3, 3))(x)))
            x = nn.max_pool(nn.relu(nn.GroupNorm(8)(nn.Conv(width, (3, 3))(x))), (2, 2), (2, 2))
        x = nn.relu(nn.Dense(self.features)(x.reshape(len(x), -1)))
        return x, nn.Dense(self.num_classes)(x)


def train(images: np.ndarray, labels: np.ndarray, *, epochs: int, seed: int, batch_size: int = 128) -> dict:
    """Trains the classifier on images uint8 [N, 28, 28, 1] and labels [N]; returns its parameters."""
    model, steps = Classifier(), epochs * (len(images) // batch_size)
    optimizer = optax.adamw(optax.cosine_onecycle_schedule(steps, 3e-3), weight_decay=1e-2)
    params = model.init(jax.random.key(seed), jnp.zeros((1, *images.shape[1:])))["params"]

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state, images, labels, key):
        x = flip_images(to_pixels(images), jax.random.split(key, len(images)))

        def loss_fn(params):
            logits = model.apply({"params": params}, x)[1]
            return optax.softmax_cross_entropy(logits, optax.smooth_labels(jax.nn.one_hot(labels, 10), 0.05)).mean()

        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    opt_state, number = optimizer.init(params), 0
    for epoch in range(epochs):
        order = np.random.default_rng([seed, epoch]).permutation(len(images))
        for rows in np.array_split(order[: len(order) // batch_size * batch_size], len(order) // batch_size):
            key = jax.random.fold_in(jax.random.key(seed), number)
            params, opt_state, loss = step(params, opt_state, images[rows], labels[rows], key)
            number += 1
        print(f"epoch {epoch + 1}/{epochs}  loss {float(loss):.3f}", flush=True)
    return params


def classify(params: dict, images: np.ndarray, chunk: int = 1000) -> tuple[np.ndarray, np.ndarray]:
    """Features float32 [N, 128] and predicted classes [N] of images uint8 [N, 28, 28, 1]."""
    apply = jax.jit(lambda params, images: Classifier().apply({"params": params}, to_pixels(images)))
    parts = [apply(params, images[i : i + chunk]) for i in range(0, len(images), chunk)]
    return np.concatenate([p[0] for p in parts]), np.concatenate([np.argmax(p[1], -1) for p in parts])
