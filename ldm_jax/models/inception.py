"""The InceptionV3 of FID: the network of the TensorFlow archive of 2015-12-05, up to its 2048 pooled features.

Szegedy et al. 2016, table 1, as in torch-fidelity and pytorch-fid. Unlike in torchvision's, average pools leave the
padding out of the mean, and the last block pools by maximum. Batch normalisation is folded into the convolutions when
the weights are read (`ldm_jax.interop.inception_weights`). Module names are those of the published weights.
"""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array

IMAGE_SIZE = 299


def inception_input(images: Array) -> Array:
    """Images uint8 [B, H, W, 1 or 3] -> the network's input [B, 299, 299, 3], (value - 128) / 128.

    Resized as in TensorFlow 1 and torch-fidelity, which define FID: output pixel i is at input position i * size / 299,
    bilinearly, without half-pixel centres and without antialiasing.
    """
    rows, columns = (jnp.asarray(_tf1_bilinear(size)) for size in images.shape[1:3])
    x = jnp.einsum("ih,bhwc,jw->bijc", rows, images.astype(jnp.float32), columns, precision="highest")
    return (jnp.broadcast_to(x, (*x.shape[:3], 3)) - 128) / 128


def _tf1_bilinear(size: int) -> np.ndarray:
    """The matrix [299, size] of the interpolation along one side."""
    at = np.arange(IMAGE_SIZE, dtype=np.float32) * np.float32(size / IMAGE_SIZE)
    low = np.minimum(np.floor(at).astype(int), size - 1)
    high = np.minimum(low + 1, size - 1)
    matrix = np.zeros((IMAGE_SIZE, size), np.float32)
    np.add.at(matrix, (np.arange(IMAGE_SIZE), low), 1 - (at - low))
    np.add.at(matrix, (np.arange(IMAGE_SIZE), high), at - low)
    return matrix


