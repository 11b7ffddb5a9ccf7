"""What `convert` writes, opened by diffusers: the same networks, and from the same noise the same images."""

import json
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
import transformers
from parity.quiet import open_quietly, without_warnings
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))  # for `import random_runs`

import diffusers_folder
import ldm_files
import random_runs
import tiny

from ldm_jax import command_line, convert, sample
from ldm_jax.interop.ldm_families import FAMILIES

LATENTS = {"diffusion.timesteps": 1000, "sampling.guidance": 3.0}
RUNS = {  # changes of tests/tiny.py, classes, class of the scheduler
    "codes, two tokens, ddim by uneven numbers": (
        {
            "autoencoder.type": "vq",
            "autoencoder.codebook_size": 64,
            "unet.context_tokens": 2,
            "sampling.steps": 7,
            "diffusion.prediction": "z0",  # so that latents lie among the codes
        },
        tiny.CLASS_NAMES,
        "EulerDiscreteScheduler",
    ),
    "unipc, guided in an interval, rescaled": (
        {
            "diffusion.schedule": "cosine",
            "diffusion.prediction": "v",
            "sampling.sampler": "unipc",
            "sampling.steps": 8,
            "sampling.guidance_interval": (0.1, 0.8),
            "sampling.guidance_rescale": 0.7,
        },
        tiny.CLASS_NAMES,
        "UniPCMultistepScheduler",
    ),
    "heun, two classes": (
        {"sampling.sampler": "heun", "sampling.spacing": "karras", "diffusion.timesteps": 20},
        ("cat", "dog"),
        "HeunDiscreteScheduler",
    ),
    "no attention, no classes": (
        {"unet.attention": (False,), "sampling.sampler": "dpmpp_2m", "diffusion.prediction": "z0"},
        (),
        "DPMSolverMultistepScheduler",
    ),
    "rectified flow, uneven numbers of trailing steps": (
        {"diffusion.schedule": "rectified_flow", "diffusion.prediction": "flow", "sampling.steps": 7},
        tiny.CLASS_NAMES,
        "FlowMatchEulerDiscreteScheduler",
    ),
    "rectified flow, between the timesteps, guided in an interval": (
        {
            "diffusion.schedule": "rectified_flow",
            "diffusion.prediction": "flow",
            "sampling.sampler": "euler",
            "sampling.spacing": "flow",
            "sampling.steps": 6,
            "sampling.guidance_interval": (0.2, 0.9),
        },
        tiny.CLASS_NAMES,
        "FlowMatchEulerDiscreteScheduler",
    ),
    "guided by an earlier checkpoint in an interval": (
        {
            "sampling.sampler": "unipc",
            "sampling.guide_step": 4,
            "sampling.guidance": 2.5,
            "sampling.guidance_interval": (0.1, 0.9),
        },
        tiny.CLASS_NAMES,
        "UniPCMultistepScheduler",
    ),
    "pixels, a variance": (
        {
            "autoencoder.type": "none",
            "diffusion.variance": "learned",
            "diffusion.prediction": "z0",
            "sampling.spacing": "leading",
        },
        tiny.CLASS_NAMES,
        "DDIMScheduler",
    ),
}
CONCAT = {  # changes of tests/tiny.py
    "a low-resolution image, pixels": {
        "concat.type": "low_resolution",
        "concat.factor": 2,
        "autoencoder.type": "none",
        "diffusion.prediction": "z0",
        "sampling.spacing": "leading",
    },
    "a low-resolution image, smaller than the latents": {"concat.type": "low_resolution", "concat.factor": 4},
    "a masked image": {"concat.type": "inpainting", "sampling.sampler": "unipc"},
    "a masked image in colour, codes": {
        "data.channels": 3,
        "concat.type": "inpainting",
        "autoencoder.type": "vq",
        "autoencoder.codebook_size": 64,
        "diffusion.prediction": "z0",
    },
    "segments": {"concat.type": "segments", "concat.num_segments": 3, "data.segments_key": "areas"},
}
NUM = 4  # images


@pytest.fixture(autouse=True)
def modules(tmp_path, monkeypatch):
    """Where diffusers copies a folder's own code to."""
    monkeypatch.setattr(diffusers.utils.dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))


