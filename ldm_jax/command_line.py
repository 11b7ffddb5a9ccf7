"""The command line: flags shared by several commands, parsing with config fields, exit statuses, the device line."""

import math
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from ldm_jax.config.fields import DTYPES, check_choice, check_interval, nearest
from ldm_jax.config.io import flatten
from ldm_jax.config.renamed import rename_arguments, rename_fields
from ldm_jax.diffusion.posthoc_ema import LONGEST, SHORTEST
from ldm_jax.diffusion.process import VARIANCES
from ldm_jax.diffusion.solvers import SOLVERS
from ldm_jax.diffusion.spacing import SPACINGS
from ldm_jax.errors import InputError, Interrupted, RunError
from ldm_jax.runtime.terminal import print_any_text

MODEL = "a run folder or its URL, diffusers folder, .safetensors, .ckpt, or hub id: org/name[@revision]"
SEEDS = {"lower_bound": 0, "upper_bound": 2**32 - 1}
OUT_OF_MEMORY = (
    "lower the batch size (config.autoencoder.batch_size, config.diffusion.batch_size ...; --batch_size of sample) or "
    "the size of images (config.data.image_size; --height and --width, or --vae_tiling)"
)
SHARE = {"lower_bound": 0.0, "upper_bound": 1.0}


def parse(flag_values: flags.FlagValues, argv: list[str], *, config: bool = False) -> None:
    """Parses the command line into `flag_values`; with `config`, also --config=FILE and --config.FIELD=VALUE.

    Raises InputError for an unknown flag or field, or a wrong value.
    """
    argv = _with_equals(rename_arguments(argv), "--config") if config else rename_arguments(argv)
    file = next((a.removeprefix("--config=") for a in argv[1:] if a.startswith("--config=")), None)
    if config and file is not None and not Path(file).is_file():
        raise InputError(f"there is no config file {file!r}; configs are in configs/")
    try:
        if config:
            help_text = "a file of configs/"
            config_flags.DEFINE_config_file("config", None, help_text, flag_values=flag_values, sys_argv=argv)
        rest = flag_values(argv)
        loaded = flag_values["config"].value.to_dict() if config and flag_values["config"].value is not None else {}
    except InputError:  # of _Interval
        raise
    except flags.UnrecognizedFlagError as error:
        known = [name for name in flag_values if not name.startswith("config.")]
        raise InputError(f"there is no flag --{error.flagname}{nearest(error.flagname, known)}") from error
    except (AttributeError, KeyError) as error:
        raise InputError(_unknown_field(argv, file, error)) from error
    except (flags.Error, TypeError, ValueError, OSError, ImportError, SyntaxError) as error:
        message = str(error)
        if "Traceback" in message:  # of a config file that fails; its last line is the error
            message = f"{file} fails: {message.strip().splitlines()[-1]}"
        raise InputError(" ".join(message.split())) from error
    except Exception as error:  # whatever a config file of the user's does
        raise InputError(f"{file} fails: {type(error).__name__}: {error}") from error
    if loaded:
        rename_fields(flag_values.config)
    if len(rest) > 1:
        raise InputError(f"{rest[1]!r} is no flag; flags are written --name=value")
    if config and not loaded:
        raise InputError("--config is missing; it must be a config file, e.g. --config=configs/fashion_mnist.py")


def _with_equals(argv: list[str], name: str) -> list[str]:
    """The arguments with `name VALUE`, if it is there, written `name=VALUE`."""
    if name not in argv[:-1]:
        return argv
    k = argv.index(name)
    return [*argv[:k], f"{name}={argv[k + 1]}", *argv[k + 2 :]]


def require(values: flags.FlagValues, *names: str) -> None:
    """Raises InputError for a missing flag of `names`, or an unknown sampler, spacing, variance or dtype."""
    for name in names:
        if not values[name].value:
            raise InputError(f"--{name} is missing; it must be {values[name].help}")
    for name, choices in (("sampler", SOLVERS), ("spacing", SPACINGS), ("variance", VARIANCES), ("dtype", DTYPES)):
        if name in values and values[name].value is not None:
            check_choice(f"--{name}", values[name].value, choices)


