"""Textual inversion: a new token's gradient is that of torch, and diffusers draws the same with what a run learned."""

import sys
from functools import partial
from pathlib import Path

import diffusers
import jax
import numpy as np
import pytest
import torch
import transformers
from parity.quiet import without_warnings

sys.path.insert(0, str(Path(__file__).parent))  # for `import test_finetune`
sys.path.insert(0, str(Path(__file__).parent.parent))  # for `import finetuning`

import diffusers_folder
from finetuning import fine_tune, write_pictures
from safetensors.torch import load_file
from test_finetune import degraded, nchw, their_latents

from configs import textual_inversion as textual_inversion_config
from ldm_jax import command_line, convert, sample
from ldm_jax.diffusion.random import Stream, example_keys, split_keys
from ldm_jax.interop.textual_inversion import FILE
from ldm_jax.pipeline.load import load_base
from ldm_jax.pipeline.trainable import trainable_of
from ldm_jax.training.from_config import make_diffusion_stage
from ldm_jax.training.noising import add_noise
from ldm_jax.training.text_embeddings import freeze

TOKEN, WORD, N = "<x>", "low", 4
TEXTS = (f"low {TOKEN}", f"{TOKEN} lower low", f"wool {TOKEN}")
CASES = {  # what kind of Stable Diffusion it is, vectors
    "one vector": ({}, 1),
    "three vectors": ({}, 3),
    "SDXL": ({"xl": True}, 2),
    "inpainting": ({"inpainting": True}, 1),
}


@pytest.fixture
def longer_texts(monkeypatch):
    """Models whose context holds the prompts, which have a token for nearly each letter."""
    monkeypatch.setattr(diffusers_folder, "LENGTH", 48)


def our_gradient(folder, vectors, cache):
    """The example of a step, its loss, and the gradient of each text encoder's vectors, [n, D]."""
    config = textual_inversion_config.get_config().unlock()
    config.init_from, config.data.image_size, config.data.flip = str(folder), 16, False
    config.textual_inversion.update(token=TOKEN, init_word=WORD, vectors=vectors)
    (model, params), config = load_base(config.lock())
    trainable = trainable_of(config, model)
    trained_model, frozen = freeze(model, params, trainable, [(text,) for text in TEXTS], config, cache)
    stage = make_diffusion_stage(trained_model, trainable, config)
    rng = np.random.default_rng(0)
    batch = {"x": rng.integers(0, 256, (N, 16, 16, 3), np.uint8), "label": np.arange(N, dtype=np.int32) % len(TEXTS),
             "id": np.arange(N, dtype=np.int32), "step": np.int32(0)}  # fmt: skip
    keys = example_keys(np.uint32(7), Stream.DIFFUSION, np.int32(0), batch["id"])
    *noising_keys, _, key_concat = split_keys(keys, 5)
    noised = add_noise(batch, frozen, noising_keys, None, model, flip=False)
    raw_noise = jax.vmap(partial(jax.random.normal, shape=noised["z0"].shape[1:]))(split_keys(noising_keys[0], 2)[1])
    example = noised | {"x": batch["x"], "raw_noise": raw_noise} | degraded(model.concat, batch["x"], key_concat)
    trained = stage.init(jax.random.key(0), params).params

    @jax.jit
    def gradient(trained, frozen):
        example = stage._example(batch, frozen, np.uint32(7))
        return jax.value_and_grad(stage._loss, has_aux=True)(trained, frozen, example, None)

    (loss, _), grads = gradient(trained, frozen)
    texts = [TEXTS[label] for label in batch["label"]]
    return jax.device_get(example) | {"texts": texts}, float(loss), [np.asarray(grad) for grad in grads["token"]]


def encoders_with_token(folder, vectors):
    """transformers' tokenizers and text encoders with the token, as diffusers' training script adds it."""
    names, parts = [TOKEN, *(f"{TOKEN}_{i}" for i in range(1, vectors))], []
    kinds = {"text_encoder": transformers.CLIPTextModel, "text_encoder_2": transformers.CLIPTextModelWithProjection}
    for name, kind in kinds.items():
        if (folder / name).exists():
            tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / name.replace("text_encoder", "tokenizer"))
            assert tokenizer.add_tokens(names) == vectors
            encoder = kind.from_pretrained(folder / name)
            encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
            table = encoder.get_input_embeddings().weight
            (word,) = tokenizer(WORD, add_special_tokens=False).input_ids
            with torch.no_grad():
                table[-vectors:] = table[word]
            parts.append((tokenizer, encoder))
    return parts, " ".join(names)


