"""config.json files of diffusers and transformers for a single file of CompVis or Stability AI, which has none.

Widths, depths and types of layers are inferred from the shapes of its tensors; numbers of heads and whatever else
leaves no trace in them are in the table of published models in `ldm_families`.
"""

from collections.abc import Mapping
from typing import Any

from ldm_jax.errors import InputError

Shapes = Mapping[str, tuple[int, ...]]  # name of a tensor, without its component's prefix -> shape

OPEN_CLIP_LAYERS = 24  # of Stable Diffusion 2's text encoder, in the file of which the last is not used
HEAD_SIZE = 64  # of all published CLIP text encoders


def count(shapes: Shapes, prefix: str) -> int:
    """The length of a list of modules: `prefix`.0, `prefix`.1 ..."""
    return len({name[len(prefix) + 1 :].split(".")[0] for name in shapes if name.startswith(f"{prefix}.")})


def _same(what: str, values: list[int]) -> int:
    """The one value in a list; InputError if they differ."""
    if len(set(values)) != 1:
        raise InputError(f"{what} must be the same throughout; they are {', '.join(map(str, values)) or 'missing'}")
    return values[0]


def _input_blocks(shapes: Shapes) -> list[list[int]]:
    """The numbers of the ResNet blocks of each level of the down path, from the finest."""
    levels: list[list[int]] = [[]]
    for number in range(1, count(shapes, "input_blocks")):
        if f"input_blocks.{number}.0.op.weight" in shapes:
            levels.append([])
        else:
            levels[-1].append(number)
    return levels


def attention_levels(shapes: Shapes) -> list[bool]:
    """For each level of a UNet from the finest, whether attention follows its ResNet blocks."""
    return [any(count(shapes, f"input_blocks.{n}.1") for n in blocks) for blocks in _input_blocks(shapes)]


def unet_config(
    shapes: Shapes, *, heads: int | None, head_size: int | None, pooled: int, time_ids: int, sample_size: int
) -> dict[str, Any]:
    """The config.json of a UNet.

    Args:
      shapes: of its tensors, without "model.diffusion_model.".
      heads, head_size: number of heads of every attention, or channels of a head.
      pooled: width of SDXL's pooled text features; unused for others, as is the next.
      time_ids: number of the time ids that are concatenated to it.
      sample_size: height and width of the latents.

    Raises InputError for blocks that do not make a UNet of diffusers, KeyError if a required tensor is missing.
    """
    levels, attention = _input_blocks(shapes), attention_levels(shapes)
    widths = [
        _same("the widths of a level's blocks", [shapes[f"input_blocks.{n}.0.out_layers.3.weight"][0] for n in blocks])
        for blocks in levels
    ]
    config = {
        "sample_size": sample_size,
        "in_channels": shapes["input_blocks.0.0.weight"][1],
        "out_channels": shapes["out.2.weight"][0],
        "block_out_channels": widths,
        "layers_per_block": _same("the numbers of ResNet blocks of a level", [len(blocks) for blocks in levels]),
    }
    plain = "middle_block.1.qkv.weight" in shapes
    prefix = "Attn" if plain else "CrossAttn"
    config |= {
        "_class_name": "UNet2DModel" if plain else "UNet2DConditionModel",
        "down_block_types": [f"{prefix if attends else ''}DownBlock2D" for attends in attention],
        "up_block_types": [f"{prefix if attends else ''}UpBlock2D" for attends in reversed(attention)],
    }
    if plain:
        return config | {"attention_head_dim": head_size}
    if head_size is not None and any(width % head_size for width in widths):
        raise InputError(f"the UNet's widths {widths} do not divide into heads of {head_size}, which such models have")
    config["attention_head_dim"] = heads if head_size is None else [width // head_size for width in widths]
    if "label_emb.weight" in shapes:  # of noise levels
        config["num_class_embeds"] = shapes["label_emb.weight"][0]
    if "label_emb.0.0.weight" in shapes:  # SDXL's embedding of the pooled text features and of sizes
        width = shapes["label_emb.0.0.weight"][1]
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": (width - pooled) // time_ids,
            "projection_class_embeddings_input_dim": width,
        }
    return config | _transformers(shapes, levels, attention)


