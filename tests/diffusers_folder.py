"""A tiny Stable Diffusion as a diffusers folder, with random weights, written without torch."""

import jax
import numpy as np
from bpe import LOW_LOWER, make_vocab, write_tokenizer

from ldm_jax.interop.clip_weights import state_dict_from_text_params
from ldm_jax.interop.diffusers import state_dict_from_params
from ldm_jax.interop.folder import write_component
from ldm_jax.interop.modules import abstract_params, config_from_autoencoder, config_from_unet
from ldm_jax.models.autoencoder import AutoencoderKL, VQModel
from ldm_jax.models.clip import CLIPTextEncoder
from ldm_jax.models.unet import UNet
from ldm_jax.models.unet2d import UNet2D
from ldm_jax.runtime.files import write_json

LENGTH, WIDTH = 8, 16  # of texts in tokens; of the features of each token
SIZE = 8  # of the latents; images have twice that
BLOCKS = {"block_out_channels": (8,), "layers_per_block": 1, "norm_num_groups": 4, "out_channels": 4}
HALVING = {"block_out_channels": (8, 8), "out_channels": 3, "mid_block_add_attention": False}
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "clip_sample": False,
}


def random_params(shapes, seed):
    """Kernels that keep the variance, norms near the identity: every input changes the output."""
    rng = np.random.default_rng(seed)

    def sample(path, p):
        noise = rng.normal(size=p.shape)
        kind = path[-1].key
        if kind == "kernel":
            noise *= np.prod(p.shape[:-1]) ** -0.5
        return (1 + 0.2 * noise if kind == "scale" else noise).astype(np.float32)

    return jax.tree_util.tree_map_with_path(sample, shapes)


def write_module(folder, module, config, seed=0):
    write_component(folder, config, state_dict_from_params(random_params(abstract_params(module), seed)))


def write_text_encoder(folder, projection=None):
    fields = {
        "vocab_size": len(make_vocab(LOW_LOWER)),
        "hidden_size": WIDTH,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": LENGTH,
        "eos_token_id": 2,
    }
    encoder = CLIPTextEncoder(**fields, projection_dim=projection)
    shapes = jax.eval_shape(encoder.init, jax.random.key(0), np.zeros((1, 1), np.int32))["params"]
    kind = "CLIPTextModelWithProjection" if projection else "CLIPTextModel"
    config = fields | {"architectures": [kind]} | ({"projection_dim": projection} if projection else {})
    write_component(folder, config, state_dict_from_text_params(random_params(shapes, 1)))


def write_stable_diffusion(folder, *, xl=False, inpainting=False, upscaling=False, refiner=False, lcm=False):
    """model_index.json and all that it names; returns the folder. A refiner is SDXL's; lcm a consistency model."""
    xl = xl or refiner
    added = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 12 + (5 if refiner else 6) * 4,
    }
    unet = UNet(
        in_channels=9 if inpainting else 7 if upscaling else 4,
        num_class_embeds=400 if upscaling else None,
        time_cond_proj_dim=6 if lcm else None,
        down_block_types=("CrossAttnDownBlock2D",),
        mid_block_type=None,
        up_block_types=("CrossAttnUpBlock2D",),
        attention_heads=2,
        cross_attention_dim=WIDTH * (2 if xl and not refiner else 1),
        **BLOCKS,
        **(added if xl else {}),
    )
    write_module(folder / "unet", unet, config_from_unet(unet, SIZE))
    vae = AutoencoderKL(**BLOCKS | HALVING | ({"block_out_channels": (8, 8, 8)} if upscaling else {}))
    scale = np.full(4, 0.18215, np.float32)
    write_module(folder / "vae", vae, config_from_autoencoder(vae, np.zeros(4, np.float32), scale, 2 * SIZE))
    names = ["text_encoder", "text_encoder_2"][refiner : 2 if xl else 1]
    for name in names:
        write_text_encoder(folder / name, projection=12 if name.endswith("2") else None)
        write_tokenizer(folder / name.replace("text_encoder", "tokenizer"), LOW_LOWER, length=LENGTH)
    kind = "StableDiffusion" + ("XL" if xl else "") + ("Inpaint" if inpainting else "Img2Img" if refiner else "")
    if lcm:
        write_index(folder, "LatentConsistencyModelPipeline", ["unet", "vae", *names])
        write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER | {"_class_name": "LCMScheduler"})
        return folder
    if upscaling:
        write_json(folder / "low_res_scheduler" / "scheduler_config.json", SCHEDULER | {"_class_name": "DDPMScheduler"})
        return write_index(folder, f"{kind}UpscalePipeline", ["unet", "vae", *names, "low_res_scheduler"])
    absent = {"text_encoder": [None, None], "tokenizer": [None, None], "requires_aesthetics_score": True}
    return write_index(folder, f"{kind}Pipeline", ["unet", "vae", *names], **(absent if refiner else {}))


def write_unconditional(folder):
    """An LDMPipeline: a UNet2DModel on the latents of a VQModel."""
    unet = UNet2D(
        in_channels=4,
        down_block_types=("AttnDownBlock2D",),
        up_block_types=("UpBlock2D",),
        attention_head_dim=8,
        **BLOCKS,
    )
    write_module(folder / "unet", unet, config_from_unet(unet, SIZE))
    vae = VQModel(latent_channels=4, num_vq_embeddings=16, **BLOCKS | HALVING)
    shift, scale = np.zeros(4, np.float32), np.ones(4, np.float32)
    write_module(folder / "vqvae", vae, config_from_autoencoder(vae, shift, scale, 2 * SIZE))
    return write_index(folder, "LDMPipeline", ["unet", "vqvae"])


def write_index(folder, kind, names, **more):
    (folder / "scheduler").mkdir(parents=True)
    write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    components = {name: ["diffusers", "Whatever"] for name in [*names, "scheduler"]}
    write_json(folder / "model_index.json", {"_class_name": kind, "safety_checker": [None, None], **components, **more})
    return folder
