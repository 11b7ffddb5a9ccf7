"""What diffusers' and transformers' config.json would say of a single file of CompVis or Stability AI.

A single file has no config. Widths, depths and kinds of layers are read off the shapes of its tensors here; numbers of
heads and whatever else leaves no trace there are in the table of published models in `ldm_families`.
"""

from collections.abc import Mapping
from typing import Any

from ldm_jax.errors import InputError

Shapes = Mapping[str, tuple[int, ...]]  # name of a tensor, without its component's prefix -> shape

HEAD_SIZE = 64  # of all published CLIP text encoders
TIME_IDS = 6  # numbers that SDXL is told: size, crop and target size


def count(shapes: Shapes, prefix: str) -> int:
    """How many entries a list has: `prefix`.0, `prefix`.1 ..."""
    return len({name[len(prefix) + 1 :].split(".")[0] for name in shapes if name.startswith(f"{prefix}.")})


def _same(what: str, values: list[int]) -> int:
    """What is the same for all; raises InputError if it is not."""
    if len(set(values)) != 1:
        raise InputError(f"{what} must be the same throughout; they are {', '.join(map(str, values)) or 'missing'}")
    return values[0]


def _input_blocks(shapes: Shapes) -> list[list[int]]:
    """The numbers of the ResNet blocks of each level, on the way down."""
    levels: list[list[int]] = [[]]
    for number in range(1, count(shapes, "input_blocks")):
        if f"input_blocks.{number}.0.op.weight" in shapes:
            levels.append([])
        else:
            levels[-1].append(number)
    return levels


def attending_levels(shapes: Shapes) -> list[bool]:
    """For each level of a UNet from the finest, whether attention follows its ResNet blocks."""
    return [any(count(shapes, f"input_blocks.{n}.1") for n in blocks) for blocks in _input_blocks(shapes)]


def unet_config(
    shapes: Shapes, *, heads: int | None, head_size: int | None, pooled: int, sample_size: int
) -> dict[str, Any]:
    """The config.json of a UNet.

    Args:
      shapes: of its tensors, without "model.diffusion_model.".
      heads: of all attention, or None if their size is the same throughout, `head_size`.
      pooled: features of SDXL's whole text; of no matter to others.
      sample_size: of the latents in pixels.

    Raises:
      InputError: of blocks that do not make a UNet of diffusers.
      KeyError: a tensor that it cannot do without.
    """
    levels, attends = _input_blocks(shapes), attending_levels(shapes)
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
    if "middle_block.1.qkv.weight" in shapes:
        return config | {
            "_class_name": "UNet2DModel",
            "down_block_types": ["AttnDownBlock2D" if attention else "DownBlock2D" for attention in attends],
            "up_block_types": ["AttnUpBlock2D" if attention else "UpBlock2D" for attention in reversed(attends)],
            "attention_head_dim": head_size,
        }
    if "label_emb.weight" in shapes:  # of noise levels
        config["num_class_embeds"] = shapes["label_emb.weight"][0]
    return config | _transformers(shapes, levels, attends, widths, heads, head_size) | _addition(shapes, pooled)


