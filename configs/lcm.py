"""Latent consistency distillation (Luo 2023) of a model, for samples in four steps; for one GPU.

    python -m ldm_jax.train --config=configs/lcm.py [--config.init_from=MODEL] --config.data.path=DIR

MODEL and DIR are those of `configs/finetune.py`. The student starts as MODEL, which also teaches it, with guidance of a
scale between `config.consistency.guidance_min` and `guidance_max`; the samples then need no guidance of their own.
With `--config.lora.rank=64 --config.diffusion.learning_rate=1e-4 --config.diffusion.ema_decay=0` only LoRA is trained
(LCM-LoRA), and `pytorch_lora_weights.safetensors` speeds up other models of the same family too. A run, here the main
job, is distilled on its data set:

    python -m ldm_jax.train --config=configs/lcm.py --config.init_from=runs/fashion_mnist --workdir=runs/lcm \
        --config.data.name=fashion_mnist --config.data.caption_key=none --config.data.image_size=28 \
        --config.data.channels=1 --config.data.test_split=test --config.diffusion.batch_size=64 \
        --config.diffusion.learning_rate=3e-4 --config.consistency.guidance_min=1.75 \
        --config.consistency.guidance_max=1.75
"""

from ml_collections import ConfigDict

from configs import finetune


def get_config() -> ConfigDict:
    """Distillation of the whole denoiser, with the EMA of diffusers' script as the target."""
    config = finetune.get_config().unlock()
    diffusion = config.diffusion
    diffusion.objective = "consistency"
    diffusion.learning_rate = 1e-6
    diffusion.weight_decay = 0.0
    diffusion.label_dropout = 0.0
    diffusion.ema_decay = 0.95

    config.sampling.sampler = "lcm"
    config.sampling.steps = 4
    config.sampling.guidance = 1.0
    return config.lock()
