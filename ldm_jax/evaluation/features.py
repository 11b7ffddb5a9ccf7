"""Feature vectors of images and perceptual distances of pairs, by pretrained networks on stored uint8 images.

Batches have one size (the last one is padded), so each network compiles once.
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

from ldm_jax.config.fields import LPIPS_MIN_SIZE
from ldm_jax.errors import InputError
from ldm_jax.interop.inception_weights import load_inception
from ldm_jax.interop.lpips_weights import load_lpips
from ldm_jax.models.inception import IMAGE_SIZE, InceptionV3
from ldm_jax.models.perceptual import LPIPS, VGG16
from ldm_jax.models.pixels import to_pixels
from ldm_jax.runtime.parallel import map_in_batches
from ldm_jax.sampling.image_grids import check_images


def sha256_of_images(images: np.ndarray) -> str:
    """SHA-256 of the shape, dtype and content of images [N, H, W, C]."""
    digest = hashlib.sha256(f"{images.shape} {images.dtype}".encode())
    digest.update(np.ascontiguousarray(images))
    return digest.hexdigest()


@dataclass(frozen=True)
class FeatureExtractor:
    """A frozen network that maps images to feature vectors."""

    name: str  # of the network: the Fréchet distance is called "FD-VGG16"
    layer: str  # the features, in words
    resize: int  # side of the network's input
    weights_sha256: str  # of the file of weights
    params: Any
    apply: Callable[[Any, jax.Array], jax.Array]  # compiled (params, uint8 [batch_size, H, W, C]) -> [batch_size, D]
    batch_size: int
    latest: dict[str, np.ndarray] = field(default_factory=dict, repr=False, compare=False)  # cache of the last features

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Images uint8 [N, H, W, 1 or 3] -> features float32 [N, D], read-only; `InputError` for anything else."""
        check_images(images, f"the images for {self.name} features")
        key = sha256_of_images(images)
        if key not in self.latest:
            features = map_in_batches(self.apply, self.params, images, self.batch_size)
            features.flags.writeable = False
            self.latest.clear()
            self.latest[key] = features
        return self.latest[key]


@dataclass(frozen=True)
class PerceptualDistance:
    """A frozen network that maps pairs of images to LPIPS; fields as of `FeatureExtractor`."""

    name: str
    resize: int | None  # None: no resize
    min_size: int  # the smallest side of images without resize
    weights_sha256: str
    params: Any
    apply: Callable[[Any, jax.Array, jax.Array], jax.Array]
    batch_size: int

    def __call__(self, images: np.ndarray, others: np.ndarray) -> np.ndarray:
        """Two sets of images uint8 [N, H, W, 1 or 3] -> distances float32 [N]; `InputError` for anything else."""
        check_images(images, "the images to compare")
        if images.shape != others.shape or others.dtype != np.uint8:
            raise InputError(f"{self.name} compares image by image, got {list(images.shape)} and {list(others.shape)}")
        if self.resize is None and min(images.shape[1:3]) < self.min_size:
            raise InputError(
                f"{self.name} needs sides of at least {self.min_size}, got {list(images.shape)}; set resize"
            )
        return map_in_batches(lambda p, pair: self.apply(p, *pair), self.params, (images, others), self.batch_size)


@partial(jax.jit, static_argnames="resize")
def _vgg16_pooled(params: Any, images: jax.Array, resize: int) -> jax.Array:
    size = (images.shape[0], resize, resize, images.shape[3])
    x = jax.image.resize(to_pixels(images), size, "bilinear", antialias=True)
    return jnp.mean(VGG16().apply({"params": params}, x)[-1], axis=(1, 2))


@partial(jax.jit, static_argnames=("net", "resize"))
def _lpips(params: Any, images: jax.Array, others: jax.Array, net: str, resize: int | None) -> jax.Array:
    return LPIPS(net, resize=resize).apply({"params": params}, to_pixels(images), to_pixels(others))


_inception_pooled = jax.jit(lambda params, images: InceptionV3().apply({"params": params}, images))


def vgg16_features(*, resize: int = 32, batch_size: int = 256) -> FeatureExtractor:
    """The spatial mean of relu5_3 of the VGG16 of LPIPS, [N, 512]: ImageNet features whose weights a package includes.

    Images are resized to `resize` x `resize`, at least 16, bilinearly with antialiasing. InputError for a smaller
    `resize`, or missing or damaged weights.
    """
    if resize < 16:
        raise InputError(f"VGG16 features need resize of at least 16, got {resize}")
    params, digest = load_lpips("vgg16")
    params, apply = jax.device_put(params["tower"]), partial(_vgg16_pooled, resize=resize)
    return FeatureExtractor("VGG16", "spatial mean of relu5_3", resize, digest, params, apply, batch_size)


def inception_features(weights: Path, *, batch_size: int = 64) -> FeatureExtractor:
    """The 2048 pooled features that FID is defined on, resized as torch-fidelity does (TensorFlow 1's bilinear).

    pytorch-fid resizes with half-pixel centres instead, so its FID of small images differs slightly. `weights` is the
    published file, see `ldm_jax.interop.inception_weights`; InputError if it is missing, damaged or another file.
    """
    params, digest = load_inception(weights)
    params, layer = jax.device_put(params), "pool3, TensorFlow 1 resize"
    return FeatureExtractor("Inception", layer, IMAGE_SIZE, digest, params, _inception_pooled, batch_size)


def lpips_distance(net: str = "vgg16", *, resize: int | None = None, batch_size: int = 64) -> PerceptualDistance:
    """LPIPS (Zhang et al. 2018) between images, lower is closer.

    Images are resized as by `vgg16_features`, to at least 16, for "alexnet" 31; None: no resize. InputError for a
    smaller `resize`, or missing or damaged weights.
    """
    least = LPIPS_MIN_SIZE[net]
    if resize is not None and resize < least:
        raise InputError(f"LPIPS of {net} needs resize of at least {least}, got {resize}")
    params, digest = load_lpips(net)
    apply = partial(_lpips, net=net, resize=resize)
    return PerceptualDistance(f"LPIPS-{net}", resize, least, digest, jax.device_put(params), apply, batch_size)
