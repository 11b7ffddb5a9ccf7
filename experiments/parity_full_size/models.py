"""Configs of the networks of published models at full width, as in the files of these models."""

SD_UNET = {"sample_size": 64, "attention_head_dim": 8, "cross_attention_dim": 768}
SD2 = {"attention_head_dim": (5, 10, 20, 20), "cross_attention_dim": 1024, "use_linear_projection": True}
SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
UPSCALER = {
    "sample_size": 128,
    "in_channels": 7,
    "block_out_channels": (256, 512, 512, 1024),
    "down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 3,
    "up_block_types": ("CrossAttnUpBlock2D",) * 3 + ("UpBlock2D",),
    "attention_head_dim": 8,
    "cross_attention_dim": 1024,
    "only_cross_attention": (True, True, True, False),
    "use_linear_projection": True,
    "num_class_embeds": 1000,
}
CELEBAHQ = {
    "sample_size": 64,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (224, 448, 672, 896),
    "down_block_types": ("DownBlock2D",) + ("AttnDownBlock2D",) * 3,
    "up_block_types": ("AttnUpBlock2D",) * 3 + ("UpBlock2D",),
    "attention_head_dim": 32,
}


def autoencoder(*channels: int, **more: object) -> dict:
    levels = len(channels)
    return {
        "block_out_channels": channels,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "layers_per_block": 2,
        "norm_num_groups": 32,
    } | more


def text(width: int, layers: int, heads: int, act: str, **more: object) -> dict:
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "hidden_act": act,
        "bos_token_id": 0,
        "eos_token_id": 2,
    } | more


# Name -> (class in diffusers or transformers, config); the smallest first.
NETWORKS = {
    "VQ of celebahq-256": ("VQModel", autoencoder(128, 256, 512, latent_channels=3, num_vq_embeddings=8192)),
    "VAE of the x4 upscaler": ("AutoencoderKL", autoencoder(128, 256, 512, latent_channels=4, scaling_factor=0.08333)),
    "VAE of SD 1, 2 and XL": ("AutoencoderKL", autoencoder(128, 256, 512, 512, latent_channels=4)),
    "CLIP ViT-L/14 of SD 1 and XL": ("CLIPTextModel", text(768, 12, 12, "quick_gelu")),
    "OpenCLIP ViT-H/14 of SD 2": ("CLIPTextModel", text(1024, 23, 16, "gelu")),
    "OpenCLIP ViT-bigG/14 of SDXL": ("CLIPTextModelWithProjection", text(1280, 32, 20, "gelu", projection_dim=1280)),
    "UNet of celebahq-256": ("UNet2DModel", CELEBAHQ),
    "UNet of the x4 upscaler": ("UNet2DConditionModel", UPSCALER),
    "UNet of SD 1": ("UNet2DConditionModel", SD_UNET),
    "UNet of SD 1 inpainting": ("UNet2DConditionModel", SD_UNET | {"in_channels": 9}),
    "UNet of SD 2": ("UNet2DConditionModel", SD_UNET | SD2),
    "UNet of SDXL": ("UNet2DConditionModel", SDXL),
}
