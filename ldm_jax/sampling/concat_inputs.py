"""What a model with a map condition is given: taken from the pictures of a split, or read from a user's files."""

from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image
from scipy.ndimage import distance_transform_edt

from ldm_jax.data.datasets import Dataset
from ldm_jax.data.images import fit_segments
from ldm_jax.diffusion.random import Stream, example_keys
from ldm_jax.errors import InputError
from ldm_jax.pipeline import from_config as pipeline_from_config
from ldm_jax.runtime.parallel import map_in_batches, parallel_map
from ldm_jax.sampling import image_inputs
from ldm_jax.sampling.generate import smallest_batch

GREY = 128  # how a hidden part is shown


class Given(NamedTuple):
    """What is known of N pictures, or of one that is drawn again and again."""

    known: dict[str, np.ndarray]  # uint8 [N or 1, ...], as `MapCondition.know` has it
    originals: np.ndarray | None = None  # uint8 [N, H, W, C], if they are there to compare with
    labels: np.ndarray | None = None  # int32 [N], their classes, in labelled sets


def from_split(config: ConfigDict, dataset: Dataset, num: int, seed: int) -> Given:
    """What is known of the first `num` pictures of a data set, which goes round; for inpainting, hidden by the seed."""
    condition, rows = pipeline_from_config.build_map_condition(config), np.arange(num)
    examples = dataset[rows % len(dataset)]
    know = parallel_map(lambda seed, batch: condition.know(batch, example_keys(seed, Stream.DEGRADE, 0, batch["id"])))
    batch = examples | {"id": rows.astype(np.int32)}
    batch_size = smallest_batch(num, config.evaluation.batch_size, jax.local_device_count())
    known = map_in_batches(know, np.uint32(seed), batch, batch_size)
    return Given(known, examples["x"], examples.get("label"))


def check_segments(config: ConfigDict, dataset: Dataset) -> None:
    """Raises InputError, before anything is trained, for maps that the data set lacks or that have too many classes."""
    if config.concat.kind != "segments":
        return
    some = dataset[np.arange(min(len(dataset), 1000))]["segments"]
    if some.max() >= config.concat.num_segments:
        raise InputError(
            f"config.concat.num_segments is {config.concat.num_segments}; {dataset.name} has a pixel of class "
            f"{some.max()}, so it must be {some.max() + 1} or more"
        )


def from_map(config: ConfigDict, path: Path) -> Given:
    """A small picture, or a map of segments, as --map names it.

    Raises:
      InputError: it cannot be read, or has classes that the model does not know.
    """
    data, concat, (height, width) = config.data, config.concat, pipeline_from_config.picture_size(config)
    if concat.kind == "low_resolution":
        small_size = (height // concat.factor, width // concat.factor)
        small = image_inputs.read_image(path, "--map", size=small_size, channels=data.channels, crop=data.crop)
        return Given({"small": small[None]})
    segments = fit_segments(image_inputs.read_picture(path, "--map"), size=(height, width), crop=data.crop)
    if segments.max() >= concat.num_segments:
        raise InputError(
            f"--map={path} has a pixel of class {segments.max()}; the model knows 0 to {concat.num_segments - 1}"
        )
    return Given({"segments": segments[None]})


def from_masked(image: np.ndarray, mask: np.ndarray) -> Given:
    """A picture uint8 [H, W, C] to be drawn anew where the mask, bool [H, W], says so."""
    return Given({"x": image[None], "mask": mask[None, ..., None].astype(np.uint8)})


def shown(config: ConfigDict, given: Given) -> np.ndarray:
    """What is known, for people: uint8 [N, H, W, C]."""
    known = given.known
    if config.concat.kind == "low_resolution":
        return known["small"].repeat(config.concat.factor, 1).repeat(config.concat.factor, 2)
    if config.concat.kind == "inpainting":
        return np.where(known["mask"] == 1, np.uint8(GREY), known["x"])
    brightness = np.linspace(0, 255, config.concat.num_segments).astype(np.uint8)
    grey = brightness[known["segments"]]
    return np.broadcast_to(grey, (*grey.shape[:3], config.data.channels))


def keep_known(given: Given | None, images: np.ndarray) -> np.ndarray:
    """The images, where a part of them is known bit by bit with that put back."""
    if given is None or "mask" not in given.known:
        return images
    return np.where(given.known["mask"] == 1, images, given.known["x"])


def baseline(config: ConfigDict, given: Given) -> np.ndarray | None:
    """What needs no model: bicubic enlargement, or each hidden pixel like the nearest known one; uint8 [N, H, W, C].

    None for segments, of which there is none.
    """
    if config.concat.kind == "low_resolution":
        size = pipeline_from_config.picture_size(config)
        return np.stack([_enlarged(small, size[::-1]) for small in given.known["small"]])
    if config.concat.kind == "inpainting":
        return np.stack([_filled(x, mask[..., 0] == 1) for x, mask in zip(given.known["x"], given.known["mask"])])
    return None


def _enlarged(small: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """To (width, height)."""
    planes = [Image.fromarray(plane).resize(size, Image.Resampling.BICUBIC) for plane in np.moveaxis(small, -1, 0)]
    return np.stack([np.asarray(plane) for plane in planes], axis=-1)


def _filled(x: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    if hidden.all():
        return np.full_like(x, GREY)
    rows, columns = distance_transform_edt(hidden, return_distances=False, return_indices=True)
    return x[rows, columns]
