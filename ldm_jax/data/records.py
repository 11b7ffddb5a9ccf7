"""Reading any image data set that TFDS has prepared as ArrayRecord: by index, from the disk, without TensorFlow."""

import copy
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ldm_jax.data.captions import has_captions, read_captions
from ldm_jax.data.images import CROPS, MODES, decode, fit, fit_segments, shape_of
from ldm_jax.errors import InputError

CHUNK = 256  # records that one thread reads at a time
SAMPLED_BYTES = 1 << 16  # at both ends of each file, for the fingerprint


class Records:
    """The examples of one split: `records[[3, 5]]` is {"x": uint8 [2, H, W, C], "label": int32 [2], if labelled,
    "segments": uint8 [2, H, W, 1], if asked for}.

    Args:
        folder: a prepared data set, where its dataset_info.json is.
        split: "train", or any of TFDS's expressions: "train[:90%]", "train+test".
        image_size: height and width to bring the pictures to; None keeps theirs, if they agree.
        channels: 1 or 3; None keeps what the data set has, without transparency.
        crop: "center" or "none", see `images.fit`.
        image_key: the feature with the picture, or "auto" for the only one there is.
        label_key: the `ClassLabel` feature, "auto" for the only one if there is one, or "none".
        segments_key: the feature with a map of classes, an image whose pixels are their numbers, or "none".
        caption_key: the feature with a text or a sequence of texts, "auto" for the only one there is, or "none". With
            texts, each that the data set has, in whatever split, is a class of its own (of a sequence, all of a
            picture's together), and the label is its number.
        group_key: the feature, a text or a number, whose values are the groups of images, or "none".

    Attributes:
        shape: (N, H, W, C).
        class_names: of the labels, of several texts the first; empty without labels.
        captions: all texts of each class, at least one; empty without texts.
        present: the classes that this split has, if they are captions.
        groups: the group of each image, int64 [N]; None without groups.
        fingerprint: a hash of the arguments and of the record files' names, sizes, beginnings and ends.

    Raises:
        InputError: the folder, the split or the features are not what is needed.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        *,
        image_size: int | None = None,
        channels: int | None = None,
        crop: str = "center",
        image_key: str = "auto",
        label_key: str = "auto",
        segments_key: str = "none",
        caption_key: str = "none",
        group_key: str = "none",
    ) -> None:
        _check_arguments(image_size, channels, crop)
        import tensorflow_datasets as tfds

        self._where = f"{folder} ({split})"
        info, self._source = _open(folder, split)
        features = info.features
        self._image_key = _choose(features, image_key, "image", _is_image, self._where)
        self._label_key = self._caption_key = None
        if caption_key != "none":
            self._caption_key = _choose(features, caption_key, "caption", has_captions, self._where)
            if self._caption_key is None:
                raise InputError(f"{self._where} has no texts, only {', '.join(sorted(features))}")
        elif label_key != "none":
            self._label_key = _choose(features, label_key, "label", _is_class_label, self._where)
        if self._image_key is None:
            raise InputError(f"{self._where} has no pictures, only {', '.join(sorted(features))}")
        self._segments_key = None
        if segments_key != "none":
            self._segments_key = _choose(features, segments_key, "segments", _is_image, self._where)
        keys = (self._image_key, self._label_key, self._segments_key, self._caption_key)
        used = {key: features[key] for key in keys if key}
        self._features = tfds.features.FeaturesDict(used)  # the rest of a record is never decoded
        image = features[self._image_key]
        self._image_keys = [key for key in (self._image_key, self._segments_key) if key]
        # TFDS would decode with OpenCV or Pillow, whichever is there, and a palette as if it were grey: we do it.
        encoded = [key for key, feature in used.items() if isinstance(feature, tfds.features.Image)]
        self._decoders = {key: tfds.decode.SkipDecoding() for key in encoded}

        self._rows = np.arange(len(self._source))
        own_channels = image.shape[2] if len(image.shape) == 3 else 1
        self._fit = {"size": image_size, "channels": channels or (1 if own_channels in (1, 2) else 3), "crop": crop}
        height, width = (image_size, image_size) if image_size else image.shape[:2]
        if None in (height, width):
            height, width = self._decode(0, self._source[0])["x"].shape[:2]  # `__getitem__` will see whether they agree
        self.shape = (len(self._source), height, width, self._fit["channels"])
        self.class_names = tuple(features[self._label_key].names) if self._label_key else ()
        self.captions: tuple[tuple[str, ...], ...] = ()
        self.present: tuple[int, ...] = ()
        if self._caption_key:
            self.captions = tuple(sorted(set(_captions(folder, "all", self._caption_key))))
            self.class_names = tuple(captions[0] for captions in self.captions)
            self._label_of = {captions: i for i, captions in enumerate(self.captions)}
            self.present = tuple(sorted({self._label_of[c] for c in _captions(folder, split, self._caption_key)}))
        self.groups: np.ndarray | None = None
        if group_key != "none":
            group_key = _choose(features, group_key, "group", _is_group, self._where)
            if group_key is None:
                raise InputError(f"{self._where} tells no groups apart, it has only {', '.join(sorted(features))}")
            self.groups = np.unique(list(_values(folder, split, group_key)), return_inverse=True)[1]
        self.fingerprint = _fingerprint(info.splits[split].file_instructions, [self.shape, self._fit, list(used)])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        """The examples at `indices`, stacked; raises InputError, with its number, for one that is damaged."""
        indices = [int(self._rows[index]) for index in indices]
        examples = [self._decode(index, content) for index, content in zip(indices, self._contents(indices))]
        for index, example in zip(indices, examples):
            if example["x"].shape != self.shape[1:]:
                raise InputError(
                    f"{self._where}: example {index} is {list(example['x'].shape)}, others are "
                    f"{list(self.shape[1:])}: set image_size"
                )
        return {name: np.stack([example[name] for example in examples]) for name in examples[0]}

    def shapes(self) -> np.ndarray:
        """Height and width of every picture as it is stored, int64 [N, 2], mostly by the headers alone.

        Raises:
            InputError: one is damaged.
        """
        found = []
        for start in range(0, len(self), CHUNK):
            rows = [int(row) for row in self._rows[start : start + CHUNK]]
            found += [self._shape(row, content) for row, content in zip(rows, self._contents(rows))]
        return np.array(found)

    def _shape(self, row: int, content: bytes) -> tuple[int, int]:
        try:
            image = self._features.deserialize_example_np(content, decoders=self._decoders or None)[self._image_key]
            return shape_of(image) if self._image_key in self._decoders else image.shape[:2]
        except Exception as error:
            raise InputError(f"{self._where}: example {row} cannot be read: {_first_line(error)}") from error

    def bucket(self, size: tuple[int, int], rows: np.ndarray) -> "Records":
        """Some of the examples, [n] of their numbers, in another size (height, width)."""
        some = copy.copy(self)
        some._rows, some._fit, some.shape = (
            self._rows[rows],
            self._fit | {"size": size},
            (len(rows), *size, self.shape[3]),
        )
        some.groups = None if self.groups is None else self.groups[rows]
        told = json.dumps([self.fingerprint, size, some._rows.tolist()])
        some.fingerprint = hashlib.sha256(told.encode()).hexdigest()
        return some

    def _contents(self, indices: list[int]) -> Sequence[bytes]:
        try:
            return self._source.__getitems__(indices)  # one call: ten times as fast as one by one
        except Exception as error:
            raise InputError(
                f"{self._where}: a record in {min(indices)}..{max(indices)} is damaged: {_first_line(error)}"
            ) from error

    def _decode(self, index: int, content: bytes) -> dict[str, np.ndarray]:
        try:
            example = self._features.deserialize_example_np(content, decoders=self._decoders or None)
            images = {key: decode(example[key]) if key in self._decoders else example[key] for key in self._image_keys}
            arrays = {"x": fit(images[self._image_key], **self._fit)}
            if self._segments_key:
                place = {"size": self._fit["size"], "crop": self._fit["crop"]}
                arrays["segments"] = fit_segments(images[self._segments_key], **place)
        except Exception as error:  # what a damaged record raises depends on where the damage is
            raise InputError(f"{self._where}: example {index} cannot be read: {_first_line(error)}") from error
        if self._caption_key:
            captions = read_captions(self._features[self._caption_key], example[self._caption_key])
            return arrays | {"label": np.int32(self._label_of[captions])}
        if self._label_key is None:
            return arrays
        label = np.int32(example[self._label_key])
        if label < 0:
            raise InputError(f"{self._where}: example {index} has no label: use label_key=none")
        return arrays | {"label": label}

    def load(self) -> dict[str, np.ndarray]:
        """All examples in order, as `self[range(N)]` but by one thread per core and with a progress bar."""
        arrays = {"x": np.empty(self.shape, np.uint8)}
        if self.class_names:
            arrays["label"] = np.empty(len(self), np.int32)
        if self._segments_key:
            arrays["segments"] = np.empty((*self.shape[:3], 1), np.uint8)

        def read(start: int) -> int:
            chunk = self[range(start, min(start + CHUNK, len(self)))]
            for name, values in chunk.items():
                arrays[name][start : start + CHUNK] = values
            return len(chunk["x"])

        bar = tqdm(desc=f"Reading {self._where}", total=len(self), delay=3, leave=False, disable=None)
        with ThreadPoolExecutor(os.cpu_count()) as pool, bar:
            for count in pool.map(read, range(0, len(self), CHUNK)):
                bar.update(count)
        return arrays


def _check_arguments(image_size: int | None, channels: int | None, crop: str) -> None:
    if image_size is not None and image_size < 1:
        raise InputError(f"image_size={image_size}: it is the height and width in pixels, at least 1")
    if channels not in (None, *MODES):
        raise InputError(f"channels={channels}: pictures have 1 (grey) or 3 (colour)")
    if crop not in CROPS:
        raise InputError(f"crop={crop!r} is not one of {', '.join(CROPS)}")


def _open(folder: Path, split: str) -> tuple[Any, Sequence[bytes]]:
    """TFDS's description of a prepared data set, and the raw records of a split."""
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder_from_directory(folder)
        format_ = builder.info.file_format.value
    except Exception as error:  # a damaged description can raise nearly anything
        raise InputError(f"{folder}: not a prepared TFDS data set ({_first_line(error)})") from error
    if format_ != "array_record":
        raise InputError(
            f"{folder} is prepared as {format_}, which has no random access: prepare it with file_format=array_record"
        )
    try:
        source = builder.as_data_source(split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
        source[0]  # opens the file
    except Exception as error:
        splits = ", ".join(f"{name} ({info.num_examples})" for name, info in builder.info.splits.items())
        raise InputError(f"{folder}: no split {split!r} to read ({_first_line(error)}); there is {splits}") from error
    return builder.info, source


def _captions(folder: Path, split: str, key: str) -> Iterator[tuple[str, ...]]:
    """The texts of every picture that a split has."""
    feature = _open(folder, split)[0].features[key]
    return (read_captions(feature, value) for value in _values(folder, split, key))


def _values(folder: Path, split: str, key: str) -> Iterator[Any]:
    """What every example of a split has for one feature."""
    import tensorflow_datasets as tfds

    info, source = _open(folder, split)
    alone = tfds.features.FeaturesDict({key: info.features[key]})
    for start in range(0, len(source), CHUNK):
        for content in source.__getitems__(range(start, min(start + CHUNK, len(source)))):
            yield alone.deserialize_example_np(content)[key]


def _choose(features: Any, key: str, usual: str, fits: Callable[[Any], bool], where: str) -> str | None:
    """The feature that `key` asks for: itself, or for "auto" the usual (or its plural) or the only one that `fits`."""
    candidates = sorted(name for name, feature in features.items() if fits(feature))
    if key == "auto":
        preferred = [name for name in (usual, f"{usual}s") if name in candidates] or candidates
        if len(preferred) > 1 and usual not in preferred:
            raise InputError(f"{where} has several: set {usual}_key to one of {', '.join(candidates)}")
        return next(iter(preferred), None)
    if key not in candidates:
        raise InputError(f"{usual}_key={key!r}: no such {usual} in {where}; there is {', '.join(candidates) or 'none'}")
    return key


def _is_image(feature: Any) -> bool:
    """A picture: an encoded one, or an array of bytes, [H, W] or [H, W, C]."""
    import tensorflow_datasets as tfds

    if isinstance(feature, tfds.features.Image):
        return feature.np_dtype != np.float32  # TFDS hides those in the bytes of an RGBA picture
    return isinstance(feature, tfds.features.Tensor) and feature.np_dtype == np.uint8 and len(feature.shape) in (2, 3)


def _is_group(feature: Any) -> bool:
    """One text, class or number."""
    import tensorflow_datasets as tfds

    return isinstance(feature, tfds.features.Tensor) and feature.shape == ()


def _is_class_label(feature: Any) -> bool:
    import tensorflow_datasets as tfds

    return isinstance(feature, tfds.features.ClassLabel) and feature.num_classes is not None


def _fingerprint(instructions: Sequence[Any], arguments: list) -> str:
    """A hash of what the examples depend on, without reading them all."""
    digest = hashlib.sha256(json.dumps(arguments).encode())
    for file in instructions:
        path = Path(file.filename)
        digest.update(f"{path.name} {path.stat().st_size} {file.skip} {file.take}".encode())
        with path.open("rb") as content:
            digest.update(content.read(SAMPLED_BYTES))
            content.seek(max(0, path.stat().st_size - SAMPLED_BYTES))
            digest.update(content.read())  # the end holds the index: where each record begins
    return digest.hexdigest()


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
