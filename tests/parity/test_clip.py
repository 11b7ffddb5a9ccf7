"""Our CLIP, text and image encoder, and tokenizer against transformers'."""

import json
import random
import string
import warnings

import jax
import numpy as np
import pytest
import torch
import transformers
from bpe import learn_merges, write_tokenizer
from safetensors.numpy import load_file

from ldm_jax.interop.clip_weights import (
    clip_from_config,
    clip_params_from_state_dict,
    config_from_clip,
    config_from_image_encoder,
    image_encoder_from_config,
    image_params_from_state_dict,
    state_dict_from_clip_params,
    state_dict_from_image_params,
    state_dict_from_text_params,
    text_encoder_from_config,
    text_params_from_state_dict,
)
from ldm_jax.interop.tokenizer import load_tokenizer
from ldm_jax.interop.weights import write_safetensors
from ldm_jax.training.contrastive import contrastive_loss

QUICK = {"xla_backend_optimization_level": 0}

# What the three have in common with Stable Diffusion's encoders is all but the sizes: the activation, the heads' size,
# four times the width between, the rule for the end of a text. Class, config, id that ends a text.
LEGACY, NEW = {"eos_token_id": 2}, {"eos_token_id": 58}
CASES = {
    "CLIP-L": ("CLIPTextModel", {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 12} | LEGACY),
    "OpenCLIP-H": (
        "CLIPTextModel",
        {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_act": "gelu"} | NEW,
    ),
    "OpenCLIP-bigG": (
        "CLIPTextModelWithProjection",
        {
            "hidden_size": 40,
            "num_attention_heads": 5,
            "hidden_act": "gelu",
            "projection_dim": 40,
            "num_hidden_layers": 2,
        }
        | LEGACY,
    ),
    "narrower projection, another eps": (
        "CLIPTextModelWithProjection",
        {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1, "projection_dim": 24}
        | {"layer_norm_eps": 1e-3, "intermediate_size": 72}
        | NEW,
    ),
}


def token_ids():
    """Texts that end at once, early and at the last position; the first has an id above the one that ends it."""
    rng = np.random.default_rng(0)
    ids = rng.integers(1, 57, (4, 77))
    for row, end in zip(ids, (9, 1, 40, 76)):
        row[end:] = 58
    ids[0, 20] = 59
    ids[2, 41:] = 0  # another padding
    return ids.astype(np.int32)


def make_theirs(case):
    kind, config = CASES[case]
    config = {"intermediate_size": 4 * config["hidden_size"], "vocab_size": 60, "bos_token_id": 57} | config
    return getattr(transformers, kind)(transformers.CLIPTextConfig(**config))


def call_theirs(model, ids):
    """`last`, `penultimate` and `pooled`."""
    out = model(torch.from_numpy(ids).long(), output_hidden_states=True)
    pooled = out.text_embeds if "text_embeds" in out else out.pooler_output
    return out.last_hidden_state, out.hidden_states[-2], pooled


def read_folder(folder):
    """Our module and its parameters, from config.json and model.safetensors."""
    encoder = text_encoder_from_config(json.loads((folder / "config.json").read_text()))
    target = jax.eval_shape(encoder.init, jax.random.key(0), token_ids())["params"]
    return encoder, text_params_from_state_dict(load_file(folder / "model.safetensors"), target)


@pytest.mark.parametrize("case", CASES)
def test_text_encoder(case, random_weights, tmp_path):
    theirs = make_theirs(case)
    random_weights(theirs)
    theirs.save_pretrained(tmp_path)
    encoder, params = read_folder(tmp_path)
    ids = token_ids()
    ours = jax.jit(encoder.apply)({"params": params}, ids)
    for name, a, b in zip(ours._fields, ours, call_theirs(theirs, ids)):
        assert a.shape == b.shape and a.dtype == np.float32
        error = np.abs(np.asarray(a) - b.numpy()).max() / np.abs(b.numpy()).max()
        print(f"{name}: relative error {error:.1e}")
        assert error <= 1e-4


@pytest.mark.parametrize("case", ["CLIP-L", "OpenCLIP-bigG"])
def test_transformers_reads_what_we_write(case, random_weights, tmp_path):
    theirs = make_theirs(case)
    random_weights(theirs)
    theirs.save_pretrained(tmp_path)
    _, params = read_folder(tmp_path)
    written = state_dict_from_text_params(params)
    assert {key.split(".")[0] for key in written} <= {"text_model", "text_projection"}
    write_safetensors(tmp_path / "model.safetensors", written)
    again, info = type(theirs).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    state = theirs.state_dict()
    assert again.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in again.state_dict().items())