@pytest.mark.parametrize("case", CASES)
def test_the_gradient_of_the_vectors_is_that_of_torch(case, tmp_path, longer_texts):
    kind, vectors = CASES[case]
    folder = tmp_path / "model"
    diffusers_folder.write_stable_diffusion(folder, **kind)
    example, loss, grads = our_gradient(folder, vectors, tmp_path / "cache")
    parts, expanded = encoders_with_token(folder, vectors)
    texts, outputs = [text.replace(TOKEN, expanded) for text in example["texts"]], []
    for tokenizer, encoder in parts:
        ids = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        outputs.append(encoder(ids, output_hidden_states=True))
    context, added = outputs[0].last_hidden_state, None
    if len(outputs) == 2:
        context = torch.cat([features.hidden_states[-2] for features in outputs], -1)
        added = {"text_embeds": outputs[1].text_embeds, "time_ids": torch.tensor([[16.0, 16, 0, 0, 16, 16]] * N)}
    with torch.no_grad():
        z0, concat, _ = their_latents(folder, example)
    t, eps = torch.from_numpy(example["t"].astype(np.int64)), nchw(example["eps"])
    scheduler = diffusers.DDPMScheduler.from_pretrained(folder / "scheduler")
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet").requires_grad_(False)
    z_t = torch.cat([scheduler.add_noise(z0, eps, t), *concat], 1)
    output = unet(z_t, t, encoder_hidden_states=context, added_cond_kwargs=added).sample
    their_loss = ((output - eps) ** 2).mean()
    their_loss.backward()
    assert abs(their_loss.item() - loss) <= 1e-5 * loss
    assert len(grads) == len(parts)
    for grad, (_, encoder) in zip(grads, parts):
        expected = encoder.get_input_embeddings().weight.grad[-vectors:].numpy()
        assert grad.shape == expected.shape and (np.linalg.norm(expected, axis=-1) > 1e-6).all()
        error = np.linalg.norm(grad - expected) / np.linalg.norm(expected)
        print(f"relative error {error:.1e}")
        assert error <= 1e-5


INVERSION = (
    "--config=configs/textual_inversion.py",
    "--config.data.path=HOME/plain",
    f"--config.textual_inversion.token={TOKEN}",
    f"--config.textual_inversion.init_word={WORD}",
    "--config.textual_inversion.vectors=2",
    "--config.diffusion.learning_rate=0.3",
    "--config.sampling.num=0",
)
PROMPTS = [f"low {TOKEN}", f"{TOKEN} wool"]


def converted(model, folder):
    """diffusers' pipeline of what `convert` makes of a model."""
    assert command_line.run(convert.main, ["convert", f"--model={model}", f"--to={folder}"]) == 0
    with without_warnings():
        pipe = diffusers.DiffusionPipeline.from_pretrained(folder, low_cpu_mem_usage=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("xl", [False, True], ids=["SD1", "SDXL"])
def test_diffusers_samples_the_same_with_the_file_and_from_the_export(xl, tmp_path, longer_texts):
    diffusers_folder.write_stable_diffusion(tmp_path / "model", xl=xl)
    for path in write_pictures(tmp_path / "plain").glob("*.txt"):
        path.unlink()
    assert fine_tune(tmp_path, "run", *INVERSION) == 0
    z_T = np.random.default_rng(0).standard_normal((2, 8, 8, 4)).astype(np.float32)
    np.save(tmp_path / "noise.npy", z_T)
    command = ["sample", f"--model={tmp_path / 'run'}", f"--out={tmp_path / 'out'}", "--steps=10", "--guidance=7.5"]
    command += [f"--init_latents={tmp_path}/noise.npy", *(f"--prompt={prompt}" for prompt in PROMPTS)]
    assert command_line.run(sample.main, command) == 0
    with np.load(tmp_path / "out" / "samples.npz") as samples:
        images = samples["images"].astype(float)

    def diffusers_images(pipe):
        latents = torch.from_numpy(z_T.transpose(0, 3, 1, 2).copy())
        options = {"latents": latents, "num_inference_steps": 10, "guidance_scale": 7.5, "output_type": "np"}
        return (pipe(PROMPTS, **options).images * 255).round()

    assert np.abs(images - diffusers_images(converted(tmp_path / "run", tmp_path / "exported"))).max() <= 1
    pipe = converted(tmp_path / "model", tmp_path / "again")
    plain = diffusers_images(pipe)
    if xl:
        state = load_file(tmp_path / "run" / FILE)
        pipe.load_textual_inversion(state["clip_l"], TOKEN, text_encoder=pipe.text_encoder, tokenizer=pipe.tokenizer)
        others = {"text_encoder": pipe.text_encoder_2, "tokenizer": pipe.tokenizer_2}
        pipe.load_textual_inversion(state["clip_g"], TOKEN, **others)
    else:
        pipe.load_textual_inversion(tmp_path / "run", weight_name=FILE)
    assert np.abs(images - diffusers_images(pipe)).max() <= 1
    assert np.abs(images - plain).mean() > 2