def converted(model, to):
    assert command_line.run(convert.main, ["convert", f"--model={model}", f"--to={to}"]) == 0
    return to


def opened(folder):
    """The pipeline in a folder, without a warning."""
    with without_warnings():
        pipe = diffusers.DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, low_cpu_mem_usage=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("kind", RUNS)
def test_diffusers_samples_the_images_of_a_run(kind, tmp_path):
    changes, class_names, scheduler = RUNS[kind]
    contrast = 0.6 if "pixels" in kind else 0.4
    made = random_runs.random_run(tmp_path / "run", LATENTS | changes, class_names, contrast=contrast)
    folder = converted(made, tmp_path / "folder")
    unet = open_quietly("UNet2DConditionModel", folder / "unet")
    if (folder / "vae").exists():
        open_quietly("VQModel" if "codes" in kind else "AutoencoderKL", folder / "vae")
    size, c = unet.config.sample_size, unet.config.in_channels
    noise = np.random.default_rng(0).standard_normal((8, size, size, c)).astype(np.float32)
    np.save(tmp_path / "noise.npy", noise)
    command = ["sample", f"--model={made}", f"--out={tmp_path / 'out'}", f"--init_latents={tmp_path / 'noise.npy'}"]
    assert command_line.run(sample.main, [*command, "--num=8", "--batch_size=8", "--nosave_trajectory"]) == 0
    with np.load(tmp_path / "out" / "samples.npz") as samples:
        ours, labels = samples["images"].astype(float), samples["labels"].tolist()

    pipe = opened(folder)
    assert type(pipe.scheduler).__name__ == scheduler
    z_T = torch.from_numpy(noise.transpose(0, 3, 1, 2).copy())
    conditions = {"class_labels": [class_names[label] for label in labels]} if class_names else {"num_images": 8}
    theirs = (pipe(**conditions, latents=z_T, output_type="np").images * 255).round()

    assert theirs.shape == ours.shape == (8, 8, 8, 1)
    assert theirs.std() > 10 and ((theirs > 0) & (theirs < 255)).mean() > 0.5
    off = np.abs(ours - theirs)
    print(f"{(off > 0).mean():.2%} of the values differ, by {off.max():.0f} at most")
    assert off.max() <= 1 and (off > 0).mean() < 0.005
    if class_names:
        other = (pipe([0] * 8, latents=z_T, output_type="np").images * 255).round()
        assert (other != theirs).any()
        with pytest.raises(ValueError, match="is no class"):
            pipe(len(class_names))
        assert pipe(class_names[0]).images[0].size == (8, 8)


def concat_input(kind, folder):
    """What concat conditioning is made of: the flags of `sample`, and the pipeline's arguments."""
    rng = np.random.default_rng(1)
    if kind == "segments":
        image = Image.fromarray(rng.integers(0, 3, (8, 8), np.uint8))
        image.putpalette([0, 0, 0, 90, 0, 0, 0, 200, 0])  # whose colours do not matter
    else:
        side = {"a low-resolution image, pixels": 4, "a low-resolution image, smaller than the latents": 2}.get(kind, 8)
        image = Image.fromarray(rng.integers(0, 256, (side, side, 3) if "colour" in kind else (side, side), np.uint8))
    image.save(folder / "a.png")
    if "masked" not in kind:
        return [f"--concat_image={folder}/a.png"], {"image": image}
    mask = Image.fromarray(np.where(rng.random((8, 8)) < 0.6, rng.integers(128, 256, (8, 8)), 127).astype(np.uint8))
    mask.save(folder / "mask.png")
    return [f"--init_image={folder}/a.png", f"--mask={folder}/mask.png"], {"image": image, "mask_image": mask}


