"""Steps of fine-tuning, from images and captions to the weights, against the same steps by torch and diffusers."""

import json
import re
import sys
from functools import partial
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
from ldm_jax import command_line, sample
from ldm_jax.diffusion.random import Stream, example_keys, low_resolution_noise, split_keys
from ldm_jax.interop import lora
from ldm_jax.interop.diffusers import state_dict_from_params
from ldm_jax.models.concat_conditioning import Inpainting
from ldm_jax.pipeline.load import load_base
from ldm_jax.pipeline.trainable import LoRA, trainable_of
from ldm_jax.training.from_config import make_diffusion_stage
from ldm_jax.training.noising import add_noise
from ldm_jax.training.text_embeddings import freeze

TEXTS = ("low", "lower low", "wool")
N, RATE, DECAY, B2, DROPOUT = 4, 1e-3, 0.01, 0.999, 0.4
RANK, ALPHA = 3, 6.0
CASES = {  # prediction, weighting, what kind of Stable Diffusion it is
    "eps": ("epsilon", "uniform", {}),
    "eps, min-SNR": ("epsilon", "min_snr", {}),
    "v": ("v_prediction", "uniform", {}),
    "v, min-SNR": ("v_prediction", "min_snr", {}),
    "SDXL": ("epsilon", "uniform", {"xl": True}),
    "inpainting": ("epsilon", "uniform", {"inpainting": True}),
    "SDXL inpainting": ("epsilon", "uniform", {"xl": True, "inpainting": True}),
    "x4 upscaler": ("v_prediction", "uniform", {"upscaling": True}),
    "unconditional": ("epsilon", "uniform", None),
}


def write_folder(folder, prediction, kind):
    if kind is None:
        diffusers_folder.write_unconditional(folder)
    else:
        diffusers_folder.write_stable_diffusion(folder, **kind)
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": prediction}))
    return folder


def config_of(folder, weighting, rank):
    config = finetune_config.get_config().unlock()
    config.init_from = str(folder)
    config.data.image_size = 16
    config.lora.rank, config.lora.alpha = rank, ALPHA
    diffusion = config.diffusion
    diffusion.learning_rate, diffusion.weight_decay, diffusion.adam_b2 = RATE, DECAY, B2
    diffusion.warmup_steps, diffusion.label_dropout, diffusion.weighting = 0, DROPOUT, weighting
    return config


def ours(folder, weighting, cache, rank=0):
    """Two training steps of our own: their examples and losses, and the trained parameters before and after."""
    (model, params), config = load_base(config_of(folder, weighting, rank).lock())
    trainable = trainable_of(config, model)
    trained_model, frozen = freeze(model, params, trainable, [(text,) for text in TEXTS], config, cache)
    stage = make_diffusion_stage(trained_model, trainable, config)
    rng = np.random.default_rng(0)
    batch = {"x": rng.integers(0, 256, (N, 16, 16, 3), np.uint8), "label": np.arange(N, dtype=np.int32) % len(TEXTS),
             "id": np.arange(N, dtype=np.int32)}  # fmt: skip
    state, step = stage.init(jax.random.key(0), params), jax.jit(stage.step)
    noise = jax.jit(lambda batch, keys: add_noise(batch, frozen, keys, None, model, flip=False))
    before = jax.device_get(state.params)
    examples, losses = [], []
    for number in range(2):
        batch |= {"step": np.int32(number)}
        keys = example_keys(np.uint32(7), Stream.DIFFUSION, np.int32(number), batch["id"])
        *noising_keys, key_label, key_concat = split_keys(keys, 5)
        dropped = jax.vmap(lambda key: jax.random.bernoulli(key, DROPOUT))(key_label)
        noised = noise(batch, noising_keys)
        key_raw = split_keys(noising_keys[0], 2)[1]
        raw_noise = jax.vmap(partial(jax.random.normal, shape=noised["z0"].shape[1:]))(key_raw)
        texts = ["" if drop else TEXTS[label] for drop, label in zip(np.asarray(dropped), batch["label"])]
        example = noised | {"x": batch["x"], "raw_noise": raw_noise} | degraded(model.concat, batch["x"], key_concat)
        examples.append(jax.device_get(example) | {"texts": texts})
        state, metrics = step(state, frozen, batch, np.uint32(7))
        losses.append(float(metrics["loss"]))
    assert {text == "" for example in examples for text in example["texts"]} == {True, False}
    return examples, losses, before, jax.device_get(state.params)


def degraded(concat, x, keys):
    """What concat conditioning is made of: the masks; or the low-resolution images, with noise and its level."""
    if concat is None:
        return {}
    if isinstance(concat, Inpainting):
        return {"mask": concat.degrade({"x": x}, keys)["mask"]}
    key_degrade, key_augment = split_keys(keys, 2)
    small = concat.degrade({"x": x}, key_degrade)["small"]
    key_level, key_noise = split_keys(key_augment, 2)
    level = jax.vmap(lambda key: jax.random.randint(key, (), 0, concat.noise.max_noise_level + 1))(key_level)
    assert len({*level.tolist()}) > 1
    return {"small": small, "level": level, "small_noise": low_resolution_noise(key_noise, small.shape[1:])}


