"""Trains everything a config describes, and ends with samples, scores and a report.

    python -m ldm_jax.train --config=configs/fashion_mnist.py [--workdir=runs/fashion_mnist]
                            [--config.FIELD=VALUE ...] [--print_config] [--dry_run]

The same command again goes on where it stopped, or says that all is done.
"""

import shlex
import sys
from pathlib import Path
from types import ModuleType

from absl import flags
from ml_collections import ConfigDict

from ldm_jax import command_line
from ldm_jax.config import io as config_io
from ldm_jax.config import rules as config_rules
from ldm_jax.config.renamed import rename_fields
from ldm_jax.run_folder import layout as run_folder_layout


def define_flags(argv: list[str]) -> flags.FlagValues:
    """The flags of this command, not yet parsed."""
    flag_values = flags.FlagValues()
    flags.DEFINE_string(
        "workdir", None, "the run folder; default: runs/ and the config's name", flag_values=flag_values
    )
    flags.DEFINE_boolean("print_config", False, "print the resolved config and stop", flag_values=flag_values)
    flags.DEFINE_boolean("dry_run", False, "check everything, compile and write nothing", flag_values=flag_values)
    command_line.define_device_flags(flag_values)
    return flag_values


def main(argv: list[str]) -> None:
    """The command: checks first, then the stages one after the other."""
    flag_values = define_flags(argv)
    if command_line.wants_help(argv, __doc__, flag_values):
        return
    command_line.parse(flag_values, argv, config=True)
    config = flag_values.config
    config_rules.validate(config)
    if flag_values.print_config:
        print(config_io.to_json(config), end="")
        return
    config_file = Path(flag_values["config"].config_filename)
    workdir = Path(flag_values.workdir or Path("runs") / config_file.stem)
    run_folder_layout.check(workdir, config)
    command_line.start_devices(flag_values)

    from ldm_jax import job  # JAX and all that stands on it: imported after the checks that need none of it

    command = shlex.join(["python", "-m", "ldm_jax.train", *argv[1:]])
    job.run(config, workdir, command=command, dry_run=flag_values.dry_run)


class _Callable(ModuleType):
    """This module, called: `ldm_jax.train(config, "runs/mine")`."""

    def __call__(self, config: ConfigDict, workdir: str | Path) -> None:
        """Trains everything a config describes, as the command does; resumes a run that is in `workdir` already.

        Args:
          config: such as a config file's `get_config()`, perhaps with fields changed.
          workdir: the run folder.

        Raises:
          InputError: a field or a file that is wrong.
          RunError: a loss that is not finite, a disk that is full.
        """
        rename_fields(config)
        config_rules.validate(config)
        run_folder_layout.check(Path(workdir), config)

        from ldm_jax import job

        job.run(config, Path(workdir))


sys.modules[__name__].__class__ = _Callable

if __name__ == "__main__":
    sys.exit(command_line.run(main))
