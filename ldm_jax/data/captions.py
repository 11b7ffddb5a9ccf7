"""Captions of an image in the forms of TFDS: a text, a sequence of texts, or of dictionaries with one text each."""

from typing import Any

import numpy as np
import tensorflow_datasets as tfds


def has_captions(feature: Any) -> bool:
    """Whether a TFDS feature holds captions."""
    if isinstance(feature, tfds.features.Sequence):
        return _is_text(feature.feature) or len(_text_fields(feature.feature)) == 1
    return _is_text(feature)


def read_captions(feature: Any, value: Any) -> tuple[str, ...]:
    """The captions in an example's `value` of such a feature; ("",) if there are none."""
    if not isinstance(feature, tfds.features.Sequence):
        return (_text(value),)
    values = value[_text_fields(feature.feature)[0]] if isinstance(value, dict) else value
    return tuple(map(_text, values)) or ("",)


def _is_text(feature: Any) -> bool:
    return isinstance(feature, tfds.features.Tensor) and feature.shape == () and feature.np_dtype == np.object_


def _text_fields(feature: Any) -> list[str]:
    """The names of the texts in a dictionary of features; none for any other feature."""
    fields = feature.items() if isinstance(feature, tfds.features.FeaturesDict) else ()
    return [name for name, inner in fields if _is_text(inner)]


def _text(value: bytes | str) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
