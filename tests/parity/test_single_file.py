"""Single files of CompVis and Stability AI: read as diffusers' own converters read them, sampled as the same folder."""

import pickle
import sys
from pathlib import Path
from types import ModuleType

import diffusers
import jax
import numpy as np
import pytest
import torch
import transformers
from diffusers.loaders import single_file_utils

sys.path.insert(0, str(Path(__file__).parent.parent))  # for `import bpe, ldm_files`

import ldm_files
from bpe import LOW_LOWER, make_vocab, write_tokenizer

from ldm_jax import command_line, convert, sample
from ldm_jax.interop import single_file
from ldm_jax.interop.diffusers import state_dict_from_params
from ldm_jax.interop.ldm_configs import autoencoder_config, clip_config, open_clip_config, unet_config
from ldm_jax.interop.ldm_families import FAMILIES, UNET
from ldm_jax.interop.modules import autoencoder_from_config, unet_from_config
from ldm_jax.interop.weights import write_safetensors
from ldm_jax.models.conditioning import TIME_IDS
from ldm_jax.pipeline.load import load
from ldm_jax.pipeline.model import fingerprint

VOCABULARY, LENGTH, POOLED = 517, 8, 64

SD1 = {
    "block_out_channels": (32, 32, 64, 64),
    "attention_head_dim": 8,
    "cross_attention_dim": 64,
    "layers_per_block": 2,
    "sample_size": 64,
}
SD2 = SD1 | {
    "block_out_channels": (64, 64, 128, 128),
    "attention_head_dim": (1, 1, 2, 2),
    "use_linear_projection": True,
    "cross_attention_dim": 128,
    "sample_size": 96,
}
XL = SD2 | {
    "block_out_channels": (64, 128, 128),
    "attention_head_dim": (1, 2, 2),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 3),
    "cross_attention_dim": 64 + 128,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": POOLED + 6 * 8,
    "sample_size": 128,
}
REFINER = XL | {
    "block_out_channels": (64, 128, 128, 128),
    "attention_head_dim": (1, 2, 2, 2),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 2, 2),  # of the first level, which has none, a file says nothing
    "cross_attention_dim": 128,
    "projection_class_embeddings_input_dim": POOLED + 5 * 8,
}
UPSCALER = SD1 | {
    "in_channels": 7,
    "down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 3,
    "up_block_types": ("CrossAttnUpBlock2D",) * 3 + ("UpBlock2D",),
    "block_out_channels": (32, 64, 64, 128),
    "only_cross_attention": (True, True, True, False),
    "cross_attention_dim": 128,
    "use_linear_projection": True,
    "num_class_embeds": 1000,
    "sample_size": 128,
}
VAE = {
    "block_out_channels": (32, 32, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "layers_per_block": 2,
    "latent_channels": 4,
}
MODELS = {  # family, its UNet
    "SD1": ("Stable Diffusion 1", SD1),
    "SD1 inpainting": ("Stable Diffusion 1", SD1 | {"in_channels": 9}),
    "SD2": ("Stable Diffusion 2", SD2),
    "SD2 inpainting": ("Stable Diffusion 2", SD2 | {"in_channels": 9, "sample_size": 64}),
    "SDXL": ("Stable Diffusion XL", XL),
    "SDXL inpainting": ("Stable Diffusion XL", XL | {"in_channels": 9}),
    "SDXL refiner": ("SDXL refiner", REFINER),
    "x4 upscaler": ("x4 upscaler", UPSCALER),
}


def text_encoder(width, layers, act, projection=None, **size):
    config = {"vocab_size": VOCABULARY, "max_position_embeddings": LENGTH, "intermediate_size": 2 * width} | size
    kind = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    shape = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": width // 64}
    special = {"eos_token_id": 2, "bos_token_id": VOCABULARY - 2}
    return kind(
        transformers.CLIPTextConfig(**config, **shape, **special, hidden_act=act, projection_dim=projection or 8)
    )


def numpy_of(model):
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def build(name, random_weights):
    """diffusers' and transformers' parts by name; the tensors of the single file."""
    family, config = MODELS[name]
    parts = {"unet": diffusers.UNet2DConditionModel(**config), "vae": diffusers.AutoencoderKL(**VAE)}
    if family in ("Stable Diffusion 2", "x4 upscaler"):
        parts["text_encoder"] = text_encoder(128, 2, "gelu")
    elif family == "SDXL refiner":  # the second of SDXL's, and here the first
        parts["text_encoder"] = text_encoder(128, 3, "gelu", projection=POOLED)
    else:
        parts["text_encoder"] = text_encoder(64, 2, "quick_gelu")
    if family == "Stable Diffusion XL":
        parts["text_encoder_2"] = text_encoder(128, 3, "gelu", projection=POOLED)
    states = {part: numpy_of(random_weights(model)) for part, model in parts.items()}
    file = ldm_files.unet_to_ldm(states["unet"], len(config["block_out_channels"]), config["layers_per_block"])
    file |= ldm_files.autoencoder_to_ldm(states["vae"], 3)
    for fields, text in zip(FAMILIES[family].text_encoders, ("text_encoder", "text_encoder_2")):
        if fields.open_clip:
            file |= ldm_files.open_clip_to_ldm(states[text], fields.prefix, more_layers=0 if fields.last else 1)
        else:
            file |= ldm_files.clip_to_ldm(states[text], fields.prefix)
    return parts, file


def assert_same(params, theirs):
    ours = state_dict_from_params(params)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(ours[name], tensor.numpy(), err_msg=name)


def converted_text(file, fields, model):
    """What diffusers makes of a text encoder, without "text_model." and position_ids."""
    if fields.open_clip:
        theirs = single_file_utils.convert_open_clip_checkpoint(model, file, prefix=fields.prefix)
        if not fields.last:  # diffusers leaves out the layer of number 23, whatever there is; here it is 2
            theirs = {name: t for name, t in theirs.items() if ".layers.2." not in name and "projection" not in name}
    else:
        theirs = single_file_utils.convert_ldm_clip_checkpoint(file)
    return {k.removeprefix("text_model."): t for k, t in theirs.items() if not k.endswith("position_ids")}


@pytest.mark.parametrize("name", MODELS)
def test_files_are_read_as_diffusers_reads_them(name, tmp_path, random_weights):
    parts, file = build(name, random_weights)
    write_safetensors(tmp_path / "model.safetensors", file)
    found = single_file.read(tmp_path / "model.safetensors")
    family, config = MODELS[name]
    assert (found.family, found.fields.sample_size) == (family, config["sample_size"])
    assert ("Inpaint" in found.fields.pipeline) == ("inpainting" in name)
    assert found.unet[0] == unet_from_config(_spread(parts["unet"].config))
    assert found.autoencoder[0] == autoencoder_from_config(dict(parts["vae"].config, _class_name="AutoencoderKL"))[0]

    torches = {key: torch.from_numpy(np.asarray(array)) for key, array in file.items()}
    assert_same(found.unet[1], single_file_utils.convert_ldm_unet_checkpoint(torches, dict(parts["unet"].config)))
    assert_same(found.autoencoder[1], single_file_utils.convert_ldm_vae_checkpoint(torches, dict(parts["vae"].config)))
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (2, LENGTH))
    for fields, part, (module, params) in zip(
        FAMILIES[family].text_encoders, ("text_encoder", "text_encoder_2"), found.text_encoders
    ):
        assert_same(params, converted_text(torches, fields, parts[part]))
        ours = jax.jit(module.apply)({"params": params}, ids)
        with torch.no_grad():
            theirs = parts[part](torch.from_numpy(ids), output_hidden_states=True)
        for a, b in ((ours.last, theirs.last_hidden_state), (ours.penultimate, theirs.hidden_states[-2])):
            assert np.abs(a - b.numpy()).max() <= 1e-4 * np.abs(b.numpy()).max()


