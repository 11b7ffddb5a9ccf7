"""Samples from a model: a run folder, a diffusers folder, a single file or a model of the hub.

    python -m ldm_jax.sample --model=runs/fashion_mnist --out=samples [--num=64] [--label=3,7] [--sampler=ddim]
                             [--steps=50] [--guidance=2.0] [--eta=0.0] [--seed=0] [--batch_size=64]

    ... --prompt=TEXT [--prompt=TEXT] [--negative_prompt=TEXT]   text-to-image models; --prompt_file=FILE: one per line
    ... --model=stabilityai/stable-diffusion-xl-base-1.0[@main] [--dtype=bfloat16]   from the hub or its cache
    ... --model=FILE.safetensors [--tokenizer=FOLDER] [--prediction=v] [--vae=PATH]  a single file
    ... --lora=FILE [--lora_scale=1] [--lora=FILE ...]  LoRA files, merged into the weights
    ... --embedding=FILE --prompt="a photo of <token>"  textual inversion files
    ... --height=512 --width=768 [--vae_tiling]         another image size
    ... --init_image=FILE --strength=0.6                image to image: the larger the strength, the less of it is kept
    ... --init_image=FILE --mask=FILE [--resample=10]   inpainting: the mask's white part is sampled
    ... --init_image=FILE --outpaint=right:8            outpainting
    ... --init_image=FILE --invert                      from the image's own noise, by DDIM inversion
    ... --init_image=FILE --to_image=FILE               interpolation between two images, by DDIM inversion
    ... --to_seed=1                                     interpolation between the noise of two seeds
    ... --prompt=TEXT --to_prompt=TEXT [--num=8]        interpolation between two prompts
    ... --init_latents=FILE.npy                         initial noise, float32 [N, h, w, c]
    ... --concat_image=FILE [--noise_level=20]          the low-resolution image or segmentation map of such a model
    ... --classifier=RUN --classifier_scale=2           classifier guidance
    ... --guide_model=RUN[@STEP] --guidance=2           autoguidance by a weaker model
    ... --cfgpp --guidance=0.6 [--sampler=ddim]         CFG++
    ... --ema_sigma_rel=0.08                            another EMA of a run with power function averages
    ... --clip=RUN --prompt=TEXT [--clip_guidance_scale=1]  CLIP guidance
    ... --refiner=MODEL [--refiner_start=0.8]           SDXL's refiner goes on from the latents of the base
    ... --from_recipe=samples.png                       the same samples again

Writes samples.npz (`images` uint8 [N, H, W, C], `labels` int32 [N]), samples.png, of small images or with
--save_trajectory denoising.gif, and of text-to-image models or with --save_each one PNG a sample, to --out. The default
of every flag is the model's own. Sample k depends on the seed, k and its condition alone.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from absl import flags

from ldm_jax import command_line
from ldm_jax.errors import InputError
from ldm_jax.run_folder import layout as run_folder_layout

if TYPE_CHECKING:
    import numpy as np

    from ldm_jax.pipeline.model import LatentDiffusion, Params
    from ldm_jax.sampling.recipe import Recipe

SMALL = 64  # side in pixels up to which denoising.gif is written by default: each of its frames is decoded


def define_flags() -> flags.FlagValues:
    """The flags of this command, not yet parsed. None = as in the model's config."""
    values = flags.FlagValues()
    flags.DEFINE_list("label", None, "classes, by name or number, taken in turn; default: all", flag_values=values)
    command_line.define_lora_flags(values)
    command_line.define_embedding_flag(values)
    command_line.define_sampling_flags(values, num=64)
    command_line.define_editing_flags(values)
    command_line.define_file_flags(values)
    command_line.define_ema_flag(values)
    command_line.define_device_flags(values)
    return values


