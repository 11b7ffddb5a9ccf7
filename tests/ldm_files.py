"""Single files as CompVis and Stability AI lay them out, from state dicts of diffusers and transformers, without torch.

Written as the inverse of what is tested, block by block as CompVis' networks are built; parity tests hold it against
diffusers' own converters.
"""

import re
import zipfile
from functools import cache

import diffusers_folder
import jax
import numpy as np
from bpe import LOW_LOWER, make_vocab, write_tokenizer

from ldm_jax.interop.clip_weights import state_dict_from_text_params
from ldm_jax.interop.diffusers import state_dict_from_params
from ldm_jax.interop.folder import write_component
from ldm_jax.interop.ldm_families import FAMILIES
from ldm_jax.interop.modules import abstract_params, config_from_autoencoder, config_from_unet
from ldm_jax.interop.weights import write_safetensors
from ldm_jax.models.autoencoder import AutoencoderKL, VQModel
from ldm_jax.models.clip import CLIPTextEncoder
from ldm_jax.models.unet import UNet
from ldm_jax.models.unet2d import UNet2D
from ldm_jax.runtime.files import write_json

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "class_embedding": "label_emb",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def unet_to_ldm(state, levels, layers, head_size=None):
    """A UNet under CompVis' names; `head_size` of the plain attention of one without cross-attention."""
    blocks, number = dict(ENDS), 0
    for level in range(levels):
        for layer in range(layers):
            number += 1
            blocks[f"down_blocks.{level}.resnets.{layer}"] = f"input_blocks.{number}.0"
            blocks[f"down_blocks.{level}.attentions.{layer}"] = f"input_blocks.{number}.1"
        if level < levels - 1:
            number += 1
            blocks[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{number}.0.op"
    for i, name in enumerate(("resnets.0", "attentions.0", "resnets.1")):
        blocks[f"mid_block.{name}"] = f"middle_block.{i}"
    number = -1
    for level in range(levels):
        attends = any(name.startswith(f"up_blocks.{level}.attentions") for name in state)
        for layer in range(layers + 1):
            number += 1
            blocks[f"up_blocks.{level}.resnets.{layer}"] = f"output_blocks.{number}.0"
            blocks[f"up_blocks.{level}.attentions.{layer}"] = f"output_blocks.{number}.1"
        blocks[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{number}.{1 + attends}.conv"
    renamed = {}
    for name, tensor in state.items():
        block = next(block for block in blocks if name.startswith(f"{block}."))
        rest = name.removeprefix(f"{block}.")
        if ".resnets." in block:
            module, leaf = rest.split(".")
            rest = f"{RESNET[module]}.{leaf}"
        renamed[f"{blocks[block]}.{rest}"] = tensor
    return {f"model.diffusion_model.{k}": v for k, v in (fuse(renamed, head_size) if head_size else renamed).items()}


def fuse(state, head_size):
    """Plain self-attention as guided-diffusion has it: rows of q, k and v head by head; convolutions of one axis."""
    fused = {}
    for name, tensor in state.items():
        if name.endswith(("to_k.weight", "to_k.bias", "to_v.weight", "to_v.bias")):
            continue
        if ".to_q." in name:
            three = [state[name.replace(".to_q.", f".to_{x}.")] for x in "qkv"]
            rows = []
            for start in range(0, len(tensor), head_size):
                rows += [x[start : start + head_size] for x in three]
            name, tensor = name.replace(".to_q.", ".qkv."), np.concatenate(rows)
        name = name.replace(".group_norm.", ".norm.").replace(".to_out.0.", ".proj_out.")
        if name.endswith(("qkv.weight", "proj_out.weight")):
            tensor = tensor[:, :, None]
        fused[name] = tensor
    return fused


AUTOENCODER = (
    ("encoder.down_blocks", "encoder.down"),
    ("mid_block.resnets.0", "mid.block_1"),
    ("mid_block.resnets.1", "mid.block_2"),
    ("mid_block.attentions.0", "mid.attn_1"),
    ("resnets", "block"),
    ("downsamplers.0", "downsample"),
    ("upsamplers.0", "upsample"),
    ("conv_shortcut", "nin_shortcut"),
    ("conv_norm_out", "norm_out"),
    ("group_norm", "norm"),
    ("to_out.0", "proj_out"),
    ("to_q", "q"),
    ("to_k", "k"),
    ("to_v", "v"),
)


def autoencoder_to_ldm(state, levels, prefix="first_stage_model."):
    """An autoencoder under CompVis' names: the decoder's levels are counted from the pixels."""
    renamed = {}
    for name, tensor in state.items():
        name = re.sub(r"up_blocks\.(\d)", lambda m: f"up.{levels - 1 - int(m[1])}", name)
        for ours, theirs in AUTOENCODER:
            name = name.replace(ours, theirs)
        if ".attn_1." in name and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]
        renamed[prefix + name] = tensor
    return renamed


def without_prefix(state):
    return {name.removeprefix("text_model."): tensor for name, tensor in state.items()}


def clip_to_ldm(state, prefix):
    """A text encoder under transformers' names, with the buffer that old files have."""
    renamed = {f"{prefix}text_model.{name}": tensor for name, tensor in without_prefix(state).items()}
    return renamed | {f"{prefix}text_model.embeddings.position_ids": np.arange(77)[None]}


def open_clip_to_ldm(state, prefix, *, more_layers=0):
    """OpenCLIP's names; with Stable Diffusion 2 there is a layer more than is used, and a projection."""
    state, renamed = without_prefix(state), {"logit_scale": np.array(4.6, np.float32)}
    layers = 1 + max(int(name.split(".")[2]) for name in state if name.startswith("encoder.layers."))
    last = [name for name in state if name.startswith(f"encoder.layers.{layers - 1}.")]
    for name in last * more_layers:
        state[name.replace(f".{layers - 1}.", f".{layers}.")] = state[name] + 1
    projection = state.pop("text_projection.weight", np.eye(len(state["final_layer_norm.weight"]), dtype=np.float32))
    renamed["text_projection"] = np.ascontiguousarray(projection.T)
    renamed["positional_embedding"] = state.pop("embeddings.position_embedding.weight")
    renamed["token_embedding.weight"] = state.pop("embeddings.token_embedding.weight")
    for leaf in ("weight", "bias"):
        renamed[f"ln_final.{leaf}"] = state.pop(f"final_layer_norm.{leaf}")
        for layer in range(layers + more_layers):
            ours, theirs = f"encoder.layers.{layer}", f"transformer.resblocks.{layer}"
            renamed[f"{theirs}.attn.in_proj_{leaf}"] = np.concatenate(
                [state.pop(f"{ours}.self_attn.{x}_proj.{leaf}") for x in "qkv"]
            )
            for a, b in (
                ("self_attn.out_proj", "attn.out_proj"),
                ("layer_norm1", "ln_1"),
                ("layer_norm2", "ln_2"),
                ("mlp.fc1", "mlp.c_fc"),
                ("mlp.fc2", "mlp.c_proj"),
            ):
                renamed[f"{theirs}.{b}.{leaf}"] = state.pop(f"{ours}.{a}.{leaf}")
    assert not state
    return {f"{prefix}{name}": tensor for name, tensor in renamed.items()}


# Tiny models. Single files know no other numbers of groups and heads than the published ones: hence these widths.
LENGTH, POOLED = 8, 64
UNETS = {
    "Stable Diffusion 1": {"attention_heads": 8, "cross_attention_dim": 64, "transformer_layers_per_block": (1,)},
    "Stable Diffusion 2": {
        "attention_heads": (1,),
        "transformer_layers_per_block": (1,),
        "block_out_channels": (64,),
        "cross_attention_dim": 64,
        "use_linear_projection": True,
    },
    "Stable Diffusion XL": {
        "attention_heads": (1, 1),
        "block_out_channels": (64, 64),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2),
        "cross_attention_dim": 128,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": POOLED + 6 * 4,
    },
    "SDXL refiner": {  # attention at the middle levels
        "attention_heads": (1, 1, 1),
        "block_out_channels": (64, 64, 64),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 2),
        "cross_attention_dim": 64,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": POOLED + 5 * 4,
    },
    "class-conditional LDM": {
        "attention_heads": 1,
        "cross_attention_dim": 16,
        "transformer_layers_per_block": (1,),
        "in_channels": 3,
        "out_channels": 3,
    },
    "x4 upscaler": {
        "attention_heads": 8,
        "transformer_layers_per_block": (1, 1),
        "block_out_channels": (32, 32),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "only_cross_attention": (False, True),
        "cross_attention_dim": 64,
        "use_linear_projection": True,
        "num_class_embeds": 400,
        "in_channels": 7,
    },
    "unconditional LDM": {
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (32, 64),
        "attention_head_dim": 32,
    },
}
BLOCKS = {
    "block_out_channels": (32,),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
}
PLAIN = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
CLASSES = 5