def wants_help(argv: list[str], usage: str, flag_values: flags.FlagValues) -> bool:
    """Whether the command line has --help; if so, prints `usage` and the flags."""
    if not {"--help", "-h", "-help", "--helpfull"} & set(argv):
        return False
    print(usage.strip(), end="\n\nFlags:\n")
    for name in sorted(flag_values):
        flag = flag_values[name]
        if not name.startswith("config"):
            print(f"  --{name}={flag.default if flag.default is not None else '...'}  {flag.help}")
    return True


class Number(flags.FloatParser):
    """A flag of one finite number."""

    def convert(self, argument: float | int | str) -> float:
        """The number; raises ValueError for nan and inf."""
        number = super().convert(argument)
        if not math.isfinite(number):
            raise ValueError("it must be a finite number")
        return number


def _define_number(name: str, *, help: str, flag_values: flags.FlagValues, default: float | None, **bounds) -> None:
    flags.DEFINE(Number(**bounds), name, default, help, flag_values)


def _definers(values: flags.FlagValues) -> tuple[Callable, Callable, Callable, Callable]:
    """Functions that define a text, an integer, a number and a boolean flag in `values`; the default is None."""
    types = flags.DEFINE_string, flags.DEFINE_integer, _define_number, flags.DEFINE_boolean
    return tuple(partial(define, default=None, flag_values=values) for define in types)


def define_sampling_flags(values: flags.FlagValues, *, num: int) -> None:
    """The flags of model, samples, guidance and solver; None = as in the model's config."""
    string, integer, number, boolean = _definers(values)
    string("model", help=MODEL)
    string("out", help="the output folder")
    integer("num", default=num, help="number of samples", lower_bound=1)
    prompt = "text-to-image models: the prompt of one sample; repeat the flag for more"
    flags.DEFINE_multi_string("prompt", None, prompt, flag_values=values)
    string("prompt_file", help="a text file with one prompt a line, instead of --prompt")
    string("negative_prompt", help="text-to-image models: the negative prompt of classifier-free guidance")
    string("dtype", help=f"of the activations: {' or '.join(DTYPES)}")
    string("sampler", help=f"the solver: {', '.join(SOLVERS)}")
    integer("steps", help="number of denoiser calls", lower_bound=1)
    number("guidance", help="classifier-free guidance scale; 1 = no guidance", lower_bound=0.0)
    string("classifier", help="a run folder with a classifier of noisy latents, for classifier guidance")
    number("classifier_scale", help="classifier guidance scale; default 1, 0 = no guidance", lower_bound=0.0)
    string("clip", help="a run folder with a CLIP, for CLIP guidance by --prompt")
    number("clip_guidance_scale", help="CLIP guidance scale; default 1, 0 = no guidance", lower_bound=0.0)
    flags.DEFINE(_Interval(), "guidance_interval", None, "the range of t / T with guidance, e.g. 0.15,0.85", values)
    number("guidance_parallel", help="adaptive projected guidance: eta (Sadat 2024), e.g. 0; 1 = off", **SHARE)
    number("guidance_max_norm", help="adaptive projected guidance: the limit r, e.g. 15; 0 = none", lower_bound=0.0)
    boolean("cfgpp", default=False, help="CFG++ (Chung 2024): --guidance is lambda, 0 to 1, default 0.6")
    guide = "autoguidance: a weaker model, PATH or RUN@STEP, from which --guidance leads away"
    string("guide_model", help=guide)
    boolean("guide_null", default=False, help="autoguidance: the weaker model has the null condition")
    number("guidance_rescale", help="guidance rescale phi (Lin 2023): 0 none ... 1 full", **SHARE)
    number("threshold", help="pixel models: dynamic thresholding quantile, e.g. 0.995", **SHARE)
    string("spacing", help=f"of the timesteps: {', '.join(SPACINGS)}")
    flags.DEFINE_list("timesteps", None, "the timesteps themselves, decreasing, e.g. 999,500,0", flag_values=values)
    number("churn", help="edm: S_churn (Karras 2022); 0 = deterministic", lower_bound=0.0)
    number("eta", help="ddim: 0 deterministic ... 1 ancestral; tcd: gamma", **SHARE)
    string("variance", help=f"ddpm: {', '.join(VARIANCES)}")
    integer("seed", default=0, help="of the noise; sample k depends on (seed, k, condition) alone", **SEEDS)
    integer("batch_size", help="samples per batch", lower_bound=1)


