"""The UNets whose speed is measured, as diffusers has them, and what they are conditioned on."""

from typing import Any, NamedTuple

from experiments.parity_full_size.models import NETWORKS as PUBLISHED


class Network(NamedTuple):
    """A UNet2DConditionModel and its sampling."""

    config: dict[str, Any]  # of diffusers
    tokens: int  # of the context
    steps: int  # of DDIM, with classifier-free guidance
    scale: float  # of that guidance

    @property
    def added(self) -> bool:
        """Whether the time embedding has the pooled text and the time ids of SDXL."""
        return self.config.get("addition_embed_type") == "text_time"


MAIN_JOB = {
    "sample_size": 7,
    "in_channels": 8,
    "out_channels": 8,
    "layers_per_block": 1,
    "block_out_channels": (64, 96),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 128,
    "attention_head_dim": 4,
    "norm_num_groups": 16,
}
NETWORKS = {
    "main job": Network(MAIN_JOB, 1, 10, 1.5),
    "SD 1.5": Network(PUBLISHED["UNet of SD 1"][1], 77, 50, 7.5),
    "SDXL": Network(PUBLISHED["UNet of SDXL"][1], 77, 30, 5.0),
}
POOLED, TIME_IDS = 1280, 6  # widths of SDXL's added conditions