def make_unet(family):
    kind = UNet2D if family == "unconditional LDM" else UNet
    return kind(**BLOCKS | (PLAIN if kind is UNet2D else {}) | UNETS[family])


def make_autoencoder(family):
    fields = {"block_out_channels": (32, 32), "layers_per_block": 1}
    return VQModel(num_vq_embeddings=16, vq_embed_dim=3, **fields) if "LDM" in family else AutoencoderKL(**fields)


def text_encoders(family):
    fields = {
        "vocab_size": len(make_vocab(LOW_LOWER)),
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 1,
        "max_position_embeddings": LENGTH,
        "eos_token_id": 2,
    }
    clip, open_clip = CLIPTextEncoder(**fields), CLIPTextEncoder(**fields | {"hidden_act": "gelu"})
    return {
        "Stable Diffusion 1": (clip,),
        "Stable Diffusion 2": (open_clip,),
        "x4 upscaler": (open_clip,),
        "Stable Diffusion XL": (clip, open_clip.clone(projection_dim=POOLED)),
        "SDXL refiner": (open_clip.clone(projection_dim=POOLED),),
    }.get(family, ())


@cache
def states_of(family):
    """(modules, their state dicts in diffusers' names) by component: random numbers, not to be changed."""
    modules = {"unet": make_unet(family), "vae": make_autoencoder(family)}
    states = {
        name: state_dict_from_params(diffusers_folder.random_params(abstract_params(module), seed))
        for seed, (name, module) in enumerate(modules.items())
    }
    for i, encoder in enumerate(text_encoders(family)):
        name = "text_encoder_2" if i or family == "SDXL refiner" else "text_encoder"
        shapes = jax.eval_shape(encoder.init, jax.random.key(0), np.zeros((1, 1), np.int32))["params"]
        modules[name] = encoder
        states[name] = state_dict_from_text_params(diffusers_folder.random_params(shapes, 2 + i))
    return modules, states


