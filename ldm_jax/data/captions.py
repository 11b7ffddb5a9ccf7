"""The texts of a picture, in each of the forms in which TFDS's data sets have them.

One `Text`; a sequence of these; or a sequence of dictionaries with one text in each, as in COCO's captions.
"""

from typing import Any

import numpy as np


def has_captions(feature: Any) -> bool:
    """Whether a feature is one of these forms."""
    import tensorflow_datasets as tfds

    if isinstance(feature, tfds.features.Sequence):
        return _is_text(feature.feature) or len(_text_fields(feature.feature)) == 1
    return _is_text(feature)


def read_captions(feature: Any, value: Any) -> tuple[str, ...]:
    """The texts in an example's `value` of such a feature; one that has none has the empty one."""
    import tensorflow_datasets as tfds

    if not isinstance(feature, tfds.features.Sequence):
        return (_text(value),)
    values = value[_text_fields(feature.feature)[0]] if isinstance(value, dict) else value
    return tuple(map(_text, values)) or ("",)


def _is_text(feature: Any) -> bool:
    import tensorflow_datasets as tfds

    return isinstance(feature, tfds.features.Tensor) and feature.shape == () and feature.np_dtype == np.object_


def _text_fields(feature: Any) -> list[str]:
    """The names of the texts in a dictionary of features; none in any other feature."""
    import tensorflow_datasets as tfds

    if not isinstance(feature, tfds.features.FeaturesDict):
        return []
    return [name for name, inner in feature.items() if _is_text(inner)]


def _text(value: bytes | str) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
