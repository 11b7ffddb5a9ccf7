"""What the parts of a job share and train on: the run, its feeds, its cached latents."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from ldm_jax.data import from_config as data_from_config
from ldm_jax.data.datasets import Dataset
from ldm_jax.data.feeds import BucketFeed, DeviceFeed, HostFeed
from ldm_jax.models.first_stage import make_first_stage
from ldm_jax.pipeline import base_model, from_run
from ldm_jax.pipeline import from_config as pipeline_from_config
from ldm_jax.run_folder.log import Log
from ldm_jax.runtime.interrupt import InterruptWatch
from ldm_jax.training import latents


class Run(NamedTuple):
    """What the parts of a run share."""

    config: ConfigDict
    workdir: Path
    train_set: Dataset
    test_set: Dataset
    log: Log
    watch: InterruptWatch
    base: base_model.Base | None  # the model that is fine-tuned, if one is


def make_feed(
    config: ConfigDict, source: Any, batch_size: int, kinds: np.ndarray | None = None
) -> DeviceFeed | HostFeed:
    """A feed that keeps `source` (a Dataset or Latents) on the device if it is small enough, else streams it."""
    limit = config.data.memory_limit_gb * 2**30
    if source.arrays is not None and sum(values.nbytes for values in source.arrays.values()) <= limit:
        arrays = {name: np.asarray(values) for name, values in source.arrays.items()}
        return DeviceFeed(arrays, batch_size, config.seed, **_place(), kinds=kinds)
    return HostFeed(source, batch_size, config.seed, **_place(), kinds=kinds)


def _place() -> dict[str, int]:
    """Which part of each batch is this host's."""
    return {"process_index": jax.process_index(), "process_count": jax.process_count()}


def latents_feed(run: Run, batch_size: int) -> DeviceFeed | HostFeed | BucketFeed:
    """A feed of the cached latents; of pixels where there is no autoencoder, or a map is made of them in each step."""
    config = run.config
    if config.data.bucket_step:
        return BucketFeed(encode_buckets(run), batch_size, config.seed, **_place())
    from_pixels = config.autoencoder.kind == "none" or config.concat.kind != "none"
    return make_feed(config, run.train_set if from_pixels else encode_train_set(run), batch_size, run.train_set.kinds)


def encode_train_set(run: Run) -> latents.Latents:
    """The cached latents of the training set; encodes it if they are not there yet."""
    return _encode(run, run.train_set)


def encode_buckets(run: Run) -> list[latents.Latents]:
    """The same of the training set's pictures in about their own proportions, those of each shape by themselves."""
    buckets = data_from_config.load_train_buckets(run.config)
    told = ", ".join(f"{h}x{w} ({n:,})" for n, h, w, _ in (bucket.shape for bucket in buckets))
    print(f"     height x width of the pictures: {told}", flush=True)
    return [_encode(run, bucket) for bucket in buckets]


def _encode(run: Run, dataset: Dataset) -> latents.Latents:
    if run.base:
        first_stage, params = make_first_stage(run.base.model.autoencoder), run.base.params["autoencoder"]
    else:
        first_stage, params = (
            pipeline_from_config.build_first_stage(run.config),
            from_run.load_autoencoder_params(run.workdir),
        )
    other = run.config.autoencoder.checkpoint  # whose latents need not be made again
    return latents.cached_latents(
        run.workdir / "latents",
        first_stage=first_stage,
        params=params,
        dataset=dataset,
        flip=run.config.data.flip,
        batch_size=run.config.evaluation.batch_size,
        elsewhere=Path(other) / "latents" if other else None,
    )