def _spread(config):
    """diffusers' config with what is the same for all levels given for each: as single files are read."""
    depth, levels = config["transformer_layers_per_block"], len(config["block_out_channels"])
    depths = [depth] * levels if isinstance(depth, int) else list(depth)
    spread = dict(config, _class_name="UNet2DConditionModel", transformer_layers_per_block=depths)
    if not isinstance(config["only_cross_attention"], bool):  # on a level without attention it says nothing
        crosses = zip(config["only_cross_attention"], config["down_block_types"])
        spread["only_cross_attention"] = [only and "Attn" in block for only, block in crosses]
    return spread


FULL = {  # the published configurations: UNet; text encoders; diffusers' name of the type
    "Stable Diffusion 1": (
        {"attention_head_dim": 8, "cross_attention_dim": 768, "sample_size": 64},
        [(768, 12, "quick_gelu", None)],
        "v1",
    ),
    "Stable Diffusion 2": (
        {
            "attention_head_dim": (5, 10, 20, 20),
            "cross_attention_dim": 1024,
            "use_linear_projection": True,
            "sample_size": 64,
        },
        [(1024, 23, "gelu", None)],
        "v2",
    ),
    "Stable Diffusion XL": (
        XL
        | {
            "block_out_channels": (320, 640, 1280),
            "attention_head_dim": (5, 10, 20),
            "transformer_layers_per_block": (1, 2, 10),
            "cross_attention_dim": 2048,
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        [(768, 12, "quick_gelu", None), (1280, 32, "gelu", 1280)],
        "xl_base",
    ),
    "SDXL refiner": (
        REFINER
        | {
            "block_out_channels": (384, 768, 1536, 1536),
            "attention_head_dim": (6, 12, 24, 24),
            "transformer_layers_per_block": (1, 4, 4, 4),
            "cross_attention_dim": 1280,
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2560,
        },
        [(1280, 32, "gelu", 1280)],
        "xl_refiner",
    ),
    "x4 upscaler": (
        UPSCALER | {"block_out_channels": (256, 512, 512, 1024), "cross_attention_dim": 1024},
        [(1024, 23, "gelu", None)],
        "upscale",
    ),
}
FULL_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}