def _transformers(shapes: Shapes, levels: list[list[int]], attention: list[bool]) -> dict[str, Any]:
    """The fields of the transformers in a UNet2DConditionModel."""
    middle, depths, crosses = "middle_block.1", [], []
    for blocks, attends in zip(levels, attention):
        counts = [count(shapes, f"input_blocks.{n}.1.transformer_blocks") for n in blocks]
        depths.append(_same("the depths of a level's transformers", counts) if attends else 1)
        # Keys of the texts' width: a second cross-attention in place of self-attention. Where that is also the block's
        # width, as on the coarsest level of the x4 upscaler, it counts as self-attention.
        keys, queries = (f"input_blocks.{blocks[0]}.1.transformer_blocks.0.attn1.to_{x}.weight" for x in "kq")
        crosses.append(attends and shapes[keys][1] != shapes[queries][1])
    depths[-1] = count(shapes, f"{middle}.transformer_blocks")
    return {
        "transformer_layers_per_block": depths,
        "only_cross_attention": any(crosses) and crosses,
        "cross_attention_dim": shapes[f"{middle}.transformer_blocks.0.attn2.to_k.weight"][1],
        "use_linear_projection": len(shapes[f"{middle}.proj_in.weight"]) == 2,
    }


def autoencoder_config(shapes: Shapes, *, scaling_factor: float, sample_size: int) -> dict[str, Any]:
    """The config.json of an autoencoder of images of `sample_size` pixels; KeyError if a required tensor is missing."""
    levels = count(shapes, "encoder.down")
    blocks = [count(shapes, f"encoder.down.{i}.block") for i in range(levels)]
    config = {
        "sample_size": sample_size,
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "block_out_channels": [shapes[f"encoder.down.{i}.block.0.conv1.weight"][0] for i in range(levels)],
        "layers_per_block": _same("the numbers of ResNet blocks of the encoder's levels", blocks),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "mid_block_add_attention": "encoder.mid.attn_1.norm.weight" in shapes,
        "scaling_factor": scaling_factor,
    }
    if "quantize.embedding.weight" in shapes:
        codes, width = shapes["quantize.embedding.weight"]
        return config | {"_class_name": "VQModel", "num_vq_embeddings": codes, "vq_embed_dim": width}
    return config | {"_class_name": "AutoencoderKL"}


def clip_config(shapes: Shapes) -> dict[str, Any]:
    """The config.json of a CLIP text encoder under transformers' names, without "text_model."."""
    embeddings = shapes["embeddings.token_embedding.weight"], shapes["embeddings.position_embedding.weight"]
    inner, layers = shapes["encoder.layers.0.mlp.fc1.weight"][0], count(shapes, "encoder.layers")
    return _text_config(*embeddings, inner, layers) | {"hidden_act": "quick_gelu"}


def open_clip_config(shapes: Shapes, *, last: bool) -> dict[str, Any]:
    """The config.json of an OpenCLIP text encoder.

    Args:
      shapes: without the component's prefix.
      last: whether it includes the last layer and the projection. Stable Diffusion 2 attends to the second-to-last
        layer after the final norm, so that diffusers leaves these out (SDXL includes them, and skips the layer itself);
        files written by diffusers' users lack them.
    """
    embeddings = shapes["token_embedding.weight"], shapes["positional_embedding"]
    inner = shapes["transformer.resblocks.0.mlp.c_fc.weight"][0]
    layers = count(shapes, "transformer.resblocks")
    layers -= not last and ("text_projection" in shapes or layers == OPEN_CLIP_LAYERS)
    config = _text_config(*embeddings, inner, layers) | {"hidden_act": "gelu"}
    if last:
        config["architectures"] = ["CLIPTextModelWithProjection"]
        config["projection_dim"] = shapes["text_projection"][1]
    return config


def _text_config(tokens: tuple[int, ...], positions: tuple[int, ...], inner: int, layers: int) -> dict[str, Any]:
    """A text encoder's config.json from the shapes of its token and position embeddings, MLP width and layers."""
    vocab_size, width = tokens
    if width % HEAD_SIZE:
        raise InputError(f"the text encoder's width {width} does not divide into heads of {HEAD_SIZE}, as CLIP's do")
    return {
        "architectures": ["CLIPTextModel"],
        "vocab_size": vocab_size,
        "max_position_embeddings": positions[0],
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": width // HEAD_SIZE,
        "eos_token_id": 2,  # transformers then takes the highest id as the end of the text
    }
