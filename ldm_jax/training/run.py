"""What the stages of a run share: the run, its initial model, data feeds and cached latents."""

from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from ldm_jax.config.rules import text_conditioned
from ldm_jax.data import from_config as data_from_config
from ldm_jax.data.datasets import Dataset
from ldm_jax.data.feeds import BucketFeed, DeviceFeed, HostFeed
from ldm_jax.data.shards import Shards
from ldm_jax.pipeline.from_config import init_params
from ldm_jax.pipeline.from_run import untrained
from ldm_jax.pipeline.model import LatentDiffusion, Params
from ldm_jax.run_folder.log import Log
from ldm_jax.runtime.engine import Engine, make_engine
from ldm_jax.runtime.interrupt import InterruptWatch
from ldm_jax.training.latents import Latents, cached_latents
from ldm_jax.training.loop import initial_state

Feed = DeviceFeed | HostFeed | BucketFeed


class Run(NamedTuple):
    """A run: its config, data sets and open files."""

    config: ConfigDict
    workdir: Path
    train_set: Dataset
    test_set: Dataset
    log: Log
    watch: InterruptWatch
    base: tuple[LatentDiffusion, Params] | None  # the model of config.init_from
    earlier: tuple[ConfigDict, ...] = ()  # of the same run, before a change of steps or learning rate

    @property
    def engine(self) -> Engine:
        """The distribution of training steps over the devices."""
        return make_engine(self.config.parallel.engine, self.config.parallel.fsdp)

    @property
    def sampling_set(self) -> Dataset:
        """The split whose captions or images condition the samples of the run (see `recipe_of_run`)."""
        return self.train_set if text_conditioned(self.config) else self.test_set


def initial_model(run: Run) -> tuple[LatentDiffusion, Params]:
    """The model that diffusion training starts from: that of config.init_from, or one with random parameters."""
    if run.base:
        return run.base
    model, params = untrained(run.workdir, run.config, run.train_set.class_names)
    return model, params | initial_state(lambda rng: init_params(model, rng), run.config.seed)


def make_feed(run: Run, source: Dataset | Latents | Shards, batch_size: int) -> Feed:
    """A feed of the training images or latents: on the device up to config.data.memory_limit_gb, else from disk."""
    options = {"batch_size": batch_size, "seed": run.config.seed, "groups": run.train_set.groups} | _process()
    if fits_on_device(run, source):
        return DeviceFeed({name: np.asarray(values) for name, values in source.arrays.items()}, **options)
    return HostFeed(source, **options)


def fits_on_device(run: Run, source: Dataset | Latents | Shards) -> bool:
    """Whether a data set is kept on the device: it takes up to config.data.memory_limit_gb."""
    limit = run.config.data.memory_limit_gb * 2**30
    return source.arrays is not None and sum(values.nbytes for values in source.arrays.values()) <= limit


def _process() -> dict[str, int]:
    """The part of each batch that is this host's."""
    return {"process_index": jax.process_index(), "process_count": jax.process_count()}


def latents_feed(run: Run, model: LatentDiffusion, params: Params, batch_size: int) -> Feed:
    """A feed of the cached latents, or of images for concat conditioning and for diffusion on pixels.

    `params` are {"first_stage", ...}, `batch_size` is over all hosts.
    """
    config = run.config
    if config.data.bucket_step:
        buckets = data_from_config.load_train_buckets(config)
        sizes = ", ".join(f"{h}x{w} ({n:,})" for n, h, w, _ in (bucket.shape for bucket in buckets))
        print(f"     height x width of the images: {sizes}", flush=True)
        encode = partial(cached_latents, config, run.workdir, model.first_stage, params, parts=len(buckets))
        encoded = [encode(bucket) for bucket in buckets]
        return BucketFeed(encoded, batch_size, config.seed, **_process())
    source = run.train_set
    if model.first_stage.module is not None and model.concat is None:
        source = cached_latents(config, run.workdir, model.first_stage, params, source)
    return make_feed(run, source, batch_size)
