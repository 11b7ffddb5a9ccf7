"""From config fields to CLIP: `config.clip`, beside the tokenizer whose ids its text encoder reads."""

import jax.numpy as jnp
from ml_collections import ConfigDict

from ldm_jax.builders import optimizer_fields
from ldm_jax.models.clip import CLIPTextEncoder
from ldm_jax.models.clip_vision import CLIP, CLIPImageEncoder
from ldm_jax.training.clip import CLIPStage, make_clip_stage
from ldm_jax.training.state import make_optimizer


def build_clip(config: ConfigDict, *, vocab_size: int, max_length: int, eos_token_id: int) -> CLIP:
    """Both encoders of the config, for ids of a tokenizer with `vocab_size` tokens and texts of `max_length`."""
    fields, dtype = config.clip, jnp.dtype(config.dtype)
    text = CLIPTextEncoder(
        vocab_size=vocab_size,
        hidden_size=fields.text_width,
        intermediate_size=4 * fields.text_width,
        num_hidden_layers=fields.text_layers,
        num_attention_heads=fields.text_heads,
        max_position_embeddings=max_length,
        eos_token_id=eos_token_id,
        projection_dim=fields.projection_dim,
        dtype=dtype,
    )
    image = CLIPImageEncoder(
        image_size=config.data.image_size,
        patch_size=fields.patch_size,
        num_channels=config.data.channels,
        hidden_size=fields.image_width,
        intermediate_size=4 * fields.image_width,
        num_hidden_layers=fields.image_layers,
        num_attention_heads=fields.image_heads,
        projection_dim=fields.projection_dim,
        dtype=dtype,
    )
    return CLIP(text, image)


def build_clip_stage(config: ConfigDict, clip: CLIP) -> CLIPStage:
    """The stage that trains `clip`, from `build_clip`."""
    fields = config.clip
    return make_clip_stage(
        clip=clip,
        flip=config.data.flip,
        max_shift=fields.max_shift,
        max_zoom=fields.max_zoom,
        optimizer=make_optimizer(**optimizer_fields(fields)),
        ema_decay=fields.ema_decay,
    )