def define_editing_flags(values: flags.FlagValues) -> None:
    """The flags of initial images, masks, interpolations and concat conditioning."""
    string, integer, number, boolean = _definers(values)
    integer("height", help="of the samples in pixels; default: the model's, or as --init_image has it", lower_bound=1)
    integer("width", help="as --height", lower_bound=1)
    boolean("vae_tiling", default=False, help="encode and decode large images in tiles, to save memory")
    string("to_prompt", help="interpolate from the one --prompt to this prompt")
    string("init_latents", help="the initial noise: a .npy file, float32 [N, h, w, c], unit variance")
    string("init_image", help="image-to-image: the initial image, to which noise is added")
    number("strength", help="image-to-image: the amount of noise, above 0 to 1; default 0.6, with --mask 1")
    string("mask", help="inpainting: an image of init_image's size; white = generate, black = keep")
    string("outpaint", help="outpainting: extend init_image on one side by this many pixels, e.g. right:8")
    integer("resample", help="with --mask: RePaint's number of resamplings", lower_bound=1)
    integer("resample_jump", help="with --resample: RePaint's jump length in steps; default 1", lower_bound=1)
    boolean("invert", help="DDIM inversion: start from the noise that init_image is inverted to")
    string("to_image", help="interpolate from init_image to this image, by their inverted noises")
    integer("to_seed", help="interpolate from the noise of --seed to that of this seed", **SEEDS)
    concat = "the image of concat conditioning: low resolution, or a segmentation map (pixels = class indices)"
    string("concat_image", help=concat)
    integer("noise_level", help="upscalers: noise level of --concat_image; default 20", lower_bound=0)
    string("refiner", help="a model that goes on from the latents of --model: SDXL's refiner")
    number("refiner_start", help="with --refiner: the fraction of the process it starts at; default 0.8", **SHARE)
    string("negative_label", help="the negative class of classifier-free guidance")
    boolean("save_trajectory", default=True, help="write denoising.gif, z0_hat at each step")
    boolean("save_each", help="write each image to images/; default: of text-to-image models")
    string("from_recipe", help="a samples.png, whose samples are made again")


def define_file_flags(values: flags.FlagValues) -> None:
    """The flags of what a pretrained model's files leave open (see `pipeline.load.Overrides`); "" = the model's own."""
    string, *_ = _definers(values)
    string("tokenizer", default="", help="single files: a folder with CLIP's vocabulary")
    flags.DEFINE_enum("prediction", "", ["", "eps", "v"], "single files: the prediction type", flag_values=values)
    string("vae", default="", help="the folder or file of an autoencoder that replaces the model's")


def define_ema_flag(values: flags.FlagValues) -> None:
    """The flag of post-hoc EMA."""
    *_, number, _ = _definers(values)
    text = "runs with config.diffusion.ema_sigma_rels: the length of the average of the parameters, e.g. 0.08"
    number("ema_sigma_rel", help=text, lower_bound=SHORTEST, upper_bound=LONGEST)


def define_lora_flags(values: flags.FlagValues, name: str = "lora") -> None:
    """The flags of LoRA files, of which there may be several."""
    flags.DEFINE_multi_string(name, None, "a LoRA file, added to the weights; repeat it for more", flag_values=values)
    scale = f"how strongly a LoRA is added, default 1; repeat the flag, once for each --{name}"
    flags.DEFINE_multi(Number(), flags.ArgumentSerializer(), "lora_scale", None, scale, values)


def define_embedding_flag(values: flags.FlagValues) -> None:
    """The flag of textual inversion files, of which there may be several."""
    text = "a textual inversion file, whose token prompts may contain; repeat the flag for more"
    flags.DEFINE_multi_string("embedding", None, text, flag_values=values)


