"""The data sets of a config."""

from typing import Any

from ml_collections import ConfigDict

from ldm_jax.data.datasets import Dataset, load_buckets, load_dataset
from ldm_jax.data.prompt_templates import with_prompts

KEYS = ("image_key", "label_key", "segments_key", "caption_key", "group_key")
FIELDS = ("image_size", "channels", "crop", *KEYS)


def load_split(config: ConfigDict, split: str) -> Dataset:
    """One split of the config's data set, in textual inversion with prompts; see `load_dataset` for the errors."""
    dataset, inversion = load_dataset(config.data.name, split, **_options(config.data)), config.textual_inversion
    if not inversion.token or config.data.caption_key == "none":
        return dataset
    return with_prompts(dataset, inversion.token, inversion.learnable_property)


def load_train_buckets(config: ConfigDict) -> list[Dataset]:
    """The training split in aspect ratio buckets; see `load_dataset` for the errors."""
    data = config.data
    return load_buckets(data.name, data.train_split, step=data.bucket_step, **_options(data))


def _options(data: ConfigDict) -> dict[str, Any]:
    folders = {"data_dir": data.dir, "manual_dir": data.path or None}
    return {name: data[name] for name in FIELDS} | folders | {"memory_limit": int(data.memory_limit_gb * 2**30)}