@pytest.mark.parametrize("kind", CONCAT)
def test_diffusers_samples_with_concat_conditioning(kind, tmp_path):
    contrast = 0.6 if "pixels" in kind else 0.4
    made = random_runs.random_run(tmp_path / "run", LATENTS | CONCAT[kind], contrast=contrast)
    folder = converted(made, tmp_path / "folder")
    open_quietly("UNet2DConditionModel", folder / "unet")
    flags, inputs = concat_input(kind, tmp_path)
    shape = (NUM, 8, 8, 1) if "pixels" in kind else (NUM, 4, 4, 2)
    noise = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    np.save(tmp_path / "noise.npy", noise)
    command = ["sample", f"--model={made}", f"--out={tmp_path / 'out'}", f"--init_latents={tmp_path / 'noise.npy'}"]
    assert command_line.run(sample.main, [*command, *flags, f"--num={NUM}", "--nosave_trajectory"]) == 0
    with np.load(tmp_path / "out" / "samples.npz") as samples:
        ours, labels = samples["images"].astype(float), samples["labels"].tolist()

    pipe, z_T = opened(folder), torch.from_numpy(noise.transpose(0, 3, 1, 2).copy())
    arguments = {"class_labels": labels, "latents": z_T, "output_type": "np"}
    theirs = (pipe(**arguments, **inputs).images * 255).round()
    off = np.abs(ours - theirs)
    print(f"{(off > 0).mean():.2%} of the values differ, by {off.max():.0f} at most")
    assert theirs.shape == ours.shape == (NUM, 8, 8, 3 if "colour" in kind else 1)
    assert theirs.std() > 10 and ((theirs > 0) & (theirs < 255)).mean() > 0.5
    assert off.max() <= 1 and (off > 0).mean() < 0.005

    arrays = {name: [np.array(image)] * NUM for name, image in inputs.items()}  # one for each, which are all the same
    again = pipe(**arguments, **arrays).images
    np.testing.assert_allclose(again * 255, theirs, atol=0.51)
    other = {name: images[0] for name, images in arrays.items()}
    other["image"] = np.zeros_like(other["image"])
    changed = pipe(**arguments, **other).images
    assert ((changed * 255).round() != theirs).any()
    if "mask_image" in inputs:
        kept = np.array(inputs["mask_image"]) < 128
        image = np.array(inputs["image"]).reshape(theirs.shape[1:])
        np.testing.assert_array_equal(theirs[:, kept], np.broadcast_to(image[kept], theirs[:, kept].shape))


def test_in_half_precision_the_known_region_stays_to_the_bit(tmp_path):
    made = random_runs.random_run(tmp_path / "run", LATENTS | CONCAT["a masked image"])
    pipe = opened(converted(made, tmp_path / "folder")).to(torch.bfloat16)
    image, mask = concat_input("a masked image", tmp_path)[1].values()
    keep = np.array(mask) < 128
    sampled = np.array(pipe(["dark"], image=np.array(image), mask_image=~keep).images[0])  # a mask of bool
    np.testing.assert_array_equal(sampled[keep], np.array(image)[keep])
    assert (sampled != np.array(image))[~keep].mean() > 0.5


def test_arguments_that_the_pipeline_refuses(tmp_path):
    pipes = {}
    for kind in ("a low-resolution image, pixels", "a masked image", "segments"):
        made = random_runs.random_run(tmp_path / kind, LATENTS | CONCAT[kind])
        pipes[kind] = opened(converted(made, tmp_path / f"folder of {kind}"))
    pipes["nothing"] = opened(converted(random_runs.random_run(tmp_path / "run"), tmp_path / "folder"))
    grey, small = Image.new("L", (8, 8)), Image.new("L", (4, 4))
    low_resolution = "a low-resolution image, pixels"
    refused = [
        (low_resolution, {}, "image must be the low-resolution image"),
        (low_resolution, {"image": small, "mask_image": small}, "mask_image None"),
        (low_resolution, {"image": grey}, r"image is uint8\[8, 8, 1\]; it must be uint8\[4, 4, 1\]"),
        (low_resolution, {"image": [small, small]}, "image has 2 images; .* one for all or one for each of 1"),
        (low_resolution, {"image": np.zeros((4, 4))}, r"image is float64\[4, 4, 1\]"),
        ("a masked image", {"image": grey}, "image and mask_image must be the image and its mask"),
        ("a masked image", {"image": grey, "mask_image": small}, r"mask_image is uint8\[4, 4, 1\]"),
        ("segments", {"image": Image.new("L", (8, 8), 3)}, "has a pixel of class 3; the model has classes 0 to 2"),
        ("segments", {"image": grey.convert("RGB")}, "must be grey or have a palette, not RGB"),
        ("nothing", {"image": grey}, "has no concat conditioning"),
        ("nothing", {"mask_image": grey}, "has no concat conditioning"),
    ]
    for kind, inputs, words in refused:
        with pytest.raises(ValueError, match=words):
            pipes[kind](**inputs)