def to_ldm(family, modules, states):
    """The tensors of the single file, with some that are of training alone."""
    unet = modules["unet"]
    head_size = 32 if family == "unconditional LDM" else None
    file = unet_to_ldm(states["unet"], len(unet.block_out_channels), unet.layers_per_block, head_size)
    file |= autoencoder_to_ldm(states["vae"], 2)
    texts = [states[name] for name in states if name.startswith("text_encoder")]
    for text, fields in zip(texts, FAMILIES[family].text_encoders):
        if fields.open_clip:
            file |= open_clip_to_ldm(text, fields.prefix, more_layers=0 if fields.last else 1)
        else:
            file |= clip_to_ldm(text, fields.prefix)
    if family == "class-conditional LDM":
        rng = np.random.default_rng(9)
        file["cond_stage_model.embedding.weight"] = rng.normal(size=(CLASSES + 1, 16)).astype(np.float32)
    scheduler = FAMILIES[family].scheduler
    roots = np.linspace(scheduler["beta_start"] ** 0.5, scheduler["beta_end"] ** 0.5, 1000)
    if family == "x4 upscaler":
        file |= {f"low_scale_model.{name}": np.float32(roots**2) for name in ("betas", "sqrt_alphas_cumprod")}
    averaged = {"model_ema.diffusion_modelinput_blocks00weight": np.zeros(3, np.float32)}
    return file | averaged | {"betas": np.float32(roots**2), "model_ema.decay": np.array(0.9999, np.float32)}


