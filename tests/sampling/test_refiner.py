"""A refiner behind the base model: SDXL's ensemble."""

import json
import shutil

import diffusers_folder
import jobs
import numpy as np
import pytest
from PIL import Image

from ldm_jax import command_line, sample
from ldm_jax.diffusion.random import refiner_seed
from ldm_jax.sampling.image_grids import read_recipe


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return diffusers_folder.write_stable_diffusion(tmp_path_factory.mktemp("base") / "model", xl=True)


@pytest.fixture(scope="module")
def refiner(tmp_path_factory):
    return diffusers_folder.write_stable_diffusion(tmp_path_factory.mktemp("refiner") / "model", refiner=True)


def run(model, out, *flags):
    command = ["sample", f"--model={model}", f"--out={out}", "--prompt=low", "--steps=5", "--num=2", "--batch_size=4"]
    return command_line.run(sample.main, [*command, *flags])


def images(out):
    return jobs.samples(out)["images"].astype(int)


@pytest.mark.slow
def test_a_recipe_with_a_refiner_makes_the_same_images_again(base, refiner, tmp_path, capsys):
    """Also with noise in each step, which is another one behind the base."""
    flags = [f"--refiner={refiner}", "--refiner_start=0.5", "--sampler=euler_a"]
    assert run(base, tmp_path / "out", *flags) == 0
    png = tmp_path / "out" / "samples.png"
    recipe = read_recipe(png)
    assert (recipe["refiner"], recipe["refiner_start"]) == (str(refiner), 0.5) and str(refiner) in recipe["inputs"]
    assert Image.open(tmp_path / "out" / "denoising.gif").n_frames == 5  # one for each step of both
    again = ["sample", f"--model={base}", f"--from_recipe={png}", f"--out={tmp_path / 'again'}"]
    assert command_line.run(sample.main, again) == 0
    np.testing.assert_array_equal(images(tmp_path / "again"), images(tmp_path / "out"))
    assert run(base, tmp_path / "base", "--sampler=euler_a") == 0
    assert np.abs(images(tmp_path / "base") - images(tmp_path / "out")).mean() > 3
    assert refiner_seed(0) != refiner_seed(1) and 0 <= refiner_seed(2**32 - 1) < 2**32

    other = shutil.move(refiner, tmp_path / "moved")
    diffusers_folder.write_module(refiner / "unet", *_another_unet(other))
    for name in ("vae", "text_encoder_2", "tokenizer_2", "scheduler", "model_index.json"):
        (refiner / name).symlink_to(other / name)
    assert command_line.run(sample.main, again) == 2
    assert f"was sampled from another {refiner} than" in capsys.readouterr().err
    shutil.rmtree(refiner)
    shutil.move(other, refiner)


def _another_unet(folder):
    from ldm_jax.interop.modules import unet_from_config

    config = json.loads((folder / "unet" / "config.json").read_text())
    return unet_from_config(config), config, 7


def test_inpainting_keeps_what_is_black(base, refiner, tmp_path):
    """Through both models."""
    rng = np.random.default_rng(0)
    image, mask = rng.integers(0, 255, (16, 16, 3), np.uint8), np.zeros((16, 16), np.uint8)
    mask[4:12, 4:12] = 255
    Image.fromarray(image).save(tmp_path / "image.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    edit = [f"--init_image={tmp_path}/image.png", f"--mask={tmp_path}/mask.png"]
    assert run(base, tmp_path / "out", f"--refiner={refiner}", *edit) == 0
    ours = images(tmp_path / "out")
    np.testing.assert_array_equal(ours[:, mask == 0], np.broadcast_to(image[mask == 0], ours[:, mask == 0].shape))
    assert (ours[:, mask > 0] != image[mask > 0]).mean() > 0.5


REFUSED = {
    "no path": (["--refiner=nothing_here"], "--refiner: "),
    "a start alone": (["--refiner_start=0.5"], "--refiner_start needs --refiner"),
    "no step": (["--refiner=REFINER", "--refiner_start=0.1"], "of 5 steps none is between"),
    "a base of other latents": (["--refiner=SCALED"], "has latents of another size, shift or scale than --model"),
    "another schedule": (["--refiner=BETAS"], "has another noise schedule than --model"),
    "an inpainting model": (["--refiner=INPAINTING"], "must be text-to-image models, and it without other inputs"),
    "other steps": (["--refiner=STEPS"], "begins at sigma / alpha = "),
    "CLIP": (["--refiner=REFINER", "--clip=run"], "do not go with a refiner"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case, base, refiner, tmp_path, capsys):
    flags, words = REFUSED[case]
    changes = {"SCALED": ("vae/config.json", {"scaling_factor": 0.13025}),
               "BETAS": ("scheduler/scheduler_config.json", {"beta_end": 0.02}),
               "STEPS": ("scheduler/scheduler_config.json", {"steps_offset": 0})}  # fmt: skip
    name = flags[0].removeprefix("--refiner=")
    if name in changes:
        path, change = changes[name]
        file = shutil.copytree(refiner, tmp_path / name) / path
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
    if name == "INPAINTING":
        diffusers_folder.write_stable_diffusion(tmp_path / name, xl=True, inpainting=True)
    places = {"REFINER": refiner} | {each: tmp_path / each for each in (*changes, "INPAINTING")}
    flags = [f"--refiner={places[name]}" if name in places and flag is flags[0] else flag for flag in flags]
    assert run(base, tmp_path / "out", *flags) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert words in line, line
    assert not (tmp_path / "out").exists()


def test_the_refiner_alone_from_noise_is_warned_of(refiner, tmp_path, capsys):
    assert run(refiner, tmp_path / "out") == 0
    assert (
        "warning: --model is SDXL's refiner, trained on low noise levels alone; add --init_image"
        in capsys.readouterr().err
    )


def test_a_refiner_without_its_option_is_refused_by_name(refiner, tmp_path, capsys):
    folder = shutil.copytree(refiner, tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"requires_aesthetics_score": False}))
    assert run(folder, tmp_path / "out") == 2
    assert "it must be 36 (see requires_aesthetics_score)" in capsys.readouterr().err
