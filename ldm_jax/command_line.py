"""The command line: the flags that several commands share, and how they and a config's fields are read from it."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from ldm_jax.config.fields import DTYPES, check_choice, check_interval, nearest
from ldm_jax.config.io import flatten
from ldm_jax.config.renamed import rename_arguments, rename_fields
from ldm_jax.diffusion.process import VARIANCES
from ldm_jax.diffusion.solvers import SOLVERS
from ldm_jax.diffusion.spacing import SPACINGS
from ldm_jax.errors import InputError, RunError

MODEL = "a run folder, diffusers folder, .safetensors, .ckpt, or hub id: org/name[@revision]"


def parse(flag_values: flags.FlagValues, argv: list[str], *, config: bool = False) -> None:
    """Parses the command line into `flag_values`, with --config=FILE and --config.FIELD=VALUE if `config`.

    Raises InputError for a flag, field or value that is wrong.
    """
    argv = rename_arguments(argv)
    for argument in argv[1:] if config else ():
        if argument.startswith("--config=") and not Path(argument.removeprefix("--config=")).is_file():
            raise InputError(f"there is no config file {argument.removeprefix('--config=')!r}; configs are in configs/")
    try:
        if config:
            config_flags.DEFINE_config_file(
                "config", None, "a file of configs/", flag_values=flag_values, sys_argv=argv
            )
        rest = flag_values(argv)
        loaded = flag_values["config"].value.to_dict() if config and flag_values["config"].value is not None else {}
    except InputError:  # of a flag that checks its own value
        raise
    except flags.UnrecognizedFlagError as error:
        known = [name for name in flag_values if not name.startswith("config.")]
        raise InputError(f"there is no flag --{error.flagname}{nearest(error.flagname, known)}") from error
    except (AttributeError, KeyError) as error:
        raise InputError(_unknown_field(argv, error)) from error
    except (flags.Error, TypeError, ValueError, OSError, ImportError, SyntaxError) as error:
        message = str(error)
        if "Traceback" in message:  # of a config file that fails; its last line is the error
            message = f"{_config_file(argv)} fails: {message.strip().splitlines()[-1]}"
        raise InputError(" ".join(message.split())) from error
    except Exception as error:  # whatever a config file of the user's does
        raise InputError(f"{_config_file(argv)} fails: {type(error).__name__}: {error}") from error
    if loaded:
        rename_fields(flag_values.config)
    if len(rest) > 1:
        raise InputError(f"{rest[1]!r} is no flag; flags are written --name=value")
    if config and not loaded:
        raise InputError("which config? e.g. --config=configs/fashion_mnist.py")


def require(values: flags.FlagValues, *names: str) -> None:
    """Raises InputError for flags that are missing, and for an unknown sampler, spacing, variance or dtype."""
    for name in names:
        if not values[name].value:
            raise InputError(f"--{name} is missing; it must be {values[name].help}")
    for name, choices in (("sampler", SOLVERS), ("spacing", SPACINGS), ("variance", VARIANCES), ("dtype", DTYPES)):
        if values[name].value is not None:
            check_choice(f"--{name}", values[name].value, choices)


def wants_help(argv: list[str], usage: str, flag_values: flags.FlagValues) -> bool:
    """Prints `usage` and the flags if the command line asks for help."""
    if not {"--help", "-h", "-help", "--helpfull"} & set(argv):
        return False
    print(usage.strip(), end="\n\nFlags:\n")
    for name in sorted(flag_values):
        flag = flag_values[name]
        if not name.startswith("config"):
            print(f"  --{name}={flag.default if flag.default is not None else '...'}  {flag.help}")
    return True


def define_drawing_flags(values: flags.FlagValues, *, num: int) -> None:
    """Of which model to draw what, how, and where to; None = as in the model's config."""
    flags.DEFINE_string("model", None, MODEL, flag_values=values)
    flags.DEFINE_string("out", None, "the folder to write to", flag_values=values)
    flags.DEFINE_integer("num", num, "how many pictures", lower_bound=1, flag_values=values)
    flags.DEFINE_multi_string("prompt", None, "models of texts: what to draw; one picture each", flag_values=values)
    flags.DEFINE_string("prompt_file", None, "the same from a file, a line each", flag_values=values)
    flags.DEFINE_string("negative_prompt", None, "models of texts: what guidance leads away from", flag_values=values)
    flags.DEFINE_string("dtype", None, f"of the arithmetic: {' or '.join(DTYPES)}", flag_values=values)
    flags.DEFINE_string("sampler", None, f"one of {', '.join(SOLVERS)}", flag_values=values)
    flags.DEFINE_integer("steps", None, "network calls", lower_bound=1, flag_values=values)
    flags.DEFINE_float("guidance", None, "classifier-free guidance, 1 = none", lower_bound=0.0, flag_values=values)
    flags.DEFINE_string("classifier", None, "a run folder with a classifier, to guide by as well", flag_values=values)
    flags.DEFINE_float(
        "classifier_scale", None, "how strongly; default 1, 0 = not", lower_bound=0.0, flag_values=values
    )
    flags.DEFINE_string("clip", None, "a run folder with a CLIP, to guide towards --prompt as well", flag_values=values)
    flags.DEFINE_float(
        "clip_guidance_scale", None, "how strongly; default 1, 0 = not", lower_bound=0.0, flag_values=values
    )
    flags.DEFINE(
        _Interval(), "guidance_interval", None, "the share of the timesteps that is guided, e.g. 0.15,0.85", values
    )
    flags.DEFINE_float("guidance_rescale", None, "keep the contrast: 0 no ... 1 yes", 0.0, 1.0, flag_values=values)
    flags.DEFINE_float(
        "threshold", None, "pixel models: quantile that bounds z0, e.g. 0.995", 0.0, 1.0, flag_values=values
    )
    flags.DEFINE_string("spacing", None, f"of the steps: {', '.join(SPACINGS)}", flag_values=values)
    flags.DEFINE_list("timesteps", None, "the timesteps themselves, falling, e.g. 999,500,0", flag_values=values)
    flags.DEFINE_float("churn", None, "edm: the noise added on the way", lower_bound=0.0, flag_values=values)
    flags.DEFINE_float("eta", None, "ddim: 0 deterministic ... 1 ancestral", 0.0, 1.0, flag_values=values)
    flags.DEFINE_string("variance", None, f"ddpm: one of {', '.join(VARIANCES)}", flag_values=values)
    flags.DEFINE_integer("seed", 0, "the pictures depend on it, and on nothing else", 0, 2**32 - 1, flag_values=values)
    flags.DEFINE_integer("batch_size", None, "pictures drawn at a time", lower_bound=1, flag_values=values)


