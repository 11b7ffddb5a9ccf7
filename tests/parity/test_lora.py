"""LoRA files of every dialect: the images of diffusers with the same file, within 1 of 255."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

sys.path.insert(0, str(Path(__file__).parent))  # for `import test_pipelines`

from test_pipelines import LENGTH, PROMPTS, SIZE, build, saved, tokenizer  # noqa: F401

from ldm_jax import command_line, sample
from ldm_jax.interop.ldm_names import unet_source

UNET_LAYERS = (".to_q", ".to_k", ".to_v", ".to_out.0", ".proj", ".proj_in", ".proj_out", ".net.2", ".conv1",
               ".conv2", ".conv_shortcut", ".time_emb_proj", ".downsamplers.0.conv", ".upsamplers.0.conv")  # fmt: skip
TEXT_LAYERS = (".q_proj", ".k_proj", ".v_proj", ".out_proj", ".fc1", ".fc2")


def pairs_of(module, layers, rng, rank=3):
    """Layer -> (A, B) for the layers of a torch module whose names end so."""
    pairs = {}
    for name, weight in module.state_dict().items():
        layer, shape = name.removesuffix(".weight"), tuple(weight.shape)
        if name.endswith(".weight") and layer.endswith(layers) and len(shape) in (2, 4):
            down = rng.standard_normal((rank, *shape[1:])) * np.prod(shape[1:]) ** -0.5
            up = rng.standard_normal((shape[0], rank, *(1,) * (len(shape) - 2))) * 0.6 * rank**-0.5
            pairs[layer] = down.astype(np.float32), up.astype(np.float32)
    return pairs


def diffusers_file(unet, texts):
    """diffusers' own names, without an alpha."""
    state = {}
    for layer, (down, up) in unet.items():
        state |= {f"unet.{layer}.lora.down.weight": down, f"unet.{layer}.lora.up.weight": up}
    for name, pairs in zip(("text_encoder", "text_encoder_2"), texts):
        for layer, (down, up) in pairs.items():
            where = f"{name}.{layer}.lora_linear_layer"
            state |= {f"{where}.down.weight": down, f"{where}.up.weight": up}
    return state


def peft_file(unet, texts):
    """PEFT's names below the components."""
    state = {}
    for name, pairs in zip(("unet", "text_encoder", "text_encoder_2"), (unet, *texts)):
        for layer, (down, up) in pairs.items():
            state |= {f"{name}.{layer}.lora_A.weight": down, f"{name}.{layer}.lora_B.weight": up}
    return state


def kohya_file(unet, texts, alpha=1.5):
    """kohya's names: underscores, with an alpha."""
    state = {}
    prefixes = ("lora_te",) if len(texts) == 1 else ("lora_te1", "lora_te2")
    for prefix, pairs in zip(("lora_unet", *prefixes), (unet, *texts)):
        for layer, (down, up) in pairs.items():
            name = f"{prefix}_{layer.replace('.', '_')}"
            state |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
            state[f"{name}.alpha"] = np.array(alpha, np.float32)
    return state


def stability_names(pipe, unet):
    """The UNet's layers as Stability AI numbers its blocks, in which kohya trains SDXL."""
    attention = ["CrossAttn" in block for block in pipe.unet.config.down_block_types]
    layers = pipe.unet.config.layers_per_block
    return {unet_source(f"{layer}.weight", layers, attention, 64, len).name[:-7]: pair for layer, pair in unet.items()}


DIALECTS = {"diffusers": diffusers_file, "peft": peft_file, "kohya": kohya_file}


CASES = [(name, dialect) for name in ("SD1", "SD2-v", "SDXL") for dialect in DIALECTS]


@pytest.mark.parametrize(("name", "dialect"), [*CASES, ("SDXL", "kohya, Stability AI's names")])
def test_the_images_of_diffusers(name, dialect, build, tmp_path):  # noqa: F811
    pipe, folder = build(name)
    encoders = [pipe.text_encoder, *([pipe.text_encoder_2] if name == "SDXL" else [])]
    rng = np.random.default_rng(0)
    layers = UNET_LAYERS if dialect.startswith("kohya") else UNET_LAYERS[:4]
    unet, texts = pairs_of(pipe.unet, layers, rng), [pairs_of(encoder, TEXT_LAYERS, rng) for encoder in encoders]
    texts = [{with_prefix(layer): pair for layer, pair in pairs.items()} for pairs in texts]
    if "Stability" in dialect:
        # diffusers takes the second module of a block for the upsampler's, as in blocks of two layers.
        unet = stability_names(pipe, {layer: pair for layer, pair in unet.items() if "upsamplers" not in layer})
    path = tmp_path / "lora.safetensors"
    save_file(DIALECTS[dialect.split(",")[0]](unet, texts), path)
    z_T = np.random.default_rng(1).standard_normal((2, SIZE, SIZE, 4)).astype(np.float32)
    np.save(tmp_path / "z.npy", z_T)

    def sampled(*more):
        flags = [f"--prompt={prompt}" for prompt in PROMPTS] + ["--steps=4", "--num=2", *more]
        flags += [f"--init_latents={tmp_path / 'z.npy'}", f"--model={folder}", f"--out={tmp_path / 'out'}"]
        assert command_line.run(sample.main, ["sample", *flags]) == 0
        with np.load(tmp_path / "out" / "samples.npz") as arrays:
            return arrays["images"].astype(int)

    latents = torch.from_numpy(z_T.transpose(0, 3, 1, 2).copy())
    pipe.load_lora_weights(tmp_path, weight_name=path.name)
    reference = pipe(PROMPTS, num_inference_steps=4, latents=latents, output_type="np").images
    reference = (reference * 255).round().astype(int)
    assert np.abs(sampled(f"--lora={path}") - reference).max() <= 1
    plain = sampled()
    assert np.abs(plain - reference).mean() > 3
    twice = sampled(f"--lora={path}", "--lora_scale=0.25", f"--lora={path}", "--lora_scale=0.75")
    assert np.abs(twice - reference).max() <= 1
    nothing = sampled(f"--lora={path}", "--lora_scale=1.5", f"--lora={path}", "--lora_scale=-1.5")
    assert np.abs(nothing - plain).max() <= 1


def with_prefix(layer):
    """The name of a text encoder's layer in the files, whatever the version of transformers."""
    return layer if layer.startswith("text_model.") else f"text_model.{layer}"