def lora_files(values: flags.FlagValues, name: str = "lora") -> list[tuple[Path, float]]:
    """The LoRA files of the flags with their scales; raises InputError unless there is a scale for each, or none."""
    files = values[name].value or []
    scales = values.lora_scale or [1.0] * len(files)
    if len(scales) != len(files):
        raise InputError(f"there are {len(scales)} --lora_scale for {len(files)} --{name}; each needs its own, in turn")
    return [(Path(file), scale) for file, scale in zip(files, scales)]


def define_device_flags(values: flags.FlagValues) -> None:
    """The flags of runs on several hosts."""
    string, integer, _, boolean = _definers(values)
    boolean("distributed", default=False, help="run on several hosts, detected on Cloud TPU, Slurm and Kubernetes")
    string("coordinator", default="", help="host:port of process 0, where the hosts are not detected")
    integer("num_processes", default=1, help="with --coordinator: the number of processes")
    integer("process_id", default=0, help="with --coordinator: the index of this process")


class _Interval(flags.ArgumentParser):
    """A flag of two numbers separated by a comma."""

    def parse(self, argument: str) -> list[float]:
        try:
            numbers = [float(number) for number in argument.split(",")]
        except ValueError:
            numbers = argument
        check_interval("--guidance_interval", numbers)
        return numbers


def _unknown_field(argv: list[str], file: str | None, error: Exception) -> str:
    """The error message for the first unknown --config.FIELD, with the nearest field of the config."""
    if not any(argument.startswith("--config.") for argument in argv):  # the config file sets an unknown field
        return f"{file} fails: {str(error).splitlines()[0].strip(chr(34) + chr(39))[:200]}"
    bare = flags.FlagValues()
    parse(bare, ["", f"--config={file}"], config=True)
    known = list(flatten(bare.config))
    for argument in argv[1:]:
        name = argument.removeprefix("--config.").split("=")[0]
        if argument.startswith("--config.") and name not in known:
            return f"there is no field config.{name}{nearest(name, known)}"
    return str(error)


def run(command: Callable[[list[str]], None], argv: list[str] | None = None) -> int:
    """Runs `command(argv)`; returns the exit status: 0, 1 (failed), 2 (wrong input), 130 (SIGINT), 143 (SIGTERM)."""
    argv = list(sys.argv if argv is None else argv)
    print_any_text()
    try:
        command(argv)
        return 0
    except Interrupted as interrupted:
        print(f"\nInterrupted: {interrupted}. The same command goes on from there.", flush=True)
        return interrupted.status
    except InputError as error:
        status, message = 2, str(error)
    except RunError as error:
        status, message = 1, str(error)
    except KeyboardInterrupt:
        status, message = 130, "interrupted"
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        status, message = 1, f"out of memory: {OUT_OF_MEMORY}"
    except OSError as error:  # e.g. a full disk
        status, message = 1, f"{error.filename}: {error.strerror or error}" if error.filename else str(error)
    name = Path(argv[0]).stem or "ldm_jax"
    print(f"{name}: {' '.join(message.split())}", file=sys.stderr)
    return status


def start_devices(flag_values: flags.FlagValues | None = None) -> None:
    """Configures and imports JAX, connects to the other hosts (None: there are none), and prints the device line."""
    from ldm_jax.runtime.xla import configure

    configure()
    import jax

    from ldm_jax.runtime.hosts import connect

    if flag_values is not None and flag_values.coordinator:
        host, _, port = flag_values.coordinator.rpartition(":")
        if not host or not port.isdecimal():
            raise InputError(
                f"--coordinator={flag_values.coordinator} is wrong; it must be host:port, e.g. 10.0.0.1:1234"
            )
        num, index = flag_values.num_processes, flag_values.process_id
        if not 0 <= index < num:
            raise InputError(f"--process_id is {index}; with --num_processes={num} it must be from 0 to {num - 1}")
        connect(coordinator_address=flag_values.coordinator, num_processes=num, process_id=index)
    elif flag_values is not None and flag_values.distributed:
        connect()
    devices = jax.devices()
    hosts = f" on {jax.process_count()} hosts" if jax.process_count() > 1 else ""
    if jax.process_index() == 0:
        model = f"{os.cpu_count()} cores" if devices[0].platform == "cpu" else devices[0].device_kind
        print(f"Device: {len(devices)} x {devices[0].platform} ({model}){hosts}, jax {jax.__version__}", flush=True)