def test_diffusers_samples_a_single_file_of_classes(tmp_path, monkeypatch):
    """CompVis' class-conditional model, which diffusers has no pipeline for, by the one in the folder."""
    family = "class-conditional LDM"
    monkeypatch.setitem(FAMILIES, family, FAMILIES[family]._replace(sample_size=8))
    file = ldm_files.write_file(tmp_path / "file", family)
    folder = converted(file, tmp_path / "folder")
    open_quietly("UNet2DConditionModel", folder / "unet")
    open_quietly("VQModel", folder / "vae")
    noise = np.random.default_rng(0).standard_normal((4, 8, 8, 3)).astype(np.float32)
    np.save(tmp_path / "noise.npy", noise)
    flags = [f"--init_latents={tmp_path / 'noise.npy'}", "--num=4", "--steps=8", "--label=1,3"]
    ours = []
    for model in (file, folder):
        assert command_line.run(sample.main, ["sample", f"--model={model}", f"--out={tmp_path / 'out'}", *flags]) == 0
        with np.load(tmp_path / "out" / "samples.npz") as samples:
            ours.append(samples["images"].astype(float))
    np.testing.assert_array_equal(*ours)

    pipe = opened(folder)
    z_T = torch.from_numpy(noise.transpose(0, 3, 1, 2).copy())
    sampled = pipe([1, "3", 1, 3], num_inference_steps=8, latents=z_T, output_type="np").images
    theirs = (sampled * 255).round()
    off = np.abs(ours[0] - theirs)
    print(f"{(off > 0).mean():.2%} of the values differ, by {off.max():.0f} at most")
    assert theirs.std() > 10 and ((theirs > 0) & (theirs < 255)).mean() > 0.5
    assert off.max() <= 1 and (off > 0).mean() < 0.005


@pytest.mark.parametrize("kind", [None, "a masked image"])
def test_samples_are_the_same_after_diffusers_has_saved_the_pipeline(kind, tmp_path):
    """With the code of the converted folder, as diffusers does not save it."""
    changes, inputs = (CONCAT[kind], concat_input(kind, tmp_path)[1]) if kind else ({}, {})
    folder = converted(random_runs.random_run(tmp_path / "run", changes, contrast=0.2), tmp_path / "folder")
    quick = {"trust_remote_code": True, "low_cpu_mem_usage": False}
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, **quick)
    pipe.save_pretrained(tmp_path / "saved")
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "saved", custom_pipeline=str(folder), **quick)
    one, other = (
        p([0, 3], generator=torch.Generator().manual_seed(0), output_type="pt", **inputs).images for p in (pipe, again)
    )
    assert torch.equal(one, other)
    assert one.std() > 0


FOLDERS = {
    "StableDiffusionPipeline": diffusers_folder.write_stable_diffusion,
    "StableDiffusionXLPipeline": lambda folder: diffusers_folder.write_stable_diffusion(folder, xl=True),
    "StableDiffusionInpaintPipeline": lambda folder: diffusers_folder.write_stable_diffusion(folder, inpainting=True),
    "LDMPipeline": diffusers_folder.write_unconditional,
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_diffusers_opens_what_is_written_anew(kind, tmp_path):
    folder = converted(FOLDERS[kind](tmp_path / "old"), tmp_path / "new")
    index = json.loads((folder / "model_index.json").read_text())
    for name in ("unet", "vqvae" if kind == "LDMPipeline" else "vae"):
        open_quietly(index[name][1], folder / name)
    for name in [name for name in index if name.startswith("text_encoder")]:
        model = getattr(transformers, index[name][1])
        _, info = model.from_pretrained(folder / name, output_loading_info=True)
        assert not any(info.values())
    with without_warnings():
        pipe = diffusers.DiffusionPipeline.from_pretrained(folder, low_cpu_mem_usage=False)
    assert type(pipe).__name__ == kind
    pipe.set_progress_bar_config(disable=True)
    if kind == "StableDiffusionPipeline":
        images = pipe("low lower", height=16, width=16, num_inference_steps=2, output_type="np").images
        assert images.shape == (1, 16, 16, 3)
