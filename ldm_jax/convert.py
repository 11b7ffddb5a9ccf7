"""Converts a model to another format.

    python -m ldm_jax.convert --model=runs/fashion_mnist --to=FOLDER    a run to a diffusers folder
    python -m ldm_jax.convert --model=FOLDER --to=runs/again            an exported run back to a run folder
    python -m ldm_jax.convert --model=FILE.ckpt --to=FOLDER             a single file, a hub model or a diffusers folder
                                                                        to one in safetensors, [--dtype=bfloat16]

A run becomes unet/, vae/, scheduler/, model_index.json, a pipeline.py for diffusers, a model card and recipe.json, from
which the run is restored exactly. --to is written completely or not at all.
"""

import sys
from pathlib import Path

from absl import flags

from ldm_jax import command_line
from ldm_jax.config.fields import DTYPES, check_choice
from ldm_jax.errors import InputError
from ldm_jax.runtime.files import new_folder


def define_flags() -> flags.FlagValues:
    """The flags of this command, not yet parsed."""
    values = flags.FlagValues()
    flags.DEFINE_string("model", None, command_line.MODEL, flag_values=values)
    flags.DEFINE_string("to", None, "the new folder to write to", flag_values=values)
    flags.DEFINE_string("dtype", None, f"of the weights: {' or '.join(DTYPES)}; default float32", flag_values=values)
    command_line.define_file_flags(values)
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
        check_choice("--dtype", values.dtype, DTYPES)
    to = Path(values.to)
    with new_folder(to, flag="to") as folder:
        what = _convert(values, folder)
    print(f"{what}: {to}")


def _convert(values: flags.FlagValues, folder: Path) -> str:
    """Writes the model to `folder`; returns its format, in words."""
    from ldm_jax.runtime.xla import configure

    configure()

    from ldm_jax.export.diffusers_folder import write_diffusers
    from ldm_jax.export.run_folder import write_run
    from ldm_jax.interop import hub
    from ldm_jax.pipeline.from_exported import read_record
    from ldm_jax.pipeline.load import Overrides, is_exported, load

    path, dtype = hub.find(values.model), values.dtype or "float32"
    if is_exported(path):
        if dtype != "float32":
            raise InputError(f"--dtype={dtype} is for diffusers folders; the parameters of a run are float32")
        write_run(*load(path), folder, read_record(path))
        return "Run folder"
    model, params = load(path, dtype, Overrides(values.tokenizer, values.prediction, values.vae))
    write_diffusers(model, params, folder, dtype=dtype)
    return f"{model.origin.pipeline or 'Diffusers folder'} in {dtype}"


if __name__ == "__main__":
    sys.exit(command_line.run(main))
