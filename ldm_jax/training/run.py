"""What the stages of a run share: the run itself, the model that training starts from, feeds, cached latents."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from ldm_jax.config.rules import text_conditioned
from ldm_jax.data import from_config as data_from_config
from ldm_jax.data.datasets import Dataset
from ldm_jax.data.feeds import BucketFeed, DeviceFeed, HostFeed
from ldm_jax.models.first_stage import FirstStage
from ldm_jax.pipeline.from_config import init_params
from ldm_jax.pipeline.from_run import untrained
from ldm_jax.pipeline.model import LatentDiffusion, Params
from ldm_jax.run_folder.log import Log
from ldm_jax.runtime.interrupt import InterruptWatch
from ldm_jax.training import latents
from ldm_jax.training.loop import initial_state


class Run(NamedTuple):
    """What the stages of a run share."""

    config: ConfigDict
    workdir: Path
    train_set: Dataset
    test_set: Dataset
    log: Log
    watch: InterruptWatch
    base: tuple[LatentDiffusion, Params] | None  # the model of config.init_from

    @property
    def sampling_set(self) -> Dataset:
        """The split whose captions or images condition the samples of the run: see `recipe_of_run`."""
        return self.train_set if text_conditioned(self.config) else self.test_set


def initial_model(run: Run) -> tuple[LatentDiffusion, Params]:
    """The model that diffusion training starts from: that of config.init_from, or one with parameters at random."""
    if run.base:
        return run.base
    model, params = untrained(run.workdir, run.config, run.train_set.class_names)
    return model, params | initial_state(lambda rng: init_params(model, rng), run.config.seed)


def make_feed(
    config: ConfigDict, source: Any, batch_size: int, groups: np.ndarray | None = None
) -> DeviceFeed | HostFeed:
    """A feed that keeps `source` (a Dataset or Latents) on the device if it is small enough, else streams it."""
    limit = config.data.memory_limit_gb * 2**30
    if source.arrays is not None and sum(values.nbytes for values in source.arrays.values()) <= limit:
        arrays = {name: np.asarray(values) for name, values in source.arrays.items()}
        return DeviceFeed(arrays, batch_size, config.seed, **_process(), groups=groups)
    return HostFeed(source, batch_size, config.seed, **_process(), groups=groups)


def _process() -> dict[str, int]:
    """Which part of each batch is this host's."""
    return {"process_index": jax.process_index(), "process_count": jax.process_count()}


def latents_feed(
    run: Run, first_stage: FirstStage, params: Params, batch_size: int, *, images: bool
) -> DeviceFeed | HostFeed | BucketFeed:
    """A feed of the cached latents, or of `images` where each step needs them.

    Args:
      run: the run.
      first_stage, params: the autoencoder, and {"first_stage"} with its parameters.
      batch_size: over all hosts.
      images: of concat conditioning, and for diffusion on pixels.
    """
    config, train_set = run.config, run.train_set
    if config.data.bucket_step:
        return BucketFeed(encode_buckets(run, first_stage, params), batch_size, config.seed, **_process())
    source = train_set if images else encode_images(run, first_stage, params, train_set)
    return make_feed(config, source, batch_size, train_set.groups)


def encode_buckets(run: Run, first_stage: FirstStage, params: Params) -> list[latents.Latents]:
    """The cached latents of the training images in about their own proportions, of each shape by themselves."""
    buckets = data_from_config.load_train_buckets(run.config)
    sizes = ", ".join(f"{h}x{w} ({n:,})" for n, h, w, _ in (bucket.shape for bucket in buckets))
    print(f"     height x width of the images: {sizes}", flush=True)
    return [encode_images(run, first_stage, params, bucket) for bucket in buckets]


def encode_images(run: Run, first_stage: FirstStage, params: Params, dataset: Dataset) -> latents.Latents:
    """The cached latents of a data set, which is encoded if they are not there yet."""
    other = run.config.autoencoder.checkpoint  # whose latents are used if they are the same
    return latents.cached_latents(
        run.workdir / "latents",
        first_stage=first_stage,
        params=params["first_stage"],
        dataset=dataset,
        flip=run.config.data.flip,
        batch_size=run.config.evaluation.batch_size,
        elsewhere=Path(other) / "latents" if other else None,
    )
