"""Fine-tuning of a diffusers model on your own images and captions, for one GPU.

    python -m ldm_jax.train --config=configs/finetune.py [--config.init_from=MODEL] --config.data.path=DIR

MODEL is a diffusers folder, a single file, a hub id or a run folder, by default Stable Diffusion 1.5. DIR has images
and their captions, in a metadata.jsonl or a .txt file for each image (see `ldm_jax/data/captioned_folder.py`).
`--config.lora.rank=8` trains only LoRA of attention and writes `pytorch_lora_weights.safetensors` for diffusers. Images
are held out by `--config.data.train_split=train[:90%] --config.data.test_split=train[90%:]`. The prompts of the samples
are `config.sampling.prompts`, by default the first few held-out captions. Then:

    python -m ldm_jax.sample --model=runs/finetune --prompt=TEXT --out=samples
    python -m ldm_jax.convert --model=runs/finetune --to=FOLDER        the fine-tuned pipeline, for diffusers

The conditioning of MODEL decides what else it is trained with:

- Stable Diffusion 1, 2 and XL, size 512, 768, 1024: captions alone.
- Their inpainting models: the image with random masked boxes. Then `sample --init_image --mask --prompt`.
- The x4 upscaler (512, `--config.sampling.guidance=9`): the image four times smaller, with noise of a random level.
  Then `sample --concat_image --prompt`.
- Unconditional LDMs (256): images alone. `--config.data.name=NAME` takes a data set prepared by
  `python -m ldm_jax.data.image_folder --source=DIR --name=NAME`.
- The class-conditional LDM (256): the classes of such a data set, one per folder of DIR, at most the model's
  number. They replace its first classes, whose embeddings are trained with the UNet unless by LoRA.
"""

from ml_collections import ConfigDict

from ldm_jax.config import defaults


def get_config() -> ConfigDict:
    """Full fine-tuning at a low learning rate, with the sampler of the pretrained model."""
    config = defaults.get_config().unlock()
    config.init_from = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    config.stages = ("diffusion",)

    data = config.data
    data.name = "folder"
    data.test_split = "train"  # few images: none are held out
    data.caption_key = "auto"
    data.image_size = 512  # that of Stable Diffusion 1; 768 of 2.1, 1024 of XL
    data.channels = 3

    diffusion = config.diffusion
    diffusion.steps = 2_000
    diffusion.batch_size = 16
    diffusion.learning_rate = 1e-5  # for LoRA 1e-4
    diffusion.decay = "constant"
    diffusion.adam_b2 = 0.999
    diffusion.weight_decay = 1e-2
    diffusion.validation_examples = 64

    config.sampling.num = 16
    config.sampling.sampler = "own"
    config.sampling.guidance = 7.5
    config.sampling.batch_size = 16
    config.sampling.progress_every = 500
    config.evaluation.batch_size = 16
    config.checkpoint_every = 500
    return config.lock()