def _transformers(
    shapes: Shapes,
    levels: list[list[int]],
    attends: list[bool],
    widths: list[int],
    heads: int | None,
    head_size: int | None,
) -> dict[str, Any]:
    """What a UNet2DConditionModel has beside."""
    middle = "middle_block.1"
    depths = [
        _same(
            "the depths of a level's transformers", [count(shapes, f"input_blocks.{n}.1.transformer_blocks") for n in b]
        )
        if attention
        else 1
        for b, attention in zip(levels, attends)
    ]
    crosses = [attention and _crosses(shapes, b[0]) for b, attention in zip(levels, attends)]
    depths[-1] = count(shapes, f"{middle}.transformer_blocks")
    if head_size is not None and any(width % head_size for width in widths):
        raise InputError(f"the UNet's widths {widths} do not divide into heads of {head_size}, which such models have")
    return {
        "_class_name": "UNet2DConditionModel",
        "down_block_types": ["CrossAttnDownBlock2D" if attention else "DownBlock2D" for attention in attends],
        "up_block_types": ["CrossAttnUpBlock2D" if attention else "UpBlock2D" for attention in reversed(attends)],
        "attention_head_dim": heads if head_size is None else [width // head_size for width in widths],
        "transformer_layers_per_block": depths,
        "only_cross_attention": any(crosses) and crosses,
        "cross_attention_dim": shapes[f"{middle}.transformer_blocks.0.attn2.to_k.weight"][1],
        "use_linear_projection": len(shapes[f"{middle}.proj_in.weight"]) == 2,
    }


def _crosses(shapes: Shapes, block: int) -> bool:
    """Whether a block's self-attention gave way to a second cross-attention: its keys are then of the texts' width.

    Where that is also the block's own, as on the coarsest level of the x4 upscaler, it is taken for self-attention.
    """
    attention = f"input_blocks.{block}.1.transformer_blocks.0.attn1"
    return shapes[f"{attention}.to_k.weight"][1] != shapes[f"{attention}.to_q.weight"][1]


def _addition(shapes: Shapes, pooled: int) -> dict[str, Any]:
    """SDXL's embedding of the whole text and of the picture's size."""
    if "label_emb.0.0.weight" not in shapes:
        return {}
    width = shapes["label_emb.0.0.weight"][1]
    return {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": (width - pooled) // TIME_IDS,
        "projection_class_embeddings_input_dim": width,
    }


def autoencoder_config(shapes: Shapes, *, scaling_factor: float, sample_size: int) -> dict[str, Any]:
    """The config.json of an autoencoder of so large pictures; KeyError for a tensor that it cannot do without."""
    levels = count(shapes, "encoder.down")
    config = {
        "sample_size": sample_size,
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "block_out_channels": [shapes[f"encoder.down.{i}.block.0.conv1.weight"][0] for i in range(levels)],
        "layers_per_block": _same(
            "the numbers of ResNet blocks of the encoder's levels",
            [count(shapes, f"encoder.down.{i}.block") for i in range(levels)],
        ),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "mid_block_add_attention": "encoder.mid.attn_1.q.weight" in shapes,
        "scaling_factor": scaling_factor,
    }
    if "quantize.embedding.weight" in shapes:
        codes, width = shapes["quantize.embedding.weight"]
        return config | {"_class_name": "VQModel", "num_vq_embeddings": codes, "vq_embed_dim": width}
    return config | {"_class_name": "AutoencoderKL"}


def clip_config(shapes: Shapes) -> dict[str, Any]:
    """The config.json of a CLIP text encoder under transformers' names, without "text_model."."""
    vocabulary, width = shapes["embeddings.token_embedding.weight"]
    positions, layers = shapes["embeddings.position_embedding.weight"][0], count(shapes, "encoder.layers")
    inner = shapes["encoder.layers.0.mlp.fc1.weight"][0]
    return _text_config(vocabulary, positions, width, inner, layers) | {"hidden_act": "quick_gelu"}


def open_clip_config(shapes: Shapes, *, last: bool) -> dict[str, Any]:
    """The config.json of an OpenCLIP text encoder.

    Args:
      shapes: without the component's prefix.
      last: whether the last layer and the projection are part of it. Stable Diffusion 2 attends to the output of the
        layer before the last after the final norm, so that diffusers leaves these out (and SDXL skips it by itself).
    """
    vocabulary, width = shapes["token_embedding.weight"]
    positions, layers = shapes["positional_embedding"][0], count(shapes, "transformer.resblocks")
    inner = shapes["transformer.resblocks.0.mlp.c_fc.weight"][0]
    config = _text_config(vocabulary, positions, width, inner, layers - (not last)) | {"hidden_act": "gelu"}
    if last:
        projected = {"architectures": ["CLIPTextModelWithProjection"], "projection_dim": shapes["text_projection"][1]}
        return config | projected
    return config


def _text_config(vocabulary: int, positions: int, width: int, inner: int, layers: int) -> dict[str, Any]:
    if width % HEAD_SIZE:
        raise InputError(f"the text encoder's width {width} does not divide into heads of {HEAD_SIZE}, as CLIP's do")
    return {
        "architectures": ["CLIPTextModel"],
        "vocab_size": vocabulary,
        "max_position_embeddings": positions,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": width // HEAD_SIZE,
        "eos_token_id": 2,  # the highest id ends the text
    }