def define_editing_flags(values: flags.FlagValues) -> None:
    """What to begin from, if not from noise alone."""
    string, integer = flags.DEFINE_string, flags.DEFINE_integer
    integer("height", None, "of the pictures, in pixels: diffusers models; default: the model's", 1, flag_values=values)
    integer("width", None, "the same", 1, flag_values=values)
    flags.DEFINE_boolean(
        "vae_tiling", False, "large pictures: to and from latents in tiles, for less memory", flag_values=values
    )
    string("to_prompt", None, "models of texts: lead from the one --prompt to this one", flag_values=values)
    string("init_latents", None, "initial noise, .npy float32 [N, h, w, c]", flag_values=values)
    string("init_image", None, "begin from this picture, noised", flag_values=values)
    flags.DEFINE_float(
        "strength",
        None,
        "how much of it is noised away, up to 1; default 0.6, with a mask 1",
        flag_values=values,
    )
    string("mask", None, "a picture as large as init_image: its white part is drawn, the rest kept", flag_values=values)
    string("outpaint", None, "continue init_image on a side by so many pixels, e.g. right:8", flag_values=values)
    integer("resample", None, "with a mask: how often each part of the way is gone (RePaint)", 1, flag_values=values)
    integer("resample_jump", None, "and of how many steps a part is; default 1", 1, flag_values=values)
    flags.DEFINE_boolean("invert", None, "begin from init_image's own noise (DDIM inversion)", flag_values=values)
    string("to_image", None, "lead from init_image to this picture, by way of their noises", flag_values=values)
    integer("to_seed", None, "lead from the noise of --seed to that of this one", 0, 2**32 - 1, flag_values=values)
    string(
        "concat_image",
        None,
        "the low-resolution image, or the segmentation map (pixels = class numbers), of models with such conditioning",
        flag_values=values,
    )
    integer(
        "noise_level",
        None,
        "upscalers: noise level of --concat_image; default: 20",
        0,
        flag_values=values,
    )
    string("negative_label", None, "a class that guidance leads away from", flag_values=values)
    flags.DEFINE_boolean("save_trajectory", True, "write denoising.gif, the pictures on the way", flag_values=values)
    string("from_recipe", None, "make the pictures of this samples.png again", flag_values=values)


