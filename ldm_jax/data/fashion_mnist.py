"""Fashion-MNIST (Xiao, Rasul & Vollgraf 2017, arXiv:1708.07747), prepared as a TFDS data set without TensorFlow.

The feature is a `Tensor` of uint8, as the PNG encoder of `Image` is TensorFlow's. Examples keep the files' order.
"""

import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pooch
import tensorflow_datasets as tfds

from ldm_jax.data.idx import gunzip, parse_idx
from ldm_jax.data.prepare import Builder, build, one_at_a_time
from ldm_jax.errors import InputError

HOME = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
DEBIAN_FOLDER = "usr/share/datasets/fashion-mnist"  # where the package dataset-fashion-mnist puts the files
# File -> SHA-256 of its unzipped content. (The archives differ: Debian has compressed the files again.)
SHA256 = {
    "train-images-idx3-ubyte.gz": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte.gz": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte.gz": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte.gz": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
# File -> MD5 of the archive at HOME.
MD5 = {
    "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
    "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
    "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
}
ATTEMPTS, TIMEOUT_S = 4, 30
VERSION = "1.0.0"
PREFIX = {"train": "train", "test": "t10k"}
CLASS_NAMES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat")
CLASS_NAMES += ("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")


def _examples(images: np.ndarray, labels: np.ndarray) -> Iterator[tuple[int, dict[str, Any]]]:
    for k, (image, label) in enumerate(zip(images, labels)):
        yield k, {"image": image, "label": int(label)}


def read_split(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [N, 28, 28, 1] and labels uint8 [N] of the split "train" or "test".

    Raises InputError if a file is missing, damaged, or not Fashion-MNIST's (MNIST's have the same names and sizes).
    """
    images = _checked(folder / f"{PREFIX[split]}-images-idx3-ubyte.gz", axes=3)
    labels = _checked(folder / f"{PREFIX[split]}-labels-idx1-ubyte.gz", axes=1)
    return images[..., None], labels


def _checked(path: Path, *, axes: int) -> np.ndarray:
    content = gunzip(path)
    array, digest = parse_idx(content, axes=axes, where=path), hashlib.sha256(content).hexdigest()
    if digest != SHA256[path.name]:
        expected = SHA256[path.name]
        raise InputError(f"{path}: not Fashion-MNIST's file: sha256 of the content is {digest}, not {expected}")
    return array


def find_files(data_dir: Path, manual_dir: Path | None) -> Path:
    """The folder of the four files: `manual_dir`, or for None the Debian package's, else that of downloads.

    Raises InputError if `manual_dir` lacks a file, or there are no files and they cannot be downloaded.
    """
    downloads = data_dir / "downloads" / "fashion_mnist"
    candidates = [manual_dir] if manual_dir else [data_dir / DEBIAN_FOLDER, Path("/", DEBIAN_FOLDER), downloads]
    for folder in candidates:
        if all((folder / name).is_file() for name in SHA256):
            return folder
    if manual_dir:
        missing = [name for name in SHA256 if not (manual_dir / name).is_file()]
        raise InputError(f"{manual_dir}: Fashion-MNIST's files are not all there: {', '.join(missing)} missing")
    try:
        download(downloads)
    except InputError as error:
        raise InputError(
            f"Fashion-MNIST's files are not in {', '.join(map(str, candidates))}, and {error}; "
            f"`apt-get install dataset-fashion-mnist` brings them, or put the four .gz files in {downloads}"
        ) from None
    return downloads


def download(folder: Path) -> None:
    """Downloads the missing ones of the four files; InputError if `HOME` cannot be reached or has other files."""
    pooch.get_logger().setLevel(logging.ERROR)
    registry = {name: f"md5:{digest}" for name, digest in MD5.items()}
    files = pooch.create(folder, f"{HOME}/", registry=registry, retry_if_failed=ATTEMPTS - 1)
    for name in registry:
        try:
            files.fetch(name, downloader=pooch.HTTPDownloader(progressbar=True, timeout=TIMEOUT_S))
        except (OSError, ValueError) as error:  # of the network, or of the checksum
            raise InputError(f"cannot download {HOME}/{name}: {' '.join(str(error).split())}") from error


def prepare(data_dir: Path, manual_dir: Path | None = None) -> Path:
    """The folder of the prepared data set under `data_dir`; prepares it at the first call (seconds).

    Args:
        data_dir: the folder of data sets; also searched for the Debian package, unpacked there by `make data`.
        manual_dir: the folder of the four IDX files; None searches for them, then downloads them.
    """
    done = data_dir / "fashion_mnist" / VERSION
    if not done.is_dir():
        with one_at_a_time(done.parent):
            if not done.is_dir():
                folder = find_files(data_dir, manual_dir)
                image = tfds.features.Tensor(shape=(28, 28, 1), dtype=np.uint8, encoding=tfds.features.Encoding.BYTES)
                features = {"image": image, "label": tfds.features.ClassLabel(names=list(CLASS_NAMES))}
                splits = {split: _examples(*read_split(folder, split)) for split in PREFIX}
                build(Builder("fashion_mnist", VERSION, data_dir, features, splits, shuffle=False))
    return done
