"""Configs and key layouts by hand; that they are transformers' own is proven in tests/parity."""

import jax
import numpy as np
import pytest

from ldm_jax.errors import InputError
from ldm_jax.interop.clip_weights import (
    clip_from_config,
    clip_params_from_state_dict,
    config_from_clip,
    image_encoder_from_config,
    image_params_from_state_dict,
    state_dict_from_clip_params,
    state_dict_from_image_params,
    state_dict_from_text_params,
    text_encoder_from_config,
    text_params_from_state_dict,
)
from ldm_jax.models.clip import CLIPTextEncoder
from ldm_jax.models.clip_vision import CLIP, CLIPImageEncoder

SIZES = {
    "vocab_size": 11,
    "hidden_size": 6,
    "intermediate_size": 10,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 5,
}


@pytest.fixture(params=[None, 4], ids=["plain", "with projection"])
def params(request):
    """Random parameters, as the module would make them."""
    encoder = CLIPTextEncoder(**SIZES, projection_dim=request.param)
    target = jax.eval_shape(encoder.init, jax.random.key(0), np.zeros((1, 5), np.int32))["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), target)


def test_names_and_layouts(params):
    state = state_dict_from_text_params(params)
    layer = params["encoder"]["layers_1"]
    expected = {
        "text_model.embeddings.token_embedding.weight": params["embeddings"]["token_embedding"]["embedding"],
        "text_model.embeddings.position_embedding.weight": params["embeddings"]["position_embedding"]["embedding"],
        "text_model.encoder.layers.1.self_attn.q_proj.weight": layer["self_attn"]["q_proj"]["kernel"].T,
        "text_model.encoder.layers.1.self_attn.out_proj.bias": layer["self_attn"]["out_proj"]["bias"],
        "text_model.encoder.layers.1.layer_norm2.weight": layer["layer_norm2"]["scale"],
        "text_model.encoder.layers.1.mlp.fc1.weight": layer["mlp"]["fc1"]["kernel"].T,
        "text_model.final_layer_norm.bias": params["final_layer_norm"]["bias"],
    }
    if "text_projection" in params:
        expected["text_projection.weight"] = params["text_projection"]["kernel"].T
    assert all(np.array_equal(state[key], value) for key, value in expected.items())
    assert len(state) == 2 + 2 * 16 + 2 + ("text_projection" in params)


@pytest.mark.parametrize("prefix", ["text_model.", ""])
@pytest.mark.parametrize("buffer", [True, False])
def test_round_trip_to_the_bit(params, prefix, buffer):
    written = state_dict_from_text_params(params)
    state = {key.replace("text_model.", prefix): value for key, value in written.items()}
    if buffer:
        state[f"{prefix}embeddings.position_ids"] = np.arange(5)[None]
    read = text_params_from_state_dict(state, params)
    assert jax.tree.structure(read) == jax.tree.structure(params)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, read, params)))


def test_all_that_is_wrong_is_named(params):
    state = state_dict_from_text_params(params)
    del state["text_model.encoder.layers.0.mlp.fc2.bias"]
    state["text_model.encoder.layers.2.mlp.fc2.bias"] = np.zeros(6)
    state["logit_scale"] = np.zeros(())
    state["text_model.final_layer_norm.weight"] = np.zeros(7)
    with pytest.raises(InputError) as error:
        text_params_from_state_dict(state, params)
    assert str(error.value) == (
        "the state_dict does not fit this model: "
        "missing keys (1): encoder.layers.0.mlp.fc2.bias; "
        "unexpected keys (2): encoder.layers.2.mlp.fc2.bias, logit_scale; "
        "size mismatch (1): final_layer_norm.weight (7,) for (6,)"
    )


