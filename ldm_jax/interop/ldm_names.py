"""Tensor names in single files of CompVis and Stability AI, for those in diffusers and transformers.

| diffusers, transformers                         | CompVis, OpenCLIP                                             |
|-------------------------------------------------|---------------------------------------------------------------|
| `down_blocks.I`, `mid_block`, `up_blocks.I`     | `input_blocks.N`, `middle_block.N`, `output_blocks.N`         |
| `attentions.0.to_q`, `to_k`, `to_v` (UNet2D)    | `qkv`, concatenated by head, a 1-d convolution                |
| `encoder.down_blocks.I`, `decoder.up_blocks.I`  | `encoder.down.I`, `decoder.up.N`, finest level first          |
| `self_attn.q_proj`, `k_proj`, `v_proj`          | `attn.in_proj_weight`, `in_proj_bias`, concatenated           |
| `text_projection.weight`                        | `text_projection`, transposed                                 |

The UNet's blocks are numbered consecutively: block 0 is the first convolution, then come each level's ResNet blocks
and its downsampler.
"""

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np


class Source(NamedTuple):
    """The tensor in a file that a tensor of diffusers or transformers is taken from."""

    name: str
    take: Callable[[np.ndarray], np.ndarray] = lambda tensor: tensor  # the file's tensor -> diffusers'


def split_qkv(tensor: np.ndarray, number: int, heads: int = 1) -> np.ndarray:
    """Queries, keys or values (`number` 0, 1, 2) of a fused tensor [3 C, ...] -> [C, ...].

    With several heads the tensor has all three of the first head, then those of the second, and so on. A tensor that
    cannot be split is returned unchanged: the check of shapes then names it.
    """
    if tensor.ndim == 0 or tensor.shape[0] % (3 * heads):
        return tensor
    return tensor.reshape(heads, 3, -1, *tensor.shape[1:])[:, number].reshape(-1, *tensor.shape[1:])


def squeeze(tensor: np.ndarray) -> np.ndarray:
    """The kernel of a 1-d convolution of size 1, [O, I, 1], as that of a linear layer [O, I]."""
    return tensor[:, :, 0] if tensor.ndim == 3 and tensor.shape[2] == 1 else tensor


_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "class_embedding": "label_emb",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_BLOCK = re.compile(r"(?:(down|up)_blocks\.(\d+)|mid_block)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
_QKV = {"q": 0, "k": 1, "v": 2}


def unet_source(
    name: str, layers: int, attention: Sequence[bool], head_size: int, width_of: Callable[[str], int]
) -> Source:
    """The source of a UNet's tensor.

    Args:
      name: in diffusers' UNet2DConditionModel or UNet2DModel.
      layers: ResNet blocks per level of the down path.
      attention: for each level from the finest, whether attention follows its ResNet blocks.
      head_size: channels of a head in a UNet2DModel's attention.
      width_of: name of a qkv tensor in the file -> width C of its attention.
    """
    block = _BLOCK.fullmatch(name)
    if not block:
        module, leaf = name.rsplit(".", 1)
        return Source(f"{_UNET_ENDS[module]}.{leaf}")
    path, level, type, number, rest = block[1], int(block[2] or 0), block[3], int(block[4]), block[5]
    first = {"down": 1 + level * (layers + 1), "up": level * (layers + 1), None: 0}[path]
    if type == "downsamplers":
        return Source(f"input_blocks.{first + layers}.0.op.{rest.removeprefix('conv.')}")
    if type == "upsamplers":
        slot = 2 if attention[len(attention) - 1 - level] else 1
        return Source(f"output_blocks.{first + layers}.{slot}.{rest}")
    if path is None:
        where = f"middle_block.{2 * number + (type == 'attentions')}"
    else:
        where = f"{'input' if path == 'down' else 'output'}_blocks.{first + number}.{int(type == 'attentions')}"
    if type == "resnets":
        module, leaf = rest.rsplit(".", 1)
        return Source(f"{where}.{_RESNET[module]}.{leaf}")
    return _attention_source(where, rest, head_size, width_of)


def _attention_source(where: str, rest: str, head_size: int, width_of: Callable[[str], int]) -> Source:
    """The source of a tensor of a transformer, whose names are the same, or of plain self-attention."""
    module, leaf = rest.rsplit(".", 1)
    if module == "group_norm":
        return Source(f"{where}.norm.{leaf}")
    if module == "to_out.0":
        return Source(f"{where}.proj_out.{leaf}", squeeze)
    if module in ("to_q", "to_k", "to_v"):
        source, number = f"{where}.qkv.{leaf}", _QKV[module[-1]]
        heads = max(1, width_of(source) // head_size)
        return Source(source, lambda tensor: split_qkv(squeeze(tensor), number, heads))
    return Source(f"{where}.{rest}")


_AUTOENCODER = (
    (r"(encoder|decoder)\.conv_norm_out\.", r"\1.norm_out."),
    (r"\.mid_block\.attentions\.0\.group_norm\.", ".mid.attn_1.norm."),
    (r"\.mid_block\.attentions\.0\.to_([qkv])\.", r".mid.attn_1.\1."),
    (r"\.mid_block\.attentions\.0\.to_out\.0\.", ".mid.attn_1.proj_out."),
    (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
    (r"\.(down|up)_blocks\.(\d+)\.resnets\.", r".\1.\2.block."),
    (r"\.down_blocks\.(\d+)\.downsamplers\.0\.", r".down.\1.downsample."),
    (r"\.up_blocks\.(\d+)\.upsamplers\.0\.", r".up.\1.upsample."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
)


def autoencoder_source(name: str, levels: int, linear: bool = False) -> Source:
    """The source of a tensor of an AutoencoderKL or VQModel; attention may be stored as 1x1 convolutions.

    With `linear`, attention has the names of diffusers, to_q and so on, as in newer files.
    """
    if linear:
        name = re.sub(r"\.mid_block\.attentions\.0\.(to_)", r".mid.attn_1.\1", name)
    for pattern, replacement in _AUTOENCODER:
        name = re.sub(pattern, replacement, name)
    return Source(re.sub(r"\.up\.(\d+)", lambda level: f".up.{levels - 1 - int(level[1])}", name))


_OPEN_CLIP = (
    (r"embeddings\.token_embedding\.", "token_embedding."),
    (r"embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"final_layer_norm\.", "ln_final."),
    (r"encoder\.layers\.", "transformer.resblocks."),
    (r"\.layer_norm([12])\.", r".ln_\1."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
    (r"\.self_attn\.out_proj\.", ".attn.out_proj."),
)
_IN_PROJECTION = re.compile(r"encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.(weight|bias)")


def open_clip_source(name: str, linear: bool = False) -> Source:
    """The source of a text encoder's tensor in OpenCLIP's layout; `name` without the prefix "text_model.".

    With `linear`, the projection is a linear layer, text_projection.weight, which is not transposed.
    """
    if name == "text_projection.weight":
        return Source(name) if linear else Source("text_projection", np.transpose)
    fused = _IN_PROJECTION.fullmatch(name)
    if fused:
        source = f"transformer.resblocks.{fused[1]}.attn.in_proj_{fused[3]}"
        return Source(source, partial(split_qkv, number=_QKV[fused[2]]))
    for pattern, replacement in _OPEN_CLIP:
        name = re.sub(pattern, replacement, name)
    return Source(name)