def conv_relu(
    h: Array, name: str, width: int, kernel: int | tuple[int, int] = 1, stride: int = 1, pad: bool = True
) -> Array:
    """Convolution and ReLU of h [B, H, W, C], the calling module's layer `name`; `pad` keeps the size at stride 1."""
    kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
    padding = [((k - 1) // 2,) * 2 if pad else (0, 0) for k in kernel]
    return nn.relu(nn.Conv(width, kernel, strides=stride, padding=padding, name=name)(h))


def branch(h: Array, name: str, *layers: tuple) -> Array:
    """Layers `name`_1, `name`_2 ... of h [B, H, W, C], each (width, kernel, stride); stride 2 has no padding."""
    for i, (width, kernel, stride) in enumerate(((*layer, 1, 1)[:3] for layer in layers), start=1):
        h = conv_relu(h, f"{name}_{i}", width, kernel, stride, pad=stride == 1)
    return h


def fork(h: Array, name: str) -> list[Array]:
    """The layers `name`a and `name`b, 1x3 and 3x1, of the same input [B, H, W, C]."""
    return [conv_relu(h, f"{name}a", 384, (1, 3)), conv_relu(h, f"{name}b", 384, (3, 1))]


def average_pool(h: Array) -> Array:
    """3x3 means of h [B, H, W, C] that keep the size; the padding does not count."""
    return nn.avg_pool(h, (3, 3), strides=(1, 1), padding=((1, 1), (1, 1)), count_include_pad=False)


def reduce_pool(h: Array) -> Array:
    """3x3 maxima of h [B, H, W, C] at every other position."""
    return nn.max_pool(h, (3, 3), strides=(2, 2))


class InceptionA(nn.Module):
    """35x35 block: 1x1, 5x5, two 3x3, pool."""

    pool_width: int

    @nn.compact
    def __call__(self, h: Array) -> Array:
        """[B, H, W, C] -> [B, H, W, 224 + pool_width]."""
        one = conv_relu(h, "branch1x1", 64)
        five = branch(h, "branch5x5", (48,), (64, 5))
        double = branch(h, "branch3x3dbl", (64,), (96, 3), (96, 3))
        pool = conv_relu(average_pool(h), "branch_pool", self.pool_width)
        return jnp.concatenate([one, five, double, pool], axis=-1)


class InceptionB(nn.Module):
    """35x35 to 17x17."""

    @nn.compact
    def __call__(self, h: Array) -> Array:
        """[B, H, W, C] -> [B, (H - 1) / 2, (W - 1) / 2, 480 + C]."""
        three = conv_relu(h, "branch3x3", 384, 3, stride=2, pad=False)
        double = branch(h, "branch3x3dbl", (64,), (96, 3), (96, 3, 2))
        return jnp.concatenate([three, double, reduce_pool(h)], axis=-1)


class InceptionC(nn.Module):
    """17x17 block: 1x1, 7x7 as 1x7 and 7x1, two of those, pool."""

    width: int

    @nn.compact
    def __call__(self, h: Array) -> Array:
        """[B, H, W, C] -> [B, H, W, 768]."""
        w = self.width
        one = conv_relu(h, "branch1x1", 192)
        seven = branch(h, "branch7x7", (w,), (w, (1, 7)), (192, (7, 1)))
        double = branch(h, "branch7x7dbl", (w,), (w, (7, 1)), (w, (1, 7)), (w, (7, 1)), (192, (1, 7)))
        pool = conv_relu(average_pool(h), "branch_pool", 192)
        return jnp.concatenate([one, seven, double, pool], axis=-1)


class InceptionD(nn.Module):
    """17x17 to 8x8."""

    @nn.compact
    def __call__(self, h: Array) -> Array:
        """[B, H, W, C] -> [B, (H - 1) / 2, (W - 1) / 2, 512 + C]."""
        three = branch(h, "branch3x3", (192,), (320, 3, 2))
        seven = branch(h, "branch7x7x3", (192,), (192, (1, 7)), (192, (7, 1)), (192, 3, 2))
        return jnp.concatenate([three, seven, reduce_pool(h)], axis=-1)


class InceptionE(nn.Module):
    """8x8 block: 1x1; 1x3 and 3x1; the same after a 3x3; pool, by maximum in the last block."""

    max_pool: bool

    @nn.compact
    def __call__(self, h: Array) -> Array:
        """[B, H, W, C] -> [B, H, W, 2048]."""
        one = conv_relu(h, "branch1x1", 320)
        three = fork(conv_relu(h, "branch3x3_1", 384), "branch3x3_2")
        double = fork(branch(h, "branch3x3dbl", (448,), (384, 3)), "branch3x3dbl_3")
        pooled = nn.max_pool(h, (3, 3), padding=((1, 1), (1, 1))) if self.max_pool else average_pool(h)
        return jnp.concatenate([one, *three, *double, conv_relu(pooled, "branch_pool", 192)], axis=-1)


class InceptionV3(nn.Module):
    """InceptionV3: images uint8 [B, H, W, 1 or 3] of any size -> FID's features [B, 2048]."""

    @nn.compact
    def __call__(self, images: Array) -> Array:
        """See the class; the comments are the height and width after the line."""
        h = inception_input(images)
        h = conv_relu(h, "Conv2d_1a_3x3", 32, 3, stride=2, pad=False)  # 149
        h = conv_relu(h, "Conv2d_2a_3x3", 32, 3, pad=False)  # 147
        h = reduce_pool(conv_relu(h, "Conv2d_2b_3x3", 64, 3))  # 73
        h = conv_relu(conv_relu(h, "Conv2d_3b_1x1", 80), "Conv2d_4a_3x3", 192, 3, pad=False)  # 71
        h = reduce_pool(h)  # 35
        for name, pool_width in (("Mixed_5b", 32), ("Mixed_5c", 64), ("Mixed_5d", 64)):
            h = InceptionA(pool_width, name=name)(h)
        h = InceptionB(name="Mixed_6a")(h)  # 17
        for name, width in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192)):
            h = InceptionC(width, name=name)(h)
        h = InceptionD(name="Mixed_7a")(h)  # 8
        h = InceptionE(max_pool=False, name="Mixed_7b")(h)
        h = InceptionE(max_pool=True, name="Mixed_7c")(h)
        return jnp.mean(h, axis=(1, 2))
