"""One step of fine-tuning, from pictures and captions to the weights, against the same step by torch and diffusers."""

import json
import sys
from pathlib import Path

import diffusers
import jax
import numpy as np
import pytest
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent.parent))  # for `import bpe`

import diffusers_folder

from configs import finetune as finetune_config
from ldm_jax import finetune
from ldm_jax.first_stage import make_first_stage
from ldm_jax.interop.diffusers import state_dict_from_params
from ldm_jax.pretrained import scheduler_of
from ldm_jax.training.diffusion import STREAM
from ldm_jax.training.noising import make_noising, split_keys
from ldm_jax.training.state import example_keys

TEXTS = ("low", "lower low", "wool")
N, RATE, DECAY, B2, DROPOUT = 4, 1e-3, 0.01, 0.999, 0.4
CASES = {  # prediction, weighting
    "eps": ("epsilon", "uniform"),
    "eps, min-SNR": ("epsilon", "min_snr"),
    "v": ("v_prediction", "uniform"),
    "v, min-SNR": ("v_prediction", "min_snr"),
}


def write_folder(folder, prediction, **kind):
    diffusers_folder.write_stable_diffusion(folder, **kind)
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": prediction}))
    return folder


def config_of(folder, weighting):
    config = finetune_config.get_config().unlock()
    config.init_from = str(folder)
    config.data.image_size = 16
    diffusion = config.diffusion
    diffusion.learning_rate, diffusion.weight_decay, diffusion.adam_b2 = RATE, DECAY, B2
    diffusion.warmup_steps, diffusion.label_dropout, diffusion.weighting = 0, DROPOUT, weighting
    return config


def ours(folder, weighting, tmp_path):
    """Two steps of our own; what they were made of, and the parameters before and after."""
    base, config = finetune.load_base(config_of(folder, weighting).lock())
    stage = finetune.build_stage(config, base, len(TEXTS))
    frozen = finetune.frozen_arrays(config, base, TEXTS, tmp_path / "cache")
    rng = np.random.default_rng(0)
    batch = {"x": rng.integers(0, 256, (N, 16, 16, 3), np.uint8), "label": np.arange(N, dtype=np.int32) % len(TEXTS),
             "id": np.arange(N, dtype=np.int32)}  # fmt: skip
    state, step = stage.init(jax.random.key(0)), jax.jit(stage.step)
    alpha_bar = scheduler_of(base.model).schedule.alpha_bar
    add_noise = make_noising(first_stage=make_first_stage(base.model.autoencoder), alpha_bar=alpha_bar, flip=False)
    seen, losses = [], []
    for number in range(2):
        batch |= {"step": np.int32(number)}
        *noising_keys, key_label, _ = split_keys(example_keys(np.uint32(7), STREAM, np.int32(number), batch["id"]), 5)
        dropped = jax.vmap(lambda key: jax.random.bernoulli(key, DROPOUT))(key_label)
        noised = jax.device_get(add_noise(batch, frozen, noising_keys))
        raw_noise = jax.vmap(lambda key: jax.random.normal(key, noised["z0"].shape[1:]))(
            split_keys(noising_keys[0], 2)[1]
        )
        texts = ["" if drop else TEXTS[label] for drop, label in zip(np.asarray(dropped), batch["label"])]
        seen.append(noised | {"x": batch["x"], "raw_noise": np.asarray(raw_noise), "texts": texts})
        state, metrics = step(state, frozen, batch, np.uint32(7))
        losses.append(float(metrics["loss"]))
    assert {text == "" for step_ in seen for text in step_["texts"]} == {True, False}
    return seen, losses, base.params["unet"], jax.device_get(state.params)


def nchw(x):
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1)))


def encoded(folder, texts):
    """What the model's text encoder says of each."""
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer")
    encoder = transformers.CLIPTextModel.from_pretrained(folder / "text_encoder")
    ids = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    return encoder(ids).last_hidden_state


def their_loss(folder, unet, seen, weighting):
    """As diffusers' own training script has it."""
    scheduler = diffusers.DDPMScheduler.from_pretrained(folder / "scheduler")
    vae = diffusers.AutoencoderKL.from_pretrained(folder / "vae")
    with torch.no_grad():
        latents = vae.encode(nchw(seen["x"].astype(np.float32) / 127.5 - 1)).latent_dist
        z0 = (latents.mean + latents.std * nchw(seen["raw_noise"])) * vae.config.scaling_factor
        context = encoded(folder, seen["texts"])
    t, eps = torch.from_numpy(seen["t"].astype(np.int64)), nchw(seen["eps"])
    is_v = scheduler.config.prediction_type == "v_prediction"
    wanted = scheduler.get_velocity(z0, eps, t) if is_v else eps
    output = unet(scheduler.add_noise(z0, eps, t), t, context).sample
    each = ((output - wanted) ** 2).mean((1, 2, 3))
    if weighting == "min_snr":
        snr = diffusers.training_utils.compute_snr(scheduler, t)
        each = each * snr.clamp(max=5.0) / (snr + 1 if is_v else snr)
    return each.mean()


def moved(before, after):
    """Each tensor's way, by its name in diffusers."""
    before, after = state_dict_from_params(before), state_dict_from_params(after)
    return {name: after[name] - before[name] for name in before}


def assert_same_way(mine, theirs):
    """Each tensor has gone where the other went, to a thousandth of the way."""
    assert mine.keys() == theirs.keys()
    errors = {k: np.linalg.norm(mine[k] - theirs[k]) / np.linalg.norm(theirs[k]) for k in mine}
    print(f"relative error {max(errors.values()):.1e} in {max(errors, key=errors.get)}")
    assert max(errors.values()) <= 1e-3


@pytest.mark.parametrize("case", CASES)
def test_two_steps_move_the_weights_as_in_torch(case, tmp_path):
    prediction, weighting = CASES[case]
    folder = write_folder(tmp_path / "model", prediction)
    seen, losses, before, after = ours(folder, weighting, tmp_path)
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet").train()
    start = {name: p.detach().numpy().copy() for name, p in unet.named_parameters()}
    optimizer = torch.optim.AdamW(unet.parameters(), RATE, betas=(0.9, B2), eps=1e-8, weight_decay=DECAY)
    for number, made_of in enumerate(seen):
        loss = their_loss(folder, unet, made_of, weighting)
        assert abs(loss.item() - losses[number]) <= 1e-4 * losses[number]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
    theirs = {name: p.detach().numpy() - start[name] for name, p in unet.named_parameters()}
    assert_same_way(moved(before, after["unet"]), theirs)
