"""Whatever is wrong with the input: one line that says what, status 2, no traceback, and nothing written."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny

from ldm_jax import commands, evaluate, sample, train

TINY = "--config=tests/tiny.py"

TRAIN = {  # flags -> what the line must say
    "no config": ([], "--config"),
    "a config file that is not there": (["--config=configs/nope.py"], "configs/nope.py"),
    "a stray word": ([TINY, "faster"], "'faster' is no flag"),
    "an unknown flag": ([TINY, "--workdirr=x"], "did you mean workdir?"),
    "a misspelt field": ([TINY, "--config.diffusion.stepz=3"], "did you mean diffusion.steps?"),
    "a misspelt section": ([TINY, "--config.difusion.steps=3"], "did you mean diffusion.steps?"),
    "a word for a whole number": ([TINY, "--config.diffusion.steps=many"], "config.diffusion.steps"),
    "a fraction for a whole number": ([TINY, "--config.diffusion.steps=1.5"], "config.diffusion.steps"),
    "a word for a number": ([TINY, "--config.diffusion.learning_rate=fast"], "config.diffusion.learning_rate"),
    "a word for a truth value": ([TINY, "--config.data.flip=perhaps"], "config.data.flip"),
    "a number for a section": ([TINY, "--config.unet=3"], "config.unet"),
    "words in a tuple": ([TINY, "--config.unet.block_out_channels=(8,big)"], "config.unet.block_out_channels"),
    "an empty tuple": ([TINY, "--config.unet.block_out_channels=()"], "config.unet.block_out_channels"),
    "a negative width": ([TINY, "--config.unet.block_out_channels=(-8,16)"], "config.unet.block_out_channels"),
    "an unknown prediction": ([TINY, "--config.diffusion.prediction=epz"], "eps, v, z0; did you mean eps?"),
    "an unknown schedule": ([TINY, "--config.diffusion.schedule=linea"], "did you mean linear?"),
    "an unknown weighting": ([TINY, "--config.diffusion.weighting=snr"], "uniform, min_snr"),
    "an unknown sampler": ([TINY, "--config.sampling.sampler=ddimm"], "did you mean ddim?"),
    "an unknown spacing": ([TINY, "--config.sampling.spacing=even"], "leading, trailing, linspace"),
    "an unknown autoencoder": ([TINY, "--config.autoencoder.kind=vae"], "kl, vq, none"),
    "an unknown number type": ([TINY, "--config.dtype=float8"], "float32, bfloat16"),
    "an unknown perceptual net": ([TINY, "--config.autoencoder.loss.perceptual_net=vgg19"], "vgg16, alexnet"),
    "an unknown learning rate decay": ([TINY, "--config.diffusion.decay=step"], "constant, cosine"),
    "two colours": ([TINY, "--config.data.channels=2"], "1, 3"),
    "an unknown crop": ([TINY, "--config.data.crop=middle"], "center, none"),
    "a negative seed": ([TINY, "--config.seed=-1"], "config.seed is -1"),
    "no steps": ([TINY, "--config.diffusion.steps=0"], "config.diffusion.steps is 0"),
    "an empty batch": ([TINY, "--config.autoencoder.batch_size=0"], "config.autoencoder.batch_size is 0"),
    "more than all labels dropped": ([TINY, "--config.diffusion.label_dropout=1.5"], "from 0.0 to 1.0"),
    "an eta beyond 1": ([TINY, "--config.sampling.eta=2.0"], "from 0.0 to 1.0"),
    "eta for a solver without": ([TINY, "--config.sampling.eta=0.5", "--config.sampling.sampler=ddpm"], "eta"),
    "falling betas": ([TINY, "--config.diffusion.beta_start=0.5"], "config.diffusion.beta_start"),
    "more steps than timesteps": ([TINY, "--config.sampling.steps=21"], "config.diffusion.timesteps = 20"),
    "eps where z_T is pure noise": ([TINY, "--config.diffusion.zero_terminal_snr=True"], "prediction=v or z0"),
    "an image size that does not halve": ([TINY, "--config.data.image_size=9"], "multiple of 2"),
    "groups that do not divide": ([TINY, "--config.unet.norm_num_groups=3"], "does not divide 8"),
    "groups that do not divide the autoencoder": (
        [TINY, "--config.autoencoder.norm_num_groups=5"],
        "does not divide 8",
    ),
    "heads that do not divide": ([TINY, "--config.unet.attention_heads=3"], "does not divide"),
    "attention for other resolutions": ([TINY, "--config.unet.attention=(True,)"], "equally long"),
    "more resolutions than latents have": (
        [TINY, "--config.unet.block_out_channels=(8,8,8,8)", "--config.unet.attention=(False,False,False,False)"],
        "cannot be halved so often",
    ),
    "a discriminator too deep for the pictures": (
        [TINY, "--config.autoencoder.loss.adversarial=0.5", "--config.autoencoder.discriminator.layers=3"],
        "discriminator",
    ),
    "LPIPS on a share that does not divide": ([TINY, "--config.autoencoder.loss.perceptual_every=3"], "must divide"),
    "a batch that does not divide over devices": ([TINY, "--config.diffusion.batch_size=6"], "the 4 devices"),
    "an unknown data set": ([TINY, "--config.data.name=tinny"], "tinny"),
    "an unknown split": ([TINY, "--config.data.train_split=dev"], "dev"),
    "an unknown image feature": ([TINY, "--config.data.image_key=photo"], "photo"),
    "an unknown label feature": ([TINY, "--config.data.label_key=kind"], "kind"),
    "an autoencoder that is not there": ([TINY, "--config.autoencoder.checkpoint=nowhere"], "nowhere"),
}


def fails(command, flags, capsys, status=2):
    """The one line of a command that must fail."""
    assert commands.run(command, ["command", *map(str, flags)]) == status
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert "Traceback" not in lines[0]
    return lines[0]


@pytest.mark.parametrize("case", TRAIN)
def test_train_refuses(case, tiny_data, tmp_path, capsys):
    flags, expected = TRAIN[case]
    workdir = tmp_path / "run"
    line = fails(
        train.main,
        [*flags, f"--workdir={workdir}", *([f"--config.data.dir={tiny_data}"] if TINY in flags else [])],
        capsys,
    )
    assert expected in line
    assert not workdir.exists()
