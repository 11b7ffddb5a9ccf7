"""A page to sample from a model in the browser: prompts or classes, solvers, image to image, inpainting, LoRA.

    python -m ldm_jax.demo --model=runs/fashion_mnist [--port=7860]
    ... --model=PATH            a run folder, a diffusers folder, a single file or a hub id, as in ldm_jax.sample
    ... --lora=FILE [--lora_scale=1]  LoRA files, merged into the weights; others can be uploaded on the page
    ... --host=0.0.0.0 --password=SECRET  for other machines; the user's name is ldm_jax
    ... --max_size=1024 --max_num=16  bounds of the samples' sides in pixels, and of their number

Needs gradio: pip install gradio. Nothing is loaded from elsewhere. Each samples.png that is downloaded carries
its recipe, as those of ldm_jax.sample do.
"""

import os
import socket
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from absl import flags

from ldm_jax import command_line
from ldm_jax.errors import InputError


def define_flags() -> flags.FlagValues:
    """The flags of this command, not yet parsed."""
    values = flags.FlagValues()
    text, whole = flags.DEFINE_string, flags.DEFINE_integer
    text("model", None, command_line.MODEL, flag_values=values)
    text("dtype", None, "of the activations: float32 or bfloat16; default: the model's", flag_values=values)
    command_line.define_lora_flags(values)
    command_line.define_file_flags(values)
    command_line.define_ema_flag(values)
    text("host", "127.0.0.1", "the address to listen on; 0.0.0.0 = all, for other machines", flag_values=values)
    whole("port", 7860, "the port to listen on", flag_values=values, lower_bound=1, upper_bound=65535)
    text("password", None, "asks visitors for it; the user's name is ldm_jax", flag_values=values)
    largest = "the largest side of the samples in pixels; default: twice the model's"
    whole("max_size", None, largest, flag_values=values, lower_bound=1)
    whole("max_num", 16, "the largest number of samples at once", flag_values=values, lower_bound=1)
    return values


def main(argv: list[str]) -> None:
    """The command."""
    values = define_flags()
    if command_line.wants_help(argv, __doc__, values):
        return
    command_line.parse(values, argv)
    command_line.require(values, "model")
    if values.password == "":
        raise InputError("--password is empty; leave it out for a page without one")
    loras = command_line.lora_files(values)
    if find_spec("gradio") is None:
        raise InputError("the page needs gradio: pip install gradio")
    _check_address(values.host, values.port)
    command_line.start_devices()

    from ldm_jax.demo.form import bounds_of
    from ldm_jax.demo.loaded_model import LoadedModel
    from ldm_jax.pipeline.load import Overrides, load
    from ldm_jax.pipeline.lora import with_lora

    overrides = Overrides(values.tokenizer, values.prediction, values.vae)
    model, params = load(values.model, values.dtype, overrides, ema_sigma_rel=values.ema_sigma_rel)
    for path, scale in loras:
        params = with_lora(model, params, path, scale)
    loaded = LoadedModel(model, params, bounds_of(model, values.max_size, values.max_num))
    with tempfile.TemporaryDirectory(prefix="ldm_jax_demo_") as folder:
        settings = {"ANALYTICS_ENABLED": "False", "RUN_HISTORY": "False", "TEMP_DIR": str(Path(folder) / "uploads")}
        os.environ.update({f"GRADIO_{name}": value for name, value in settings.items()})  # read when it is imported

        from ldm_jax.demo.page import make_page, serve
        from ldm_jax.demo.results import Results

        results = Path(folder) / "results"
        results.mkdir()
        page = make_page(loaded, Results(results), Path(values.model).name)
        serve(page, host=values.host, port=values.port, password=values.password)


def _check_address(host: str, port: int) -> None:
    """Raises InputError unless the address can be listened on: before the model is loaded, which takes a while."""
    try:
        with socket.create_server((host, port)):
            pass
    except OSError as error:
        raise InputError(f"--host={host} --port={port} cannot be listened on: {error.strerror or error}") from error


if __name__ == "__main__":
    sys.exit(command_line.run(main, ["demo", *sys.argv[1:]]))