def nchw(x):
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1)))


def conditions(folder, texts):
    """The UNet's context of each text, and its added conditions; of SDXL the null condition is zeros."""
    names = {"text_encoder": transformers.CLIPTextModel}
    if (folder / "text_encoder_2").exists():
        names["text_encoder_2"] = transformers.CLIPTextModelWithProjection
    outputs = []
    for name, kind in names.items():
        tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / name.replace("text_encoder", "tokenizer"))
        ids = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        outputs.append(kind.from_pretrained(folder / name)(ids, output_hidden_states=True))
    if len(outputs) == 1:
        return outputs[0].last_hidden_state, None
    kept = torch.tensor([float(text != "") for text in texts])[:, None]
    context = torch.cat([features.hidden_states[-2] for features in outputs], -1) * kept[:, :, None]
    sizes = torch.tensor([[16.0, 16, 0, 0, 16, 16]] * len(texts))
    return context, {"text_embeds": outputs[1].text_embeds * kept, "time_ids": sizes}


def their_latents(folder, example):
    """z0, what is concatenated to z_t, and the class labels."""
    x = nchw(example["x"].astype(np.float32) / 127.5 - 1)
    if (folder / "vqvae").exists():
        return diffusers.VQModel.from_pretrained(folder / "vqvae").encode(x).latents, [], None
    vae = diffusers.AutoencoderKL.from_pretrained(folder / "vae")
    scale = 0.08333 if "small" in example else vae.config.scaling_factor
    latents = vae.encode(x).latent_dist
    z0 = (latents.mean + latents.std * nchw(example["raw_noise"])) * scale
    if "mask" in example:
        mask = nchw(example["mask"].astype(np.float32))
        masked = vae.encode(x * (mask < 0.5)).latent_dist.mode() * scale
        return z0, [torch.nn.functional.interpolate(mask, size=z0.shape[2:]), masked], None
    if "small" in example:
        level = torch.from_numpy(example["level"].astype(np.int64))
        small = nchw(example["small"].astype(np.float32) / 127.5 - 1)
        scheduler = diffusers.DDPMScheduler.from_pretrained(folder / "low_res_scheduler")
        return z0, [scheduler.add_noise(small, nchw(example["small_noise"]), level)], level
    return z0, [], None


def their_loss(folder, unet, example, weighting):
    """As diffusers' own training script has it."""
    scheduler = diffusers.DDPMScheduler.from_pretrained(folder / "scheduler")
    with torch.no_grad():
        z0, concat, level = their_latents(folder, example)
        arguments = {}
        if (folder / "text_encoder").exists():
            context, added = conditions(folder, example["texts"])
            arguments = {"encoder_hidden_states": context, "added_cond_kwargs": added, "class_labels": level}
    t, eps = torch.from_numpy(example["t"].astype(np.int64)), nchw(example["eps"])
    is_v = scheduler.config.prediction_type == "v_prediction"
    target = scheduler.get_velocity(z0, eps, t) if is_v else eps
    output = unet(torch.cat([scheduler.add_noise(z0, eps, t), *concat], 1), t, **arguments).sample
    each = ((output - target) ** 2).mean((1, 2, 3))
    if weighting == "min_snr":
        snr = diffusers.training_utils.compute_snr(scheduler, t)
        each = each * snr.clamp(max=5.0) / (snr + 1 if is_v else snr)
    return each.mean()


def changes(before, after):
    """The change of each tensor, by its name in diffusers."""
    before, after = state_dict_from_params(before), state_dict_from_params(after)
    return {name: after[name] - before[name] for name in before}


def assert_same_changes(mine, theirs):
    """The change of each tensor is the other's, to a thousandth of its norm."""
    assert mine.keys() == theirs.keys()
    # A constant added to all keys changes no attention: its gradient is rounding, of which AdamW makes whole steps.
    names = [name for name in mine if not name.endswith("to_k.bias")]
    errors = {k: np.linalg.norm(mine[k] - theirs[k]) / np.linalg.norm(theirs[k]) for k in names}
    print(f"relative error {max(errors.values()):.1e} in {max(errors, key=errors.get)}")
    assert max(errors.values()) <= 1e-3


def their_steps(folder, unet, trained, examples, losses, weighting):
    """The same steps by torch, of the parameters `trained`; the change of each."""
    start = {name: p.detach().numpy().copy() for name, p in trained.items()}
    optimizer = torch.optim.AdamW(trained.values(), RATE, betas=(0.9, B2), eps=1e-8, weight_decay=DECAY)
    for number, example in enumerate(examples):
        loss = their_loss(folder, unet, example, weighting)
        assert abs(loss.item() - losses[number]) <= 1e-4 * losses[number]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
    return {name: p.detach().numpy() - start[name] for name, p in trained.items()}


