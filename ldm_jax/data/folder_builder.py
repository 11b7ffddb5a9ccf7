"""The data set of a folder of images with classes or captions, prepared once for each content of the folder."""

import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from tqdm import tqdm

from ldm_jax.data.image_files import Splits, readable, show
from ldm_jax.data.prepare import Builder, build, one_at_a_time
from ldm_jax.data.skipped import LEFT_OUT, Skipped, report
from ldm_jax.errors import InputError
from ldm_jax.runtime.files import read_json, write_json

VERSION = "1.0.0"
SKIPPED = "skipped.json"  # in the folder of the prepared data set: the images that cannot be read
NAMED = 20  # classes with their numbers in a summary, at most


def folder_builder(name: str, data_dir: Path, splits: Splits, target: str) -> Builder:
    """The TFDS builder of images in folders, each with a class ("label") or a "caption" as its `target`."""
    features = {"image": tfds.features.Image()}  # encoded files; only arrays would need TensorFlow
    classes = sorted({label for images in splits.values() for _, label in images if label is not None})
    if target == "caption":
        features["caption"] = tfds.features.Text()
    elif classes:
        features["label"] = tfds.features.ClassLabel(names=classes)

    def examples(split: str) -> Iterator[tuple[bytes, dict[str, Any]]]:
        for path, label in tqdm(splits[split], desc=f"Preparing {split}", leave=False, disable=None):
            image = {"image": io.BytesIO(path.read_bytes())}
            yield os.fsencode(path), image | ({} if label is None else {target: label})  # names need not be UTF-8

    return Builder(name, VERSION, data_dir, features, {split: examples(split) for split in splits})


def prepare_content(
    data_dir: Path,
    prefix: str,
    splits: Splits,
    skipped: Skipped,
    *,
    target: str,
    check: Callable[[Splits, Skipped], None],
    arrange: Callable[[Splits], Splits] = lambda splits: splits,
) -> Path:
    """The folder of the data set of these images, below `data_dir`; one for each content. Prints what is left out.

    Args:
        data_dir: the folder of data sets.
        prefix: of the data set's name; a hash of the content follows.
        splits: all images, with their classes or captions.
        skipped: what the source has besides.
        target: see `folder_builder`.
        check: raises InputError if the images that can be read are too few; it also gets all that is left out.
        arrange: the splits of the data set, of those that can be read.
    """
    home = data_dir / f"{prefix}_{_content_hash(splits)}"
    with one_at_a_time(home):
        if not (home / VERSION).is_dir():
            splits, damaged = readable(splits)
            check(splits, [*skipped, *damaged])
            write_json(home / SKIPPED, damaged)
            build(folder_builder(home.name, data_dir, arrange(splits), target))
        damaged = [tuple(entry) for entry in read_json(home / SKIPPED)]
        report([*skipped, *damaged], home / LEFT_OUT)
    return home / VERSION


def _content_hash(splits: Splits) -> str:
    """A hash of the classes or captions and of the images' names, sizes and modification times."""
    digest = hashlib.sha256()
    for split, images in splits.items():
        for path, caption in images:
            stat = path.stat()
            digest.update(json.dumps([split, str(path), stat.st_size, stat.st_mtime_ns, caption]).encode())
    return digest.hexdigest()[:12]


def describe(splits: Splits) -> list[str]:
    """One line for each split: the number of its images, and of those of each class."""
    lines = []
    for split, images in splits.items():
        counts = Counter(label for _, label in images if label is not None)
        classes = ", ".join(f"{show(label)} ({count})" for label, count in sorted(counts.items())[:NAMED])
        more = f", and {len(counts) - NAMED} more" if len(counts) > NAMED else ""
        number = f"{len(counts)} {'class' if len(counts) == 1 else 'classes'}"
        images_in = f"{split}: {len(images)} {'image' if len(images) == 1 else 'images'}"
        lines.append(f"{images_in} in {number}: {classes}{more}" if counts else f"{images_in}, without classes")
    return lines


@cache
def say_once(line: str) -> None:
    """Prints a line on the images found, once in a process, though several splits are read from one source."""
    print(line, flush=True)


def check_path(name: str, path: Path | None, content: str) -> Path:
    """The folder config.data.path; InputError if there is none."""
    if path is None:
        raise InputError(f"config.data.name={name} needs config.data.path: the folder of your {content}")
    if not path.is_dir():
        raise InputError(f"config.data.path={show(path)} is no folder; it must be one of {content}")
    return path