def main(argv: list[str]) -> None:
    """The command."""
    values = define_flags()
    if command_line.wants_help(argv, __doc__, values):
        return
    command_line.parse(values, argv)
    command_line.require(values, "model", "out")
    out = Path(values.out)
    run_folder_layout.check_output(out)
    loras = command_line.lora_files(values)
    command_line.start_devices(values)

    from ldm_jax.models.conditioning import TextConditioning
    from ldm_jax.pipeline.load import Overrides, load
    from ldm_jax.pipeline.lora import with_lora
    from ldm_jax.pipeline.textual_inversion import with_embedding
    from ldm_jax.sampling.sample_images import sample_images, save

    overrides = Overrides(values.tokenizer, values.prediction, values.vae)
    model, params = load(values.model, values.dtype, overrides, ema_sigma_rel=values.ema_sigma_rel)
    for path in values.embedding or ():
        model, params, token = with_embedding(model, params, Path(path))
        print(f"Embedding: {token} in prompts stands for {path}")
    for path, scale in loras:
        params = with_lora(model, params, path, scale)
    recipe = _recipe(values, model, params)
    flag = values["save_trajectory"]
    trajectory = bool(flag.value) if flag.present else max(recipe.size) <= SMALL
    batch_size = values.batch_size or model.defaults.batch_size
    each = isinstance(model.conditioning, TextConditioning) if values.save_each is None else values.save_each
    save(out, sample_images(model, params, recipe, batch_size=batch_size, trajectory=trajectory), each=each)
    print(f"{recipe.num} {'image' if recipe.num == 1 else 'images'}: {out / 'samples.png'}")


def _recipe(values: flags.FlagValues, model: LatentDiffusion, params: Params) -> Recipe:
    """The recipe of the flags, or that of --from_recipe."""
    from ldm_jax.sampling.from_arguments import check_batch_size, label_indices
    from ldm_jax.sampling.from_flags import check_label, recipe_from_flags, with_edit_flags
    from ldm_jax.sampling.recipe import from_png
    from ldm_jax.sampling.sample_images import check_inputs

    if values.from_recipe:
        of_model = ("model", "dtype", "lora", "lora_scale", "embedding", "tokenizer", "prediction", "vae")
        free = (*of_model, "ema_sigma_rel", "from_recipe", "out", "batch_size", "save_trajectory", "save_each")
        for name in values:
            if values[name].present and name not in free:
                raise InputError(f"--from_recipe has the whole recipe; leave out --{name}")
        check_batch_size("--batch_size", values.batch_size)
        recipe, recorded = from_png(Path(values.from_recipe), model, params)
        check_inputs(recipe, recorded, model, params, f"--from_recipe={values.from_recipe}")
        return recipe
    labels = label_indices("--label", values.label, model.class_names)
    recipe = with_edit_flags(recipe_from_flags(model, values, labels), values, model)
    if values.label is not None:
        check_label(",".join(values.label), recipe, model)
    if values.negative_label is not None:
        (negative,) = label_indices("--negative_label", [values.negative_label], model.class_names)
        recipe = recipe._replace(guidance=recipe.guidance._replace(negative_label=negative))
    return recipe


class _Callable(ModuleType):
    """This module, called: `ldm_jax.sample(model, params, labels=[3, 7], seed=0)`."""

    def __call__(
        self, model: LatentDiffusion, params: Params, *, batch_size: int | None = None, **arguments: Any
    ) -> np.ndarray:
        """Samples uint8 [N, H, W, C] of a model and its parameters from `ldm_jax.load`.

        `batch_size` is a multiple of the devices, None the model's default; `arguments` are those of
        `sampling.from_arguments.recipe_from_arguments`: labels or prompts, num, seed, guidance ... Raises InputError
        for an argument that the model does not take.
        """
        from ldm_jax.sampling.from_arguments import check_batch_size, recipe_from_arguments
        from ldm_jax.sampling.sample_images import sample_images

        check_batch_size("batch_size", batch_size)
        recipe = recipe_from_arguments(model, **arguments)
        batch_size = batch_size or model.defaults.batch_size
        return sample_images(model, params, recipe, batch_size=batch_size, trajectory=False).images


sys.modules[__name__].__class__ = _Callable

if __name__ == "__main__":
    sys.exit(command_line.run(main))