def write_tokenizer_beside(folder):
    write_tokenizer(folder / "tokenizer", LOW_LOWER, length=LENGTH)


def write_file(folder, family):
    """model.safetensors and, for families of texts, tokenizer/ beside it; returns the file."""
    folder.mkdir(parents=True)
    if text_encoders(family):
        write_tokenizer_beside(folder)
    write_safetensors(folder / "model.safetensors", to_ldm(family, *states_of(family)))
    return folder / "model.safetensors"


def write_folder(folder, family, *, size=64):
    """The same model as a diffusers folder; returns it."""
    modules, states = states_of(family)
    fields = FAMILIES[family]
    write_component(folder / "unet", config_from_unet(modules["unet"], size), states["unet"])
    channels = modules["unet"].out_channels
    scaling = (np.zeros(channels, np.float32), np.full(channels, fields.scaling_factor, np.float32))
    config = config_from_autoencoder(modules["vae"], *scaling, 2 * size)
    write_component(folder / fields.autoencoder, config, states["vae"])
    names = [name for name in states if name.startswith("text_encoder")]
    for name, text in zip(names, fields.text_encoders):
        encoder = modules[name]
        kind = "CLIPTextModelWithProjection" if encoder.projection_dim else "CLIPTextModel"
        named = {
            field: getattr(encoder, field)
            for field in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                          "max_position_embeddings", "eos_token_id", "hidden_act", "projection_dim")
            if getattr(encoder, field) is not None
        }  # fmt: skip
        write_component(folder / name, named | {"architectures": [kind]}, states[name])
        where = folder / name.replace("text_encoder", "tokenizer")
        write_tokenizer(where, LOW_LOWER, length=LENGTH, pad_token=text.pad)
    if fields.low_res_scheduler:
        write_json(folder / "low_res_scheduler" / "scheduler_config.json", dict(fields.low_res_scheduler))
        names.append("low_res_scheduler")
    more = {"force_zeros_for_empty_prompt": False, "requires_aesthetics_score": True, "text_encoder": [None, None]}
    more = more if family == "SDXL refiner" else {}
    diffusers_folder.write_index(folder, fields.pipeline, ["unet", fields.autoencoder, *names], **more)
    write_json(folder / "scheduler" / "scheduler_config.json", dict(fields.scheduler))
    return folder


def tensor_opcodes(key, array):
    """A tensor as torch pickles it, in opcodes that one can read."""
    ints = ["(" + "".join(f"I{n}\n" for n in numbers) + "t" for numbers in (array.shape, strides(array.shape))]
    storage = f"(Vstorage\nctorch\nFloatStorage\nV{key}\nVcpu\nI{array.size}\ntQ"
    return f"ctorch._utils\n_rebuild_tensor_v2\n({storage}I0\n{ints[0]}{ints[1]}I00\nNtR"


def strides(shape):
    return tuple(int(np.prod(shape[i + 1 :])) for i in range(len(shape)))


# What pytorch_lightning keeps beside the weights: a class as a key, and numbers that NumPy rebuilds by a function.
LIGHTNING = (
    "Vcallbacks\n(dcpytorch_lightning.callbacks.model_checkpoint\nModelCheckpoint\n"
    "(dVbest\ncnumpy.core.multiarray\nscalar\n(VX\ntRss"
    "sVhyper_parameters\nccopyreg\n_reconstructor\n(comegaconf.dictconfig\nDictConfig\nc__builtin__\nobject\nNtR(dVa\nI1\nsbs"
)


def write_checkpoint(path, file, *, more=LIGHTNING, step=875000, inside=""):
    """The tensors as a training checkpoint (.ckpt), with `more` opcodes beside the state_dict, `inside` ones in it."""
    floats = {name: np.asarray(array, np.float32) for name, array in file.items()}
    tensors = "".join(f"V{name}\n{tensor_opcodes(i, array)}s" for i, (name, array) in enumerate(floats.items()))
    pickled = f"(dVglobal_step\nI{step}\nsVstate_dict\n(d{tensors}{inside}s{more}."
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled.encode())
        for i, array in enumerate(floats.values()):
            archive.writestr(f"archive/data/{i}", np.ascontiguousarray(array).tobytes())
    return path