def test_the_projection_must_be_in_both():
    def target(projection_dim):
        encoder = CLIPTextEncoder(**SIZES, projection_dim=projection_dim)
        return jax.eval_shape(encoder.init, jax.random.key(0), np.zeros((1, 5), np.int32))["params"]

    def state(projection_dim):
        return state_dict_from_text_params(jax.tree.map(lambda leaf: np.zeros(leaf.shape), target(projection_dim)))

    with pytest.raises(InputError, match=r"missing keys \(1\): text_projection.weight"):
        text_params_from_state_dict(state(None), target(4))
    with pytest.raises(InputError, match=r"unexpected keys \(1\): text_projection.weight"):
        text_params_from_state_dict(state(4), target(None))


PLAIN, PROJECTED = {"architectures": ["CLIPTextModel"]}, {"architectures": ["CLIPTextModelWithProjection"]}


def test_published_configs():
    """What matters in the files of Stable Diffusion 1.5, Stable Diffusion 2.1 and SDXL's second encoder."""
    noise = {"attention_dropout": 0.0, "dtype": "float16", "initializer_factor": 1.0, "model_type": "clip_text_model"}
    sd15 = {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-05,
        "vocab_size": 49408,
        "max_position_embeddings": 77,
        "eos_token_id": 2,
    }
    sd21 = sd15 | {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 23,
        "hidden_act": "gelu",
    }
    sdxl = sd21 | {"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20, "num_hidden_layers": 32}
    assert text_encoder_from_config(PLAIN | sd15 | noise | {"projection_dim": 768}) == CLIPTextEncoder(**sd15)
    assert text_encoder_from_config(PLAIN | sd21 | noise | {"projection_dim": None}) == CLIPTextEncoder(**sd21)
    expected = CLIPTextEncoder(**sdxl, projection_dim=1280)
    assert text_encoder_from_config(PROJECTED | sdxl | noise | {"projection_dim": 1280}) == expected


def test_absent_keys_have_the_defaults_of_the_class():
    assert text_encoder_from_config(PLAIN) == CLIPTextEncoder()
    assert text_encoder_from_config(PROJECTED) == CLIPTextEncoder(projection_dim=512)


@pytest.mark.parametrize(
    "config, message",
    [
        ({}, r"architectures must be one of \['CLIPTextModel', 'CLIPTextModelWithProjection'\]; got None"),
        ({"architectures": ["T5EncoderModel"]}, r"architectures must be .*; got \['T5EncoderModel'\]"),
        ({"architectures": [{}]}, r"architectures must be .*; got \[{}\]"),
        (PLAIN | {"hidden_act": "gelu_new"}, "hidden_act must be one of gelu, quick_gelu; got 'gelu_new'"),
        (PLAIN | {"hidden_act": None}, "hidden_act must be of type str; got None"),
        (PLAIN | {"hidden_size": "768"}, "hidden_size must be of type int; got '768'"),
        (PLAIN | {"num_hidden_layers": True}, "num_hidden_layers must be of type int; got True"),
        (PLAIN | {"eos_token_id": [2, 3]}, r"eos_token_id must be of type int; got \[2, 3\]"),
        (PLAIN | {"hidden_size": 100}, "num_attention_heads must divide hidden_size; got 8 for 100"),
        (PLAIN | {"vocab_size": 0}, "vocab_size must be 1 or more; got 0"),
        (PROJECTED | {"projection_dim": None}, "projection_dim must be of type int; got None"),
    ],
)
def test_refused_configs(config, message):
    with pytest.raises(InputError, match=f"^text encoder: {message}$"):
        text_encoder_from_config(config)


IMAGE_SIZES = {name: value for name, value in SIZES.items() if not name.startswith(("vocab", "max"))}
IMAGE_SIZES |= {"image_size": 4, "patch_size": 2, "num_channels": 3}
IMAGE = {"architectures": ["CLIPVisionModelWithProjection"]}
BOTH = {"architectures": ["CLIPModel"], "projection_dim": 4, "text_config": SIZES, "vision_config": IMAGE_SIZES}


@pytest.fixture
def clip_params():
    """Random parameters, as the module would make them."""
    inputs = np.zeros((1, 5), np.int32), np.zeros((1, 4, 4, 3), np.float32)
    target = jax.eval_shape(clip_from_config(BOTH).init, jax.random.key(0), *inputs)["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), target)


def test_names_and_layouts_of_the_image_encoder(clip_params):
    params = clip_params["image"]
    state = state_dict_from_image_params(params)
    kernel = params["embeddings"]["patch_embedding"]["kernel"]
    expected = {
        "vision_model.embeddings.class_embedding": params["embeddings"]["class_embedding"],
        "vision_model.embeddings.patch_embedding.weight": kernel.transpose(3, 2, 0, 1),
        "vision_model.embeddings.position_embedding.weight": params["embeddings"]["position_embedding"]["embedding"],
        "vision_model.pre_layrnorm.weight": params["pre_layrnorm"]["scale"],
        "vision_model.post_layernorm.bias": params["post_layernorm"]["bias"],
        "visual_projection.weight": params["visual_projection"]["kernel"].T,
    }
    assert all(np.array_equal(state[key], value) for key, value in expected.items())
    assert len(state) == 3 + 2 * 16 + 4 + 1


@pytest.mark.parametrize("prefix", ["vision_model.", ""])
def test_round_trip_of_the_image_encoder(clip_params, prefix):
    params = clip_params["image"]
    written = state_dict_from_image_params(params)
    state = {key.replace("vision_model.", prefix): value for key, value in written.items()}
    state[f"{prefix}embeddings.position_ids"] = np.arange(5)[None]
    read = image_params_from_state_dict(state, params)
    assert jax.tree.structure(read) == jax.tree.structure(params)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, read, params)))


