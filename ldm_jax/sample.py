"""Draws pictures from a trained model.

    python -m ldm_jax.sample --model=runs/fashion_mnist --out=samples [--num=64] [--label=3,7] [--sampler=ddim]
                             [--steps=50] [--guidance=2.0] [--eta=0.0] [--seed=0] [--batch_size=64]
                             [--init_latents=FILE.npy]

Writes samples.npz (`images` uint8 [N, H, W, C], `labels` int32 [N]), samples.png and denoising.gif to --out. What is
left out is as in the model's config. Picture k depends on the seed, k and its label alone, not on the batch around it.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from absl import flags

from ldm_jax import commands, configuration, run_folder
from ldm_jax.errors import InputError

if TYPE_CHECKING:
    from ldm_jax.trained import Trained


def define_flags() -> flags.FlagValues:
    """The flags of this command, not yet parsed. None = as in the model's config."""
    values = flags.FlagValues()
    flags.DEFINE_list("label", None, "classes, by number or name, taken in turn; default: all", flag_values=values)
    commands.define_drawing_flags(values, num=64)
    flags.DEFINE_string("init_latents", None, "initial noise, .npy float32 [N, h, w, c]", flag_values=values)
    commands.define_device_flags(values)
    return values


def main(argv: list[str]) -> None:
    """The command."""
    values = define_flags()
    if commands.wants_help(argv, __doc__, values):
        return
    configuration.parse(values, argv)
    commands.require(values, "model", "out")
    out = Path(values.out)
    run_folder.check_folder("out", out)
    commands.start_devices(values)

    from ldm_jax import drawing, trained

    model = trained.load(Path(values.model))
    labels = find_labels(values.label, model.class_names)
    wanted = drawing.from_flags(model, values, labels)
    z_T = read_latents(Path(values.init_latents), model, values.num) if values.init_latents else None
    drawn = drawing.draw(model, wanted, batch_size=values.batch_size or model.config.sampling.batch_size, z_T=z_T)
    drawing.save(out, drawn)
    print(f"{values.num} pictures: {out / 'samples.png'}")


def find_labels(wanted: list[str] | None, class_names: tuple[str, ...]) -> list[int]:
    """Class numbers of --label; all of them by default. Raises InputError for a class that does not exist."""
    if wanted is None:
        return list(range(len(class_names)))
    if not class_names:
        raise InputError(f"--label={','.join(wanted)}: the model knows no classes")
    lower = [name.lower() for name in class_names]
    labels = []
    for label in wanted or [""]:
        if label.strip().lower() in lower:
            labels.append(lower.index(label.strip().lower()))
        elif label.strip().isdigit() and int(label) < len(class_names):
            labels.append(int(label))
        else:
            known = ", ".join(f"{i} {name}" for i, name in enumerate(class_names))
            raise InputError(f"--label={label} is no class; the model knows {known}")
    return labels


def read_latents(path: Path, model: "Trained", num: int) -> np.ndarray:
    """The initial noise of --init_latents; raises InputError unless it is a float32 [N, h, w, c] with N = num."""
    from ldm_jax.builders import latent_shape

    try:
        z_T = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InputError(f"--init_latents={path} cannot be read as .npy: {error}") from error
    wanted = (num, *latent_shape(model.config))
    if not isinstance(z_T, np.ndarray) or z_T.shape != wanted or z_T.dtype != np.float32:
        given = f"{z_T.dtype}{list(z_T.shape)}" if isinstance(z_T, np.ndarray) else "an archive"
        raise InputError(f"--init_latents={path} is {given}; it must be float32{list(wanted)}")
    if not np.isfinite(z_T).all():
        raise InputError(f"--init_latents={path} holds values that are not finite")
    return z_T


if __name__ == "__main__":
    sys.exit(commands.run(main))