def shapes_of(model):
    """A state dict of arrays that hold one number, whatever their shape."""
    return {k: np.broadcast_to(np.float32(0), tuple(t.shape)) for k, t in model.state_dict().items()}


@pytest.mark.parametrize("family", FULL)
def test_full_configurations_are_inferred_from_the_shapes(family):
    unet, texts, model_type = FULL[family]
    with torch.device("meta"):
        model, vae = diffusers.UNet2DConditionModel(**unet), diffusers.AutoencoderKL(**FULL_VAE)
        encoders = [
            text_encoder(*text, vocab_size=49408, max_position_embeddings=77, intermediate_size=4 * text[0])
            for text in texts
        ]
    fields = FAMILIES[family]
    file = ldm_files.unet_to_ldm(shapes_of(model), len(model.config.block_out_channels), 2)
    file |= ldm_files.autoencoder_to_ldm(shapes_of(vae), 4)
    heads = {"heads": fields.heads, "head_size": fields.head_size, "time_ids": TIME_IDS.get(fields.time_ids, 0)}
    config = unet_config(below(file, UNET), **heads, pooled=texts[-1][3] or 0, sample_size=fields.sample_size)
    assert unet_from_config(config) == unet_from_config(_spread(model.config))
    config = autoencoder_config(below(file, "first_stage_model."), scaling_factor=0.18215, sample_size=512)
    assert (
        autoencoder_from_config(config)[0] == autoencoder_from_config(dict(vae.config, _class_name="AutoencoderKL"))[0]
    )
    for text, encoder in zip(fields.text_encoders, encoders):
        if text.open_clip:
            file |= ldm_files.open_clip_to_ldm(shapes_of(encoder), text.prefix, more_layers=0 if text.last else 1)
            config = open_clip_config(below(file, text.prefix), last=text.last)
        else:
            file |= ldm_files.clip_to_ldm(shapes_of(encoder), text.prefix)
            config = clip_config(below(file, f"{text.prefix}text_model."))
        theirs = encoder.config.to_dict()
        for name, value in config.items():
            if name != "architectures":
                assert value == theirs[name], name
    torches = {name: torch.empty(array.shape, device="meta") for name, array in file.items()}
    assert single_file_utils.infer_diffusers_model_type(torches) == model_type


def below(file, prefix):
    return {name.removeprefix(prefix): array.shape for name, array in file.items() if name.startswith(prefix)}


class ModelCheckpoint:
    """What pytorch_lightning keeps beside the weights, under its module's name."""