def test_both_encoders_in_one_file(clip_params):
    state = state_dict_from_clip_params(clip_params)
    assert state["logit_scale"] == clip_params["logit_scale"]
    read = clip_params_from_state_dict(state, clip_params)
    assert jax.tree.structure(read) == jax.tree.structure(clip_params)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, read, clip_params)))
    del state["logit_scale"]
    with pytest.raises(InputError, match=r"missing keys \(1\): logit_scale$"):
        clip_params_from_state_dict(state, clip_params)


def test_configs_of_both():
    """What matters in the file of openai/clip-vit-large-patch14, and back."""
    layers = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-05, "projection_dim": 768, "dropout": 0.0}
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12}
    image = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24}
    image |= {"image_size": 224, "patch_size": 14, "num_channels": 3}
    text_encoder = CLIPTextEncoder(**text, eos_token_id=2, projection_dim=768)
    expected = CLIP(text_encoder, CLIPImageEncoder(**image, projection_dim=768))
    parts = {"text_config": text | layers | {"eos_token_id": 2}, "vision_config": image | layers}
    assert clip_from_config(BOTH | parts | {"projection_dim": 768}) == expected
    assert clip_from_config(config_from_clip(expected)) == expected
    whole = {"architectures": ["CLIPModel"]}
    assert clip_from_config(whole) == CLIP(CLIPTextEncoder(projection_dim=512), CLIPImageEncoder())


@pytest.mark.parametrize(
    "read, config, message",
    [
        (image_encoder_from_config, {}, r"image encoder: architectures must be one of \['CLIPVision.*'\]; got None"),
        (image_encoder_from_config, IMAGE | {"patch_size": [2, 2]}, r"image encoder: patch_size .* int; got \[2, 2\]"),
        (image_encoder_from_config, IMAGE | {"patch_size": 30}, "image encoder: patch_size must divide image_size; .*"),
        (clip_from_config, BOTH | PLAIN, r"CLIP: architectures must be one of \['CLIPModel'\]; got .*"),
        (clip_from_config, BOTH | {"vision_config": None}, "CLIP: text_config and vision_config must be objects .*"),
        (clip_from_config, BOTH | {"projection_dim": 0}, "text encoder: projection_dim must be 1 or more; got 0"),
        (clip_from_config, BOTH | {"vision_config": {"hidden_act": 1}}, "image encoder: hidden_act must be of .*"),
    ],
)
def test_refused_configs_of_images(read, config, message):
    with pytest.raises(InputError, match=f"^{message}$"):
        read(config)