def test_gradients(random_weights, tmp_path):
    """The backward pass agrees too, for every parameter."""
    theirs = make_theirs("OpenCLIP-bigG")
    random_weights(theirs)
    theirs.save_pretrained(tmp_path)
    encoder, params = read_folder(tmp_path)
    ids = token_ids()[:, :12]

    def loss(p):
        return sum((features**2).mean() for features in encoder.apply({"params": p}, ids))

    grads = jax.jit(jax.grad(loss), compiler_options=QUICK)(params)
    theirs.requires_grad_(True)
    sum((features**2).mean() for features in call_theirs(theirs, ids)).backward()
    their_grads = {name: p.grad.numpy() for name, p in theirs.named_parameters()}
    largest = max(np.abs(grad).max() for grad in their_grads.values())
    for name, grad in state_dict_from_text_params(grads).items():
        scale = max(np.abs(their_grads[name]).max(), 1e-4 * largest)  # the keys' bias has gradient 0 but for rounding
        assert np.abs(grad - their_grads[name]).max() <= 1e-3 * scale, name


@pytest.mark.parametrize("kind, projection", [("CLIPTextModel", False), ("CLIPTextModelWithProjection", True)])
def test_defaults_of_the_config_class(kind, projection):
    theirs = transformers.CLIPTextConfig()
    ours = text_encoder_from_config({"architectures": [kind]})
    fields = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    for name in (*fields, "max_position_embeddings", "hidden_act", "layer_norm_eps", "eos_token_id"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.projection_dim == (theirs.projection_dim if projection else None)


# ViT-L/14 in all but its width (1,024 there, so that a head has 64 numbers), and one with the other activation.
IMAGE_CASES = {
    "ViT-L/14": {"image_size": 224, "patch_size": 14, "num_hidden_layers": 24, "num_attention_heads": 16}
    | {"hidden_size": 64, "intermediate_size": 256, "projection_dim": 48},
    "gelu, another eps": {"image_size": 12, "patch_size": 4, "num_channels": 1, "num_hidden_layers": 2}
    | {"num_attention_heads": 3, "hidden_size": 24, "intermediate_size": 40, "projection_dim": 32}
    | {"hidden_act": "gelu", "layer_norm_eps": 1e-3},
}


def random_images(config):
    size = config["image_size"]
    shape = (2, size, size, config.get("num_channels", 3))
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def to_torch(x):
    return torch.from_numpy(x.transpose(0, 3, 1, 2).copy())


def read_image_folder(folder, x):
    encoder = image_encoder_from_config(json.loads((folder / "config.json").read_text()))
    target = jax.eval_shape(encoder.init, jax.random.key(0), x)["params"]
    return encoder, image_params_from_state_dict(load_file(folder / "model.safetensors"), target)


def relative_error(ours, theirs):
    theirs = theirs.numpy()
    assert ours.shape == theirs.shape and ours.dtype == np.float32
    return np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()


@pytest.mark.parametrize("case", IMAGE_CASES)
def test_image_encoder(case, random_weights, tmp_path):
    """The same numbers, and transformers reads what we write of it."""
    config = IMAGE_CASES[case]
    theirs = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**config))
    random_weights(theirs)
    theirs.save_pretrained(tmp_path)
    x = random_images(config)
    encoder, params = read_image_folder(tmp_path, x)
    ours, expected = jax.jit(encoder.apply)({"params": params}, x), theirs(to_torch(x))
    for name, a, b in zip(ours._fields, ours, (expected.last_hidden_state, expected.image_embeds)):
        print(f"{name}: relative error {relative_error(a, b):.1e}")
        assert relative_error(a, b) <= 1e-5, name
    assert_read_by_transformers(
        theirs, config_from_image_encoder(encoder), state_dict_from_image_params(params), tmp_path
    )


def assert_read_by_transformers(theirs, config, state, folder):
    """The model that transformers makes of our config and weights is `theirs`, to the bit."""
    (folder / "config.json").write_text(json.dumps(config))
    write_safetensors(folder / "model.safetensors", state)
    again, info = type(theirs).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    expected = theirs.state_dict()
    assert again.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in again.state_dict().items())
    for name, value in config.items():
        got = getattr(again.config, name)
        assert value == got or all(getattr(got, key) == each for key, each in value.items()), name


