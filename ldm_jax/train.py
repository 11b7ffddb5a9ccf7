"""Trains the models of a config, then writes samples, an evaluation and a report.

    python -m ldm_jax.train --config=configs/fashion_mnist.py [--workdir=runs/fashion_mnist]
                            [--config.FIELD=VALUE ...] [--print_config] [--dry_run]
                            [--compile_for=v5e:16x16]

The same command resumes an interrupted run, or says that all is done. SIGTERM saves and ends it with exit status 143.
"""

import os
import shlex
import sys
from pathlib import Path
from types import ModuleType

from absl import flags
from ml_collections import ConfigDict

from ldm_jax import command_line
from ldm_jax.config import io as config_io
from ldm_jax.config import rules as config_rules
from ldm_jax.config.io import open_fields
from ldm_jax.config.renamed import rename_fields
from ldm_jax.run_folder import layout as run_folder_layout
from ldm_jax.run_folder.store import local_folder


def define_flags() -> flags.FlagValues:
    """The flags of this command, not yet parsed; `command_line.parse` adds --config."""
    values = flags.FlagValues()
    run = "the run folder, a path or a URL gs:// or s3://; default: runs/ and the config's name"
    flags.DEFINE_string("workdir", None, run, flag_values=values)
    flags.DEFINE_boolean("print_config", False, "print the resolved config and exit", flag_values=values)
    flags.DEFINE_boolean("dry_run", False, "check all inputs; compile and write nothing", flag_values=values)
    target = "compile the training steps for a TPU slice (v4, v5e, v5p, v6e), or local, print what they need, and exit"
    flags.DEFINE_string("compile_for", None, target, flag_values=values)
    command_line.define_device_flags(values)
    return values


def main(argv: list[str]) -> None:
    """The command."""
    values = define_flags()
    if command_line.wants_help(argv, __doc__, values):
        return
    command_line.parse(values, argv, config=True)
    config, where = values.config, values.workdir or Path("runs") / Path(values["config"].config_filename).stem
    if values.print_config:
        if not open_fields(config):
            config_rules.validate(config)
        print(config_io.to_json(config), end="")
        return
    writes = not values.dry_run and values.compile_for is None
    with local_folder(where, flag="--workdir", train=writes) as workdir:
        _run(values, _checked(config, workdir), workdir, shlex.join(["python", "-m", "ldm_jax.train", *argv[1:]]))


def _run(values: flags.FlagValues, config: ConfigDict, workdir: Path, command: str) -> None:
    """Trains, or compiles only; `command` is the command line."""
    if values.compile_for not in (None, "local"):
        os.environ["JAX_PLATFORMS"] = "cpu"  # the devices of a TPU slice are not those of this machine
    command_line.start_devices(values)

    from ldm_jax import job  # it imports JAX, which takes seconds: after the checks that do not need it

    if values.compile_for is not None:
        job.compile_for(config, workdir, values.compile_for)
        return
    job.run(config, workdir, command=command, dry_run=values.dry_run)


def _checked(config: ConfigDict, workdir: Path) -> ConfigDict:
    """The config with its open fields resolved; raises InputError if it is wrong, or `workdir` has another run."""
    run_folder_layout.check_folder("workdir", workdir)
    if open_fields(config):
        from ldm_jax.data.from_images import resolve  # it imports TensorFlow Datasets, which takes a second

        config = resolve(config, workdir)
    config_rules.validate(config)
    run_folder_layout.check(workdir, config)
    from_scratch = "diffusion" in config.stages and not config.init_from
    if from_scratch and config.data.label_key != "none" and not config_rules.cross_attends(config):
        print(f"note: config.unet.attention is {config.unet.attention}: the UNet is not conditioned on classes")
    return config


class _Callable(ModuleType):
    """The type of this module, which can be called: `ldm_jax.train(config, "runs/mine")`."""

    def __call__(self, config: ConfigDict, workdir: str | Path) -> None:
        """Trains the models of a config, or resumes the run in `workdir`, as the command does.

        Args:
          config: e.g. a config file's `get_config()`, with some fields changed.
          workdir: the run folder, a path or a URL.

        Raises:
          InputError: a wrong field or file.
          RunError: a loss that is not finite, a full disk.
          Interrupted: a signal, after which all is saved.
        """
        rename_fields(config)
        with local_folder(workdir, flag="--workdir", train=True) as folder:
            config = _checked(config, folder)

            from ldm_jax import job

            job.run(config, folder)


sys.modules[__name__].__class__ = _Callable

if __name__ == "__main__":
    sys.exit(command_line.run(main))
