"""Data sets from config fields."""

from typing import Any

from ml_collections import ConfigDict

from ldm_jax.data.datasets import Dataset, load_buckets, load_dataset


def load_split(config: ConfigDict, split: str) -> Dataset:
    """One split of the config's data set; see `load_dataset` for the errors."""
    return load_dataset(config.data.name, split, **_data_fields(config))


def load_train_buckets(config: ConfigDict) -> list[Dataset]:
    """The training split in buckets of the pictures' own proportions; see `load_dataset` for the errors."""
    data = config.data
    return load_buckets(data.name, data.train_split, step=data.bucket_step, **_data_fields(config))


def _data_fields(config: ConfigDict) -> dict[str, Any]:
    data = config.data
    keys = ("image_key", "label_key", "segments_key", "caption_key")
    same = ("image_size", "channels", "crop", *keys)
    return {
        "data_dir": data.dir,
        "manual_dir": data.path or None,
        "memory_limit": int(data.memory_limit_gb * 2**30),
        "group_key": data.group_key,
        **{name: data[name] for name in same},
    }
