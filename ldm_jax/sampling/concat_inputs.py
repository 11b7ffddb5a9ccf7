"""Images for concat conditioning: degraded images of a data set, or a user's files."""

from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from PIL import Image
from scipy.ndimage import distance_transform_edt

from ldm_jax.data.datasets import Dataset
from ldm_jax.diffusion.random import Stream, example_keys
from ldm_jax.errors import InputError
from ldm_jax.models.concat_conditioning import Inpainting, LowResolution, Segmentation
from ldm_jax.pipeline.model import LatentDiffusion
from ldm_jax.runtime.parallel import map_in_batches, parallel_map
from ldm_jax.sampling import image_inputs
from ldm_jax.sampling.sampler import smallest_batch

GREY = 128  # of the masked part, when visualized


class ConcatImages(NamedTuple):
    """N degraded images, or one for all samples."""

    degraded: dict[str, np.ndarray]  # uint8 [N or 1, ...], from `ConcatConditioning.degrade`
    originals: np.ndarray | None = None  # uint8 [N, H, W, C] of a data set
    labels: np.ndarray | None = None  # int32 [N], of a data set with classes


def from_split(model: LatentDiffusion, dataset: Dataset, num: int, seed: int, batch_size: int) -> ConcatImages:
    """The first `num` images of a data set, in turn, degraded; for inpainting, with random boxes of this seed."""
    rows, concat = np.arange(num), model.concat
    examples = dataset[rows % len(dataset)]
    degrade = parallel_map(
        lambda seed, batch: concat.degrade(batch, example_keys(seed, Stream.DEGRADE, 0, batch["id"]))
    )
    batch_size = smallest_batch(num, batch_size, jax.local_device_count())
    degraded = map_in_batches(degrade, np.uint32(seed), examples | {"id": rows.astype(np.int32)}, batch_size)
    return ConcatImages(degraded, examples["x"], examples.get("label"))


def check_segments(model: LatentDiffusion, dataset: Dataset) -> None:
    """Raises InputError for segmentation maps with more classes than the config has, among the first 1,000 images.

    A class beyond them in a later image is none of the classes: its one-hot vector is 0.
    """
    if not isinstance(model.concat, Segmentation):
        return
    highest = dataset[np.arange(min(len(dataset), 1000))]["segments"].max()
    if highest >= model.concat.num_segments:
        raise InputError(
            f"config.concat.num_segments is {model.concat.num_segments}; {dataset.name} has a pixel of class "
            f"{highest}, so it must be {highest + 1} or more"
        )


def from_file(model: LatentDiffusion, path: Path) -> ConcatImages:
    """The low-resolution image or the segmentation map of --concat_image.

    Raises InputError if it cannot be read, or has classes that the model does not have.
    """
    (height, width, channels), crop, flag = model.image_shape, model.defaults.crop, "--concat_image"
    if isinstance(model.concat, LowResolution):
        size = (height // model.concat.factor, width // model.concat.factor)
        return ConcatImages(
            {"small": image_inputs.read_image(path, flag, size=size, channels=channels, crop=crop)[None]}
        )
    segments = image_inputs.read_segments(path, flag, size=(height, width), crop=crop)
    if segments.max() >= model.concat.num_segments:
        raise InputError(
            f"{flag}={path} has class {segments.max()}; the model has 0 to {model.concat.num_segments - 1}"
        )
    return ConcatImages({"segments": segments[None]})


def visualize(model: LatentDiffusion, images: ConcatImages) -> np.ndarray:
    """The degraded images for a grid, uint8 [N, H, W, C]."""
    degraded = images.degraded
    if isinstance(model.concat, LowResolution):
        return degraded["small"].repeat(model.concat.factor, 1).repeat(model.concat.factor, 2)
    if isinstance(model.concat, Inpainting):
        return np.where(degraded["mask"] == 1, np.uint8(GREY), degraded["x"])
    grey = np.linspace(0, 255, model.concat.num_segments).astype(np.uint8)[degraded["segments"]]
    return np.broadcast_to(grey, (*grey.shape[:3], model.image_shape[-1]))


def paste_known(images: ConcatImages | None, samples: np.ndarray) -> np.ndarray:
    """Samples uint8 [N, H, W, C]; those of inpainting with the known pixels pasted in."""
    if images is None or "mask" not in images.degraded:
        return samples
    return np.where(images.degraded["mask"] == 1, samples, images.degraded["x"])


def baseline(model: LatentDiffusion, images: ConcatImages) -> np.ndarray | None:
    """The baseline without a model, uint8 [N, H, W, C]: bicubic, or masked pixels filled from the nearest known ones.

    None for segmentation maps.
    """
    if isinstance(model.concat, LowResolution):
        height, width, _ = model.image_shape
        return np.stack([_bicubic(small, (width, height)) for small in images.degraded["small"]])
    if isinstance(model.concat, Inpainting):
        return np.stack(
            [_filled(x, mask[..., 0] == 1) for x, mask in zip(images.degraded["x"], images.degraded["mask"])]
        )
    return None


def _bicubic(small: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """An image [h, w, C] enlarged to (width, height)."""
    planes = [Image.fromarray(plane).resize(size, Image.Resampling.BICUBIC) for plane in np.moveaxis(small, -1, 0)]
    return np.stack([np.asarray(plane) for plane in planes], axis=-1)


def _filled(x: np.ndarray, masked: np.ndarray) -> np.ndarray:
    if masked.all():
        return np.full_like(x, GREY)
    rows, columns = distance_transform_edt(masked, return_distances=False, return_indices=True)
    return x[rows, columns]