def define_file_flags(values: flags.FlagValues) -> None:
    """What models of other people may leave open; "" = as they say, or as is usual (see `extras.Extras`)."""
    flags.DEFINE_string("tokenizer", "", "of a single file: a folder with CLIP's vocabulary", flag_values=values)
    flags.DEFINE_enum("prediction", "", ["", "eps", "v"], "of a single file: what it predicts", flag_values=values)
    flags.DEFINE_string("vae", "", "an autoencoder's folder or file instead of the model's own", flag_values=values)


def define_device_flags(flag_values: flags.FlagValues) -> None:
    """The flags of runs over several hosts."""
    flags.DEFINE_boolean(
        "distributed", False, "one of several hosts; found by itself on Cloud TPU, Slurm, K8s", flag_values=flag_values
    )
    flags.DEFINE_string("coordinator", "", "host:port of process 0, where it is not found", flag_values=flag_values)
    flags.DEFINE_integer("num_processes", 1, "how many processes, with --coordinator", flag_values=flag_values)
    flags.DEFINE_integer("process_id", 0, "which of them this is, with --coordinator", flag_values=flag_values)


class _Interval(flags.ArgumentParser):
    """Two numbers with a comma between them."""

    def parse(self, argument: str) -> list[float]:
        try:
            numbers = [float(number) for number in argument.split(",")]
        except ValueError:
            numbers = argument
        check_interval("--guidance_interval", numbers)
        return numbers


def _unknown_field(argv: list[str], error: Exception) -> str:
    """Names the first --config.FIELD that the config does not have, and the nearest that it has."""
    if not any(argument.startswith("--config.") for argument in argv):  # the file itself sets it
        return f"{_config_file(argv)} fails: {str(error).splitlines()[0].strip(chr(34) + chr(39))[:200]}"
    bare = flags.FlagValues()
    parse(bare, ["", *(argument for argument in argv if argument.startswith("--config="))], config=True)
    known = list(flatten(bare.config))
    for argument in argv[1:]:
        name = argument.removeprefix("--config.").split("=")[0]
        if argument.startswith("--config.") and name not in known:
            return f"there is no field config.{name}{nearest(name, known)}"
    return str(error)


def _config_file(argv: list[str]) -> str:
    return next((a.removeprefix("--config=") for a in argv if a.startswith("--config=")), "the config file")


def run(command: Callable[[list[str]], None], argv: list[str] | None = None) -> int:
    """Runs `command(argv)`; returns the exit status: 0, 1 (the run failed), 2 (the input was wrong), 130 (Ctrl-C)."""
    argv = list(sys.argv if argv is None else argv)
    try:
        command(argv)
        return 0
    except InputError as error:
        status, message = 2, str(error)
    except RunError as error:
        status, message = 1, str(error)
    except KeyboardInterrupt:
        status, message = 130, "interrupted"
    except OSError as error:  # a full, read-only or vanished disk
        status, message = 1, f"{error.filename}: {error.strerror or error}" if error.filename else str(error)
    name = Path(argv[0]).stem or "ldm_jax"
    print(f"{name}: {' '.join(message.split())}", file=sys.stderr)
    return status


def start_devices(flag_values: flags.FlagValues) -> None:
    """Imports JAX with the settings that all commands share, joins the other hosts, and prints the device line."""
    from ldm_jax.runtime.xla import configure

    configure()
    import jax

    if flag_values.coordinator:
        _check_coordinator(flag_values)
        jax.distributed.initialize(flag_values.coordinator, flag_values.num_processes, flag_values.process_id)
    elif flag_values.distributed:
        jax.distributed.initialize()
    devices = jax.devices()
    hosts = f" on {jax.process_count()} hosts" if jax.process_count() > 1 else ""
    if jax.process_index() == 0:
        kind = f"{os.cpu_count()} cores" if devices[0].platform == "cpu" else devices[0].device_kind
        print(f"Device: {len(devices)} x {devices[0].platform} ({kind}){hosts}, jax {jax.__version__}", flush=True)


def _check_coordinator(flag_values: flags.FlagValues) -> None:
    host, _, port = flag_values.coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise InputError(f"--coordinator={flag_values.coordinator} is no host:port, e.g. 10.0.0.1:1234")
    if not 0 <= flag_values.process_id < flag_values.num_processes:
        raise InputError(
            f"--process_id is {flag_values.process_id}; of --num_processes={flag_values.num_processes} it must be "
            f"from 0 to {flag_values.num_processes - 1}"
        )
