"""What holds of every model of diffusers, whatever its scheduler: its samplers agree, and edit images."""

import jobs
import numpy as np
from PIL import Image

import ldm_jax
from ldm_jax import command_line, sample
from ldm_jax.diffusion.solvers import SOLVERS
from ldm_jax.pipeline.load import load

NOISY = ("ddpm", "euler_a", "kdpm2_a", "dpmpp_2m_sde")


def refusal(capsys, main, *command):
    """The one line with which a command is refused."""
    assert command_line.run(main, ["command", *command]) == 2
    *_, line = capsys.readouterr().err.strip().splitlines()
    return line


def check_samplers(folder, why_not):
    """All lead to about the same image, as the noise is the same, and ancestral ones to another.

    Those of distilled models are refused, with `why_not` in the message.
    """
    model, params = load(folder)
    options = {"prompts": ["low"], "num": 1, "steps": 60, "guidance": 1.0}
    reference = ldm_jax.sample(model, params, sampler="heun", **options).astype(float)
    assert reference.std() > 20
    for sampler in SOLVERS:
        if isinstance(model.defaults.solvers[sampler], str):
            assert sampler in ("lcm", "tcd") and why_not in model.defaults.solvers[sampler]
            continue
        images = ldm_jax.sample(model, params, sampler=sampler, **options).astype(float)
        off = np.abs(images - reference).mean()
        assert (off > 5) == (sampler in NOISY), (sampler, off)


def check_edits(folder, tmp_path, weak_error):
    """Little strength keeps the image as the autoencoder has it, within `weak_error`; what a mask keeps, stays."""
    model, params = load(folder)
    rng, mask = np.random.default_rng(0), np.zeros((16, 16), np.uint8)
    image = rng.integers(0, 256, (16, 16, 3), np.uint8)
    mask[:, 8:] = 255
    Image.fromarray(image).save(tmp_path / "image.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    flags = [f"--model={folder}", "--prompt=low", "--steps=50", f"--init_image={tmp_path}/image.png"]

    def sampled(name, *more):
        out = tmp_path / name
        assert command_line.run(sample.main, ["sample", *flags, f"--out={out}", *more]) == 0
        return jobs.samples(out)["images"][0].astype(int)

    plain = np.asarray(model.first_stage.reconstruct(params["first_stage"], image[None]))[0]
    weak, strong = (sampled(name, f"--strength={s}") for name, s in (("weak", 0.04), ("strong", 0.9)))
    assert np.abs(weak - plain).mean() < weak_error < 20 < np.abs(strong - plain).mean()
    filled = sampled("filled", f"--mask={tmp_path}/mask.png")
    np.testing.assert_array_equal(filled[:, :8], image[:, :8])
    assert np.abs(filled[:, 8:] - image[:, 8:].astype(int)).mean() > 20
