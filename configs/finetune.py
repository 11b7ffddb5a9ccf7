"""A diffusers model, trained on with your own pictures and captions: for one GPU.

    python -m ldm_jax.train --config=configs/finetune.py [--config.init_from=MODEL] --config.data.path=DIR

MODEL is a diffusers folder or a name on the hub, Stable Diffusion 1.5 if nothing is said; DIR has pictures, with a
metadata.jsonl or a .txt file beside each (see `ldm_jax/data/captioned_folder.py`). With `--config.lora.rank=8` only
small matrices beside the attention's are trained, and the run folder gets a `pytorch_lora_weights.safetensors` for
diffusers. Held-out pictures: `--config.data.train_split=train[:90%] --config.data.test_split=train[90%:]`; by the first
few of their captions it draws while training, and at the end, unless `config.sampling.prompts` says by which. Then:

    python -m ldm_jax.sample --model=runs/finetune --prompt=TEXT --out=samples
    python -m ldm_jax.convert --model=runs/finetune --to=FOLDER        the same pipeline again, for diffusers

What MODEL is decides what it is given of the pictures beside their captions, and what is restored of the held-out ones:

- Stable Diffusion 1, 2 and XL, size 512, 768, 1024: nothing.
- Their inpainting models: the picture with random boxes hidden. Then `sample --init_image --mask --prompt`.
- The x4 upscaler (512, `--config.sampling.guidance=9`): the picture four times smaller, noised by a random level,
  which it is told. Then `sample --concat_image --prompt`.
- LDMs without texts (256): neither captions nor anything else. `--config.data.name=NAME` takes plain pictures that
  `python -m ldm_jax.data.image_folder --source=DIR --name=NAME` has prepared.
- The class-conditional LDM (256): the classes of such a set, one for each folder of SOURCE, no more than it knows. They
  take the places of its first ones, whose embeddings learn with the UNet, unless that is LoRA.
"""

from ml_collections import ConfigDict

from ldm_jax.config import defaults


def get_config() -> ConfigDict:
    """Full fine-tuning at a low rate; the model's own size and sampler."""
    config = defaults.get_config().unlock()
    config.init_from = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    config.stages = ("diffusion",)

    data = config.data
    data.name = "folder"
    data.test_split = "train"  # a handful of pictures leaves none to hold out
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
