"""Converts a model to another format.

    python -m ldm_jax.convert --model=runs/fashion_mnist --to=FOLDER      a run to a diffusers folder
    python -m ldm_jax.convert --model=FOLDER --to=runs/again              an exported run back to a run folder
    python -m ldm_jax.convert --model=FILE.ckpt --to=FOLDER               a single file, hub model or diffusers folder
                                                                          to a folder [--dtype=float16|bfloat16]
    python -m ldm_jax.convert --model=FOLDER --to=FILE.safetensors        Stable Diffusion to a single file
    python -m ldm_jax.convert --model=runs/lora --lora_names=kohya --to=FILE.safetensors  LoRA of a run, or a file of
                                                                          diffusers' names, in kohya's
    ... --merge_lora=FILE [--lora_scale=1]                                with LoRA added to the weights
    ... --model=RUN --ema_sigma_rel=0.08                                  with another EMA (see docs/sampling.md)

A run becomes unet/, vae/, scheduler/, model_index.json, a pipeline.py for diffusers, a model card and recipe.json, from
which the run is restored exactly. --to is written completely or not at all.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from ldm_jax import command_line
from ldm_jax.config.fields import DTYPES, check_choice
from ldm_jax.errors import InputError
from ldm_jax.runtime.files import new_file, new_folder
from ldm_jax.runtime.object_store import is_url

if TYPE_CHECKING:
    from ldm_jax.pipeline.model import LatentDiffusion, Params

WEIGHTS = (*DTYPES, "float16")
FILE_FLAGS = ("tokenizer", "prediction", "vae")
MODEL_FLAGS = (*FILE_FLAGS, "merge_lora", "ema_sigma_rel", "dtype")
PICKLES = (".ckpt", ".pt", ".pth", ".bin")  # endings of single files that are read only


def define_flags() -> flags.FlagValues:
    """The flags of this command, not yet parsed."""
    values = flags.FlagValues()
    flags.DEFINE_string("model", None, command_line.MODEL, flag_values=values)
    flags.DEFINE_string("to", None, "the new folder, or .safetensors, to write to", flag_values=values)
    flags.DEFINE_string("dtype", None, f"of the weights: {', '.join(WEIGHTS)}; default float32", flag_values=values)
    names = "writes LoRA alone, by these names"
    flags.DEFINE_enum("lora_names", None, ["diffusers", "kohya"], names, flag_values=values)
    command_line.define_lora_flags(values, "merge_lora")
    command_line.define_file_flags(values)
    command_line.define_ema_flag(values)
    return values


def main(argv: list[str]) -> None:
    """The command."""
    values = define_flags()
    if command_line.wants_help(argv, __doc__, values):
        return
    command_line.parse(values, argv)
    for name in ("model", "to"):
        if not values[name].value:
            raise InputError(f"--{name} is missing; it must be {values[name].help}")
    if values.dtype is not None:
        check_choice("--dtype", values.dtype, WEIGHTS)
    if is_url(values.to):
        raise InputError(f"--to={values.to} is a URL; it must be a local folder or a .safetensors file")
    to, loras = Path(values.to), command_line.lora_files(values, "merge_lora")
    if to.suffix != ".safetensors" and to.suffix.lower() in (".safetensors", *PICKLES):
        raise InputError(f"--to={to}: single files are written as .safetensors, e.g. {to.with_suffix('.safetensors')}")
    if to.suffix == ".safetensors":
        with new_file(to, flag="to") as file:
            what = _convert_lora(values, file) if values.lora_names else _convert_to_file(values, loras, file)
    elif values.lora_names:
        raise InputError(f"--lora_names is for LoRA files; --to={to} must end in .safetensors")
    else:
        with new_folder(to, flag="to") as folder:
            what = _convert(values, loras, folder)
    print(f"{what}: {to}")


def _load(values: flags.FlagValues, loras: list[tuple[Path, float]]) -> tuple[LatentDiffusion, Params]:
    """The model with the LoRA merged, in bfloat16 if the weights are to be, else float32."""
    from ldm_jax.pipeline.load import Overrides, load
    from ldm_jax.pipeline.lora import with_lora

    overrides = Overrides(values.tokenizer, values.prediction, values.vae)
    dtype = "bfloat16" if values.dtype == "bfloat16" else "float32"
    model, params = load(values.model, dtype, overrides, ema_sigma_rel=values.ema_sigma_rel)
    for file, scale in loras:
        params = with_lora(model, params, file, scale)
    return model, params


def _refuse(values: flags.FlagValues, *names: str, why: str) -> None:
    """Raises InputError if one of these flags is set."""
    for name in names:
        if values[name].value:
            raise InputError(f"--{name} {why}")


def _convert_to_file(values: flags.FlagValues, loras: list[tuple[Path, float]], file: Path) -> str:
    """Writes the model to a single file; returns its format, in words."""
    from ldm_jax.runtime.xla import configure

    configure()

    from ldm_jax.export.single_file import write_single_file

    dtype = values.dtype or "float32"
    for note in write_single_file(*_load(values, loras), file, dtype=dtype):
        print(f"note: {note}")
    return f"Single file in {dtype}"


def _convert_lora(values: flags.FlagValues, file: Path) -> str:
    """Writes the LoRA of a run or a file; returns its format, in words."""
    from ldm_jax.interop.lora import FILE
    from ldm_jax.interop.lora_files import read_lora, write_lora

    _refuse(values, *MODEL_FLAGS, why="is of models; with --lora_names LoRA alone is written, as it is")
    source = Path(values.model)
    write_lora(file, read_lora(source / FILE if source.is_dir() else source, flag="model"), names=values.lora_names)
    return f"LoRA in the names of {values.lora_names}"


def _convert(values: flags.FlagValues, loras: list[tuple[Path, float]], folder: Path) -> str:
    """Writes the model to `folder`; returns its format, in words."""
    from ldm_jax.runtime.xla import configure

    configure()

    from ldm_jax.export.diffusers_folder import write_diffusers
    from ldm_jax.export.run_folder import write_run
    from ldm_jax.pipeline.from_exported import read_record
    from ldm_jax.pipeline.load import find, is_exported, load, load_guide

    dtype = values.dtype or "float32"
    with find(values.model) as path:
        if is_exported(path):
            _refuse(
                values,
                "merge_lora",
                *FILE_FLAGS,
                why="is for diffusers models; --model is an exported run, which is restored",
            )
            _refuse(values, "ema_sigma_rel", why="is for run folders; --model is an exported run, which is restored")
            if dtype != "float32":
                raise InputError(f"--dtype={dtype} is for diffusers folders; the parameters of a run are float32")
            model, params = load(path)
            write_run(model, params, folder, read_record(path), load_guide(model))
            return "Run folder"
    model, params = _load(values, loras)
    for note in write_diffusers(model, params, folder, dtype=dtype):
        print(f"note: {note}")
    return f"{model.origin.pipeline or 'Diffusers folder'} in {dtype}"


if __name__ == "__main__":
    sys.exit(command_line.run(main))