@pytest.mark.parametrize("case", CASES)
def test_two_steps_change_the_weights_as_in_torch(case, tmp_path):
    prediction, weighting, kind = CASES[case]
    folder = write_folder(tmp_path / "model", prediction, kind)
    examples, losses, before, after = ours(folder, weighting, tmp_path / "cache")
    unet = (diffusers.UNet2DModel if kind is None else diffusers.UNet2DConditionModel).from_pretrained(folder / "unet")
    unet.train()
    theirs = their_steps(folder, unet, dict(unet.named_parameters()), examples, losses, weighting)
    assert_same_changes(changes(before["denoiser"], after["denoiser"]), theirs)


class WithLora(torch.nn.Module):
    """A linear layer W + alpha / rank B A of which B and A are trained."""

    def __init__(self, layer, down, up):
        super().__init__()
        self.layer, self.down, self.up = layer, down, up

    def forward(self, x):
        return self.layer(x) + ALPHA / RANK * (x @ self.down.T @ self.up.T)


@pytest.mark.parametrize("kind", [{}, {"inpainting": True}, {"upscaling": True}], ids=str)
def test_two_steps_change_a_lora_as_in_torch(kind, tmp_path):
    folder = write_folder(tmp_path / "model", "epsilon", kind)
    examples, losses, before, after = ours(folder, "uniform", tmp_path / "cache", RANK)
    assert before.keys() == {"lora"}
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet").requires_grad_(False).train()
    state = {name: p.copy() for name, p in state_dict_from_params(before["lora"]).items()}  # torch writes into it
    start = {name: torch.nn.Parameter(torch.from_numpy(p)) for name, p in state.items()}
    layers = {name.rsplit(".lora.", 1)[0] for name in start}
    assert layers == {name for name, _ in unet.named_modules() if re.search(r"attn\d\.to_(q|k|v|out\.0)$", name)}
    for name in layers:
        parent, _, child = name.rpartition(".")
        pair = (start[f"{name}.lora.{side}.weight"] for side in ("down", "up"))
        setattr(unet.get_submodule(parent), child, WithLora(unet.get_submodule(name), *pair))
    theirs = their_steps(folder, unet, start, examples, losses, "uniform")
    assert_same_changes(changes(before["lora"], after["lora"]), theirs)


def random_lora(folder, path):
    """A file with LoRA of the folder's UNet, large enough to change the images."""
    (_, params), _ = load_base(config_of(folder, "uniform", RANK).lock())
    trainable, rng = LoRA(RANK, ALPHA), np.random.default_rng(0)
    params = trainable.init(jax.random.key(0), params)["lora"]
    params = jax.tree.map(lambda p: rng.normal(size=p.shape, scale=0.5).astype(np.float32), params)
    lora.save_lora(path, params, trainable.scale)


def our_samples(folder, path, out, *flags):
    command = ["sample", f"--model={folder}", f"--out={out}", "--steps=10", "--prompt=low", f"--lora={path}"]
    assert command_line.run(sample.main, [*command, *flags]) == 0
    with np.load(out / "samples.npz") as samples:
        return samples["images"].astype(float)


def pipeline(folder):
    """diffusers' pipeline of a folder whose index names no classes."""
    parts = {
        "unet": diffusers.UNet2DConditionModel.from_pretrained(folder / "unet"),
        "vae": diffusers.AutoencoderKL.from_pretrained(folder / "vae"),
        "text_encoder": transformers.CLIPTextModel.from_pretrained(folder / "text_encoder"),
        "tokenizer": transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        "scheduler": diffusers.DDIMScheduler.from_pretrained(folder / "scheduler"),
    }
    others = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipe = diffusers.StableDiffusionPipeline(**parts, **others)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def their_samples(pipe, z_T):
    latents = torch.from_numpy(z_T.transpose(0, 3, 1, 2).copy())
    images = pipe(["low"], latents=latents, num_inference_steps=10, guidance_scale=7.5, output_type="np").images
    return (images * 255).round()


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_samples_with_a_lora_are_those_of_diffusers(scale, tmp_path):
    folder = write_folder(tmp_path / "model", "epsilon", {})
    random_lora(folder, tmp_path / lora.FILE)
    z_T = np.random.default_rng(0).standard_normal((1, 8, 8, 4)).astype(np.float32)
    np.save(tmp_path / "noise.npy", z_T)
    pipe = pipeline(folder)
    plain = their_samples(pipe, z_T)
    pipe.load_lora_weights(tmp_path, weight_name=lora.FILE)
    pipe.fuse_lora(lora_scale=scale)
    expected = their_samples(pipe, z_T)
    images = our_samples(folder, tmp_path / lora.FILE, tmp_path / "out", f"--lora_scale={scale}",
                   f"--init_latents={tmp_path}/noise.npy")  # fmt: skip
    assert np.abs(images - expected).max() <= 1
    assert np.abs(images - plain).mean() > 2