def test_a_checkpoint_that_torch_saved(tmp_path, random_weights, monkeypatch):
    """With what CompVis' files have beside the weights: a foreign class as a key, numbers of NumPy, an optimiser."""
    _, file = build("SD1", random_weights)
    write_safetensors(tmp_path / "m.safetensors", file)
    monkeypatch.setattr(ModelCheckpoint, "__module__", "pytorch_lightning.callbacks.model_checkpoint")
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks", ModelCheckpoint.__module__):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules[ModelCheckpoint.__module__].ModelCheckpoint = ModelCheckpoint
    whole = {
        "epoch": 7,
        "global_step": 470000,
        "pytorch-lightning_version": "1.4.2",
        "state_dict": {name: torch.from_numpy(np.array(array)) for name, array in file.items()},
        "callbacks": {ModelCheckpoint: {"best_model_score": np.float64(3), "kept": ModelCheckpoint()}},
        "optimizer_states": [{"state": {0: {"step": 3, "exp_avg": torch.zeros(3)}}}],
        "lr_schedulers": [{"base_lrs": [1e-4]}],
        "device": torch.device("cpu"),
    }
    torch.save(whole, tmp_path / "m.ckpt")
    with pytest.raises(pickle.UnpicklingError):  # torch itself takes no such file for weights alone
        torch.load(tmp_path / "m.ckpt", weights_only=True)
    one, other = (single_file.read(tmp_path / name) for name in ("m.safetensors", "m.ckpt"))
    for a, b in (
        (one.unet, other.unet),
        (one.autoencoder, other.autoencoder),
        (one.text_encoders[0], other.text_encoders[0]),
    ):
        jax.tree.map(np.testing.assert_array_equal, a[1], b[1])


def test_samples_of_a_file_are_those_of_its_folder(tmp_path, random_weights, monkeypatch):
    """Diffusers' folder, and a single file of the same weights: the same images, to the bit."""
    monkeypatch.setitem(MODELS, "small", ("Stable Diffusion 1", SD1 | {"sample_size": 8, "layers_per_block": 1}))
    fields = FAMILIES["Stable Diffusion 1"]
    monkeypatch.setitem(FAMILIES, "Stable Diffusion 1", fields._replace(sample_size=8))
    parts, file = build("small", random_weights)
    write_tokenizer(tmp_path / "tokenizer", LOW_LOWER, length=LENGTH)
    assert len(make_vocab(LOW_LOWER)) == VOCABULARY
    settings = {name: v for name, v in fields.scheduler.items() if name not in ("_class_name", "clip_sample")}
    pipe = diffusers.StableDiffusionPipeline(
        **parts,
        tokenizer=transformers.CLIPTokenizer.from_pretrained(tmp_path / "tokenizer"),
        scheduler=diffusers.PNDMScheduler(**settings),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(tmp_path / "folder")
    write_safetensors(tmp_path / "model.safetensors", file)
    images = {}
    for name in ("folder", "model.safetensors"):
        command = ["sample", f"--model={tmp_path / name}", f"--out={tmp_path / 'out'}", "--prompt=low lower!"]
        assert command_line.run(sample.main, [*command, "--steps=6", "--num=2"]) == 0
        with np.load(tmp_path / "out" / "samples.npz") as samples:
            images[name] = samples["images"]
    assert images["folder"].std() > 10
    np.testing.assert_array_equal(images["folder"], images["model.safetensors"])
    assert len({fingerprint(*load(tmp_path / name)) for name in images}) == 1


PIPELINES = {
    "Stable Diffusion 1": diffusers.StableDiffusionPipeline,
    "Stable Diffusion 2": diffusers.StableDiffusionPipeline,
    "Stable Diffusion XL": diffusers.StableDiffusionXLPipeline,
}


@pytest.mark.parametrize("family", PIPELINES)
def test_what_convert_writes_opens_in_diffusers(family, tmp_path):
    made, folder, file = (tmp_path / name for name in ("made", "folder", "model.safetensors"))
    ldm_files.write_folder(made, family)
    for to in (folder, file):
        assert command_line.run(convert.main, ["convert", f"--model={made}", f"--to={to}"]) == 0
    pipeline = PIPELINES[family]
    theirs = pipeline.from_single_file(file, config=str(folder), local_files_only=True)
    expected = pipeline.from_pretrained(folder)
    for name in ("unet", "vae", "text_encoder"):  # diffusers tells XL's two encoders apart by their widths: here equal
        ours, same = (getattr(pipe, name).state_dict() for pipe in (theirs, expected))
        assert ours.keys() == same.keys()
        for key, value in same.items():
            torch.testing.assert_close(ours[key], value, rtol=0, atol=0, msg=f"{name} {key}")