def make_clip(act):
    text = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2, "bos_token_id": 57}
    text |= {"num_attention_heads": 4, "hidden_act": act} | NEW
    vision = IMAGE_CASES["gelu, another eps"] | {"hidden_act": act}
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=20))


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_similarity(act, random_weights, tmp_path):
    """Both encoders and the scale, from one file; and back."""
    theirs = make_clip(act)
    random_weights(theirs)
    theirs.logit_scale.fill_(3.5)
    theirs.save_pretrained(tmp_path)
    clip = clip_from_config(json.loads((tmp_path / "config.json").read_text()))
    ids, x = token_ids(), random_images(IMAGE_CASES["gelu, another eps"])
    target = jax.eval_shape(clip.init, jax.random.key(0), ids, x)["params"]
    params = clip_params_from_state_dict(load_file(tmp_path / "model.safetensors"), target)
    text, image, scale = jax.jit(clip.apply)({"params": params}, ids, x)
    expected = theirs(input_ids=torch.from_numpy(ids).long(), pixel_values=to_torch(x))
    assert relative_error(text, expected.text_embeds) <= 1e-5
    assert relative_error(image, expected.image_embeds) <= 1e-5
    assert relative_error(scale * image @ text.T, expected.logits_per_image) <= 1e-5
    assert_read_by_transformers(theirs, config_from_clip(clip), state_dict_from_clip_params(params), tmp_path)


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_contrastive_loss(act, random_weights):
    """Where all captions differ, loss and gradient are transformers'."""
    theirs = make_clip(act)
    random_weights(theirs).requires_grad_(True)
    ids = token_ids()
    x = np.random.default_rng(1).normal(size=(4, 12, 12, 1)).astype(np.float32)
    clip = clip_from_config(theirs.config.to_dict() | {"architectures": ["CLIPModel"]})
    target = jax.eval_shape(clip.init, jax.random.key(0), ids, x)["params"]
    params = clip_params_from_state_dict({k: v.detach().numpy() for k, v in theirs.state_dict().items()}, target)
    own = np.arange(4)

    def loss(p):
        return contrastive_loss(*clip.apply({"params": p}, ids, x), own, own[:, None])["loss"].mean()

    value, grads = jax.jit(jax.value_and_grad(loss), compiler_options=QUICK)(params)
    expected = theirs(input_ids=torch.from_numpy(ids).long(), pixel_values=to_torch(x), return_loss=True).loss
    expected.backward()
    np.testing.assert_allclose(value, expected.item(), rtol=1e-5)
    their_grads = {name: p.grad.numpy() for name, p in theirs.named_parameters()}
    largest = max(np.abs(grad).max() for grad in their_grads.values())
    ours = state_dict_from_clip_params(grads)
    assert ours.keys() == their_grads.keys()
    for name, grad in ours.items():
        scale = max(np.abs(their_grads[name]).max(), 1e-3 * largest)  # the keys' bias has gradient 0 but for rounding
        assert np.abs(grad - their_grads[name]).max() <= 1e-3 * scale, name


def test_defaults_of_the_image_config_class():
    theirs = transformers.CLIPVisionConfig()
    ours = image_encoder_from_config({"architectures": ["CLIPVisionModelWithProjection"]})
    names = [name for name in config_from_image_encoder(ours) if name != "architectures"]
    assert len(names) == 11
    assert all(
        getattr(theirs, name) == value for name, value in config_from_image_encoder(ours).items() if name in names
    )


SENTENCE = "a photo of the low lower lowest widest newer cat cats dog sitting on a red blue sofa in the rain"
WORDS = SENTENCE.split()
SCRIPTS = ["äöüßñçÅ", "αβγδΩ", "абвгдЖ", "שלום", "سلام", "नमस्ते", "你好世界", "こんにちは", "한국어", "ﬁﬂ①²Ⅷ"]
EMOJI = ["🙂", "👩‍👩‍👧‍👦", "🏳️‍🌈", "🇨🇭", "❤️", "👍🏽"]
ODD = ["\n", "\t", "  ", "\u00a0", "\u200b", "\u3000", "e\u0301", "\u0130", "\x00", "\x7f", "\ufeff", "\U000e0041"]
SPECIAL = [
    "<|startoftext|>",
    "<|endoftext|>",
    "<|ENDOFTEXT|>",
    "don't we'll I'D it's",
    "&amp;",
    "</w>",
    "!",
    "!!!",
    "12345",
]


def strings():
    """1,000 texts: ordinary ones, everything awkward, the empty one, very long ones."""
    rng = random.Random(0)
    pieces = [*WORDS, *SCRIPTS, *EMOJI, *ODD, *SPECIAL, *string.punctuation]
    texts = ["", " ", "low " * 3000, "x" * 5000, "🙂" * 700]
    while len(texts) < 1000:
        chosen = rng.choices(WORDS if rng.random() < 0.3 else pieces, k=rng.choice([1, 3, 10, 40, 120]))
        texts.append(rng.choice(["", " "]).join(chosen))
    return texts


@pytest.mark.parametrize("special_tokens_map", [None, {"pad_token": "!"}])
def test_token_ids(special_tokens_map, tmp_path):
    """As diffusers calls it: padded and truncated at the maximum; `cut` are the texts whose truncation it warns of."""
    write_tokenizer(tmp_path, learn_merges(WORDS, 40), length=77, special_tokens_map=special_tokens_map)
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    texts = strings()
    tokens = load_tokenizer(tmp_path)(texts)
    expected = theirs(texts, padding="max_length", max_length=77, truncation=True, return_tensors="np").input_ids
    assert np.array_equal(tokens.ids, expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lengths = [len(ids) for ids in theirs(texts, padding=False, truncation=False).input_ids]
    assert np.array_equal(tokens.truncated, np.array(lengths) > 77)
    assert 50 < tokens.truncated.sum() < 950 and 77 in lengths
