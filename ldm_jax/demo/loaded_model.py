"""The model that the page samples from: with LoRA files added, one run at a time, with previews."""

import threading
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from ldm_jax.demo.form import Bounds, Form, in_words, lora_of, recipe_of
from ldm_jax.demo.previews import preview_decoder
from ldm_jax.errors import InputError
from ldm_jax.pipeline.lora import with_lora
from ldm_jax.pipeline.model import LatentDiffusion, Params, fingerprint
from ldm_jax.runtime.parallel import replicate
from ldm_jax.runtime.terminal import collect_warnings
from ldm_jax.sampling.guidance_models import GuidanceModels
from ldm_jax.sampling.recipe import Recipe
from ldm_jax.sampling.sample_images import Samples, sample_images
from ldm_jax.sampling.sampler import Progress

LORAS = 2  # parameters with a LoRA that are kept


class Preview(NamedTuple):
    """The samples so far."""

    images: np.ndarray  # uint8 [n, H, W, C] of the n samples begun; perhaps smaller than the samples will be
    fraction: float  # of the work that is done


class LoadedModel:
    """A model with its parameters on the devices; each LoRA's are cached by the file and its scale."""

    def __init__(self, model: LatentDiffusion, params: Params, bounds: Bounds) -> None:
        self.model, self.bounds = model, bounds
        self._one_run = threading.Lock()
        self._own = replicate(params), fingerprint(model, params)
        self._with_lora = lru_cache(maxsize=LORAS)(lambda path, scale: self._add_lora(params, path, scale))

    def sample(self, form: Form, report: Callable[[Preview], None]) -> tuple[Samples, list[str]]:
        """The samples of a form's values, and the warnings about them.

        `report` is called with previews, and may stop the run by an exception. Raises InputError, in the words of the
        page, for a wrong value, or RunError.
        """
        with collect_warnings() as warnings:
            recipe = recipe_of(self.model, form, self.bounds)
            with self._one_run:
                samples = self._sample(recipe, form, report)
        lora = lora_of(form)
        if lora is not None:
            added = {"lora": {"file": Path(lora[0]).name, "scale": lora[1]}}
            samples = samples._replace(recipe=samples.recipe | added)
        return samples, [in_words(line, form) for line in warnings]

    def _sample(self, recipe: Recipe, form: Form, report: Callable[[Preview], None]) -> Samples:
        try:
            params, model_hash = self._parameters(form)
            batch_size = _batch_size(recipe.num, self.model.defaults.batch_size)
            watch = self._watch(tuple(recipe.size), recipe.num, batch_size, params, report)
            options = {"batch_size": batch_size, "trajectory": False, "watch": watch, "model_hash": model_hash}
            return sample_images(self.model, params, recipe, **options)
        except InputError as error:
            raise InputError(in_words(str(error), form)) from error

    def _parameters(self, form: Form) -> tuple[Params, str]:
        lora = lora_of(form)
        return self._own if lora is None else self._with_lora(*lora)

    def _add_lora(self, params: Params, path: str, scale: float) -> tuple[Params, str]:
        params = with_lora(self.model, params, Path(path), scale)
        return replicate(params), fingerprint(self.model, params)

    def _watch(
        self,
        size: tuple[int, int],
        num: int,
        batch_size: int,
        params: Params,
        report: Callable[[Preview], None],
    ) -> Callable[[Progress], None]:
        """A function of `Progress` that reports previews of all samples so far."""
        model, done = self.model.at_size(size), {}
        # For its decode: the sampler of `sample_images`, unless the recipe has a guidance model.
        sampler = GuidanceModels().sampler(model, batch_size)
        decode: list[Callable[[Any], Any]] = []

        def watch(progress: Progress) -> None:
            if not decode:
                decode.append(preview_decoder(model, lambda z: sampler.decode(params, z)))
            done[progress.first] = decode[0](progress.z0_hat)
            ahead = progress.first + progress.fraction * len(progress.z0_hat)
            report(Preview(np.concatenate([*done.values()]), ahead / num))

        return watch


def _batch_size(num: int, most: int) -> int:
    """The batch for `num` samples: a power of two times the devices: few are compiled; padded by at most 1/3."""
    devices = jax.local_device_count()
    sizes = [devices * 2**i for i in range(16) if devices * 2**i <= max(min(num, most), devices)]
    return next(size for size in reversed(sizes) if 3 * -(-num // size) * size <= 4 * num or size == sizes[0])
