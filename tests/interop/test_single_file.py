"""Single files of CompVis and Stability AI: the models that they are read as, and the files that are refused."""

import json

import jax
import ldm_files
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from ldm_jax.errors import InputError
from ldm_jax.interop import ldm_configs, single_file
from ldm_jax.interop.clip_weights import state_dict_from_text_params
from ldm_jax.interop.diffusers import check_finite, names_of, params_from_state_dict, state_dict_from_params
from ldm_jax.interop.ldm_names import autoencoder_source, open_clip_source, split_qkv, unet_source
from ldm_jax.interop.weights import write_safetensors
from ldm_jax.models.attention import SelfAttention2D

FAMILIES = [*ldm_files.UNETS]
SD1, SD2, XL, REFINER, CLASSES, UPSCALER, PLAIN = FAMILIES


@pytest.fixture(scope="module")
def made():
    """made(family) -> modules, states, tensors of the file; made once, not to be changed."""
    known = {}

    def make(family):
        if family not in known:
            modules, states = ldm_files.states_of(family)
            known[family] = (modules, states, ldm_files.to_ldm(family, modules, states))
        return known[family]

    return make


@pytest.fixture
def write(tmp_path):
    """write(tensors) -> the path of a .safetensors that has them."""

    def save(tensors):
        write_safetensors(tmp_path / "m.safetensors", tensors)
        return tmp_path / "m.safetensors"

    return save


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in theirs:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_is_the_model_that_it_was_made_of(family, made, write):
    modules, states, tensors = made(family)
    found = single_file.read(write(tensors))
    assert found.family == family
    assert (found.unet[0], found.autoencoder[0]) == (modules["unet"], modules["vae"])
    assert_equal(state_dict_from_params(found.unet[1]), states["unet"])
    assert_equal(state_dict_from_params(found.autoencoder[1]), states["vae"])
    if family == SD2:  # the default
        assert _scheduler_and_size(found) == ("DDIMScheduler", "v_prediction", 96)
    assert len(found.text_encoders) == len(modules) - 2
    names = [name for name in modules if name.startswith("text_encoder")]
    for name, (encoder, params) in zip(names, found.text_encoders, strict=True):
        assert encoder == modules[name]
        assert_equal(state_dict_from_text_params(params), states[name])
    assert (found.class_embedder is not None) == (family == CLASSES)
    if found.class_embedder:
        classes, params = found.class_embedder
        assert (classes.num_classes, classes.dim) == (ldm_files.CLASSES, 16)
        np.testing.assert_array_equal(params["embedding"]["embedding"], tensors["cond_stage_model.embedding.weight"])


def test_nine_channels_inpaint(made, write):
    """Here with a text encoder as transformers names its tensors since 5.6, and a scale that was measured."""
    tensors = {name.replace("transformer.text_model.", "transformer."): t for name, t in made(SD1)[2].items()}
    first = {"model.diffusion_model.input_blocks.0.0.weight": np.zeros((32, 9, 3, 3), np.float32)}
    found = single_file.read(write(tensors | first | {"scale_factor": np.array(0.25, np.float32)}))
    np.testing.assert_array_equal(found.scale, np.full(4, 0.25, np.float32))
    assert (found.fields.pipeline, found.unet[0].in_channels) == ("StableDiffusionInpaintPipeline", 9)
    assert (found.fields.scheduler["_class_name"], found.fields.scheduler["prediction_type"]) == (
        "DDIMScheduler",
        "epsilon",
    )


def test_a_checkpoint_is_read_without_what_its_training_kept(made, tmp_path):
    """And the base model of Stable Diffusion 2, which predicts eps, is detected by its training step."""
    _, states, tensors = made(SD2)
    base = ldm_files.write_checkpoint(tmp_path / "512-base-ema.ckpt", tensors, step=875000)
    found = single_file.read(base)
    assert_equal(state_dict_from_params(found.unet[1]), states["unet"])
    assert_equal(state_dict_from_text_params(found.text_encoders[0][1]), states["text_encoder"])
    assert _scheduler_and_size(found) == ("PNDMScheduler", "epsilon", 64)
    assert _scheduler_and_size(single_file.read(base, prediction="v")) == ("DDIMScheduler", "v_prediction", 96)


def _scheduler_and_size(found):
    return found.fields.scheduler["_class_name"], found.fields.scheduler["prediction_type"], found.fields.sample_size


@pytest.mark.parametrize("target", [np.float32, ml_dtypes.bfloat16])
def test_halves_are_cast(target, made, write):
    """An autoencoder alone, with the prefix of a whole model or without, and with its losses."""
    _, states, _ = made(SD1)
    halves = {name: value.astype(np.float16) for name, value in states["vae"].items()}
    prefix = "first_stage_model." if target == np.float32 else ""
    tensors = ldm_files.autoencoder_to_ldm(halves, 2, prefix) | {f"{prefix}loss.logvar": np.zeros(1, np.float32)}
    _, params, _ = single_file.read_autoencoder(write(tensors), params_dtype=target)
    assert_equal(state_dict_from_params(params), {k: v.astype(target) for k, v in halves.items()})


NAMES = {  # of Stable Diffusion 1 but for the last: names in diffusers -> in the file
    "conv_in.bias": "input_blocks.0.0.bias",
    "time_embedding.linear_2.weight": "time_embed.2.weight",
    "down_blocks.0.resnets.1.time_emb_proj.weight": "input_blocks.2.0.emb_layers.1.weight",
    "down_blocks.0.downsamplers.0.conv.weight": "input_blocks.3.0.op.weight",
    "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight": "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight",  # noqa: E501
    "down_blocks.3.resnets.1.conv2.bias": "input_blocks.11.0.out_layers.3.bias",
    "mid_block.attentions.0.proj_in.weight": "middle_block.1.proj_in.weight",
    "mid_block.resnets.1.norm1.weight": "middle_block.2.in_layers.0.weight",
    "up_blocks.0.upsamplers.0.conv.weight": "output_blocks.2.1.conv.weight",
    "up_blocks.1.upsamplers.0.conv.weight": "output_blocks.5.2.conv.weight",
    "up_blocks.3.resnets.2.conv_shortcut.weight": "output_blocks.11.0.skip_connection.weight",
    "up_blocks.3.attentions.2.transformer_blocks.0.ff.net.0.proj.bias": "output_blocks.11.1.transformer_blocks.0.ff.net.0.proj.bias",  # noqa: E501
    "conv_norm_out.weight": "out.0.weight",
}


def test_names_of_the_published_unets():
    for ours, theirs in NAMES.items():
        assert unet_source(ours, 2, [True, True, True, False], 64, len).name == theirs
    xl = unet_source("up_blocks.0.upsamplers.0.conv.weight", 2, [False, True, True], 64, len)
    assert xl.name == "output_blocks.2.2.conv.weight"
    plain = unet_source("down_blocks.1.attentions.0.to_k.bias", 2, [False, True], 32, lambda name: 64)
    assert plain.name == "input_blocks.4.1.qkv.bias"
    np.testing.assert_array_equal(plain.take(np.arange(192)), [*range(32, 64), *range(128, 160)])


def test_names_of_the_published_autoencoders_and_texts():
    for ours, theirs in {
        "encoder.down_blocks.2.downsamplers.0.conv.bias": "encoder.down.2.downsample.conv.bias",
        "encoder.mid_block.attentions.0.to_out.0.weight": "encoder.mid.attn_1.proj_out.weight",
        "decoder.up_blocks.0.upsamplers.0.conv.weight": "decoder.up.3.upsample.conv.weight",
        "decoder.up_blocks.3.resnets.0.conv_shortcut.weight": "decoder.up.0.block.0.nin_shortcut.weight",
        "decoder.conv_norm_out.bias": "decoder.norm_out.bias",
        "quantize.embedding.weight": "quantize.embedding.weight",
    }.items():
        assert autoencoder_source(ours, 4).name == theirs
    for ours, theirs in {
        "encoder.layers.22.self_attn.k_proj.bias": "transformer.resblocks.22.attn.in_proj_bias",
        "encoder.layers.22.mlp.fc2.weight": "transformer.resblocks.22.mlp.c_proj.weight",
        "embeddings.position_embedding.weight": "positional_embedding",
        "final_layer_norm.weight": "ln_final.weight",
    }.items():
        assert open_clip_source(ours).name == theirs


def test_splitting_fused_attention():
    np.testing.assert_array_equal(split_qkv(np.arange(6), 1), [2, 3])
    np.testing.assert_array_equal(split_qkv(np.arange(12), 2, heads=2), [4, 5, 10, 11])
    assert split_qkv(np.zeros((4, 2)), 0).shape == (4, 2)  # not divisible by three


def test_plain_attention_is_that_of_compvis():
    """Theirs by NumPy: [3 C, L] is split into heads, and only then each head into q, k and v."""
    rng, (heads, size, height) = np.random.default_rng(0), (2, 32, 3)
    c, length = heads * size, height * height
    names = {"norm.weight": (c,), "norm.bias": (c,), "qkv.weight": (3 * c, c, 1), "qkv.bias": (3 * c,),
             "proj_out.weight": (c, c, 1), "proj_out.bias": (c,)}  # fmt: skip
    file = {f"input_blocks.1.1.{name}": rng.normal(size=s) * s[-2] ** -0.5 for name, s in names.items() if len(s) > 1}
    file |= {f"input_blocks.1.1.{name}": rng.normal(size=shape) for name, shape in names.items() if len(shape) == 1}
    x = rng.normal(size=(c, length)) + 1

    def of(name):
        return file[f"input_blocks.1.1.{name}"]

    grouped = x.reshape(32, -1)
    normal = ((grouped - grouped.mean(1, keepdims=True)) / np.sqrt(grouped.var(1, keepdims=True) + 1e-5)).reshape(c, -1)
    h = normal * of("norm.weight")[:, None] + of("norm.bias")[:, None]
    theirs = []
    for head in (of("qkv.weight")[:, :, 0] @ h + of("qkv.bias")[:, None]).reshape(heads, 3 * size, length):
        q, k, v = head[:size], head[size : 2 * size], head[2 * size :]
        weight = np.exp(q.T @ k / np.sqrt(size))
        theirs.append(v @ (weight / weight.sum(1, keepdims=True)).T)
    theirs = x + of("proj_out.weight")[:, :, 0] @ np.concatenate(theirs) + of("proj_out.bias")[:, None]

    module = SelfAttention2D(32, 1e-5, heads)
    pixels = x.T.reshape(1, height, height, c).astype(np.float32)
    target = jax.eval_shape(module.init, jax.random.key(0), pixels)["params"]
    state = {}
    for name in names_of(target):
        source = unet_source(f"down_blocks.0.attentions.0.{name}", 2, [True], size, lambda name: c)
        state[name] = source.take(file[source.name]).astype(np.float32)
    ours = module.apply({"params": params_from_state_dict(state, target)}, pixels)
    np.testing.assert_allclose(np.asarray(ours).reshape(length, c).T, theirs, rtol=1e-4, atol=1e-4)


UNET = "model.diffusion_model."


def without(name):
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


def only(*prefixes):
    return lambda tensors: {key: value for key, value in tensors.items() if key.startswith(prefixes)}


def having(**more):
    arrays = {name.replace("__", "."): np.zeros(shape, np.float32) for name, shape in more.items()}
    return lambda tensors: tensors | arrays


REFUSED = {  # family, what is done to the tensors -> what the line must say
    "a LoRA": (
        SD1, lambda t: {"lora_unet_down_blocks_0_attentions_0.lora_up.weight": np.zeros((4, 4), np.float32)},
        "is a LoRA, which changes a model; it is no model by itself: --lora=FILE with"),
    "a part of a folder": (SD1, lambda t: {"down_blocks.0.a": np.zeros(1, np.float32)}, "must be that folder"),
    "a ControlNet": (SD1, having(control_model__zero_convs=(1,)), "is a ControlNet"),
    "EMA weights alone": (
        SD1, only("model_ema.", "first_stage_model.", "cond_stage"), "has EMA weights (model_ema.) alone"),
    "an autoencoder": (
        SD1, only("first_stage_model."),
        "is an autoencoder (VAE) alone, not a model; use it with --model=MODEL --vae=FILE"),
    "an unknown layout": (SD1, lambda t: {"joint_blocks.0.x": np.zeros(1, np.float32)}, "is no supported checkpoint"),
    "an unknown text encoder": (SD1, only(UNET, "first_stage_model."), "is no supported checkpoint"),
    "no middle": (SD1, without(f"{UNET}middle_block.1.proj_in.weight"), f"lacks {UNET}middle_block.1.proj_in.weight"),
    "one tensor missing": (
        SD1, without(f"{UNET}out.0.bias"), f"missing keys (1): {UNET}out.0.bias (unet conv_norm_out.bias)"),
    "EDM": (
        XL, having(edm_mean=(1, 4, 1, 1)),
        "is an EDM model (Playground 2.5, CosXL), which is read as a diffusers folder, not as a single file"),
    "another shape": (
        CLASSES, having(model__diffusion_model__time_embed__0__bias=(7,)),
        "unet: the state_dict does not fit this model: size mismatch (1): time_embedding.linear_1.bias"),
    "a shape of no network": (SD1, having(model__diffusion_model__out__2__weight=()), "of no supported network"),
    "levels of several widths": (
        SD1, having(model__diffusion_model__input_blocks__2__0__out_layers__3__weight=(48, 1)), "they are 32, 48"),
    "another size of heads": (
        SD2, having(model__diffusion_model__input_blocks__1__0__out_layers__3__weight=(96, 1)), "heads of 64"),
    "another kind of CLIP": (
        SD1, having(cond_stage_model__transformer__text_model__embeddings__token_embedding__weight=(9, 65)),
        "does not divide into heads of 64"),
    "another noise schedule": (PLAIN, having(betas=(1000,)), "has another noise schedule than its family"),
    "another noise augmentation": (
        UPSCALER, having(low_scale_model__betas=(1000,)), "its family: low_scale_model.betas are 0 to 0, not 0.0001"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_files_that_are_refused(case, made, write):
    family, change, words = REFUSED[case]
    path = write(change(made(family)[2]))
    with pytest.raises(InputError) as caught:
        single_file.read(path)
    assert words in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_tensors_of_no_use_are_named(made, write, capsys):
    _, states, tensors = made(CLASSES)
    found = single_file.read(write(having(scale_factor=(2,), some_buffer=(3,))(tensors)))
    assert_equal(state_dict_from_params(found.unet[1]), states["unet"])
    assert "has tensors that the model does not use: scale_factor, some_buffer" in capsys.readouterr().err


@pytest.mark.parametrize("family", [SD2, UPSCALER])
def test_text_encoders_without_the_layer_that_is_not_used(family, made, write):
    """As users of diffusers write them: all layers that are there are used."""
    modules, states, tensors = made(family)
    last = f"cond_stage_model.model.transformer.resblocks.{modules['text_encoder'].num_hidden_layers}."
    assert any(name.startswith(last) for name in tensors)
    of_diffusers = {k: v for k, v in tensors.items() if not k.startswith((last, "cond_stage_model.model.text_proj"))}
    for file in (tensors, of_diffusers):
        ((encoder, params),) = single_file.read(write(file)).text_encoders
        assert encoder == modules["text_encoder"]
        assert_equal(state_dict_from_text_params(params), states["text_encoder"])


def test_the_published_number_of_layers():
    """Without a projection too, the last of 24 layers is not used."""
    shapes = {"token_embedding.weight": (9, 64), "positional_embedding": (8, 64)}
    shapes |= {f"transformer.resblocks.{i}.mlp.c_fc.weight": (64, 64) for i in range(24)}
    assert ldm_configs.open_clip_config(shapes, last=False)["num_hidden_layers"] == 23
    del shapes["transformer.resblocks.23.mlp.c_fc.weight"]
    assert ldm_configs.open_clip_config(shapes, last=False)["num_hidden_layers"] == 23


def test_a_projection_that_is_a_linear_layer(made, write):
    modules, states, tensors = made(XL)
    name = "conditioner.embedders.1.model.text_projection"
    linear = {k: v for k, v in tensors.items() if k != name} | {f"{name}.weight": tensors[name].T}
    *_, (encoder, params) = single_file.read(write(linear)).text_encoders
    assert encoder == modules["text_encoder_2"]
    assert_equal(state_dict_from_text_params(params), states["text_encoder_2"])


def linear_attention(tensors):
    """An autoencoder's attention under diffusers' names."""
    names = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
    renamed = {}
    for name, tensor in tensors.items():
        *rest, part, leaf = ["", "", *name.split(".")]
        if "attn_1" in rest and part in names:
            name, tensor = ".".join((*rest[2:], names[part], leaf)), tensor[:, :, 0, 0] if tensor.ndim == 4 else tensor
        renamed[name] = tensor
    return renamed


def test_attention_of_autoencoders_as_linear_layers(made, write):
    modules, states, tensors = made(SD1)
    found = single_file.read(write(linear_attention(tensors)))
    assert found.autoencoder[0] == modules["vae"]
    assert_equal(state_dict_from_params(found.autoencoder[1]), states["vae"])


OLD_NAMES = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}


def test_an_autoencoder_in_the_names_of_diffusers(made, write):
    """Of today, and of before version 0.16."""
    modules, states, _ = made(SD1)
    old = dict(states["vae"])
    for new_name, old_name in OLD_NAMES.items():
        old = {name.replace(new_name, old_name): tensor for name, tensor in old.items()}
    assert old.keys() != states["vae"].keys()
    for state in (states["vae"], old):
        module, params, factor = single_file.read_autoencoder(write(state))
        assert (module, factor) == (modules["vae"], None)
        assert_equal(state_dict_from_params(params), states["vae"])


def test_the_autoencoder_of_a_whole_model(made, write, capsys):
    modules, states, tensors = made(XL)
    module, params, factor = single_file.read_autoencoder(write(tensors))
    assert (module, factor) == (modules["vae"], 0.13025)
    assert_equal(state_dict_from_params(params), states["vae"])
    assert capsys.readouterr().err == ""


def test_a_model_without_an_autoencoder(made, write):
    found = single_file.read(write({k: v for k, v in made(SD1)[2].items() if not k.startswith("first_stage_model.")}))
    assert found.autoencoder is None
    np.testing.assert_array_equal(found.scale, np.full(4, 0.18215, np.float32))
    np.testing.assert_array_equal(found.shift, np.zeros(4, np.float32))


@pytest.mark.parametrize("family", [SD1, XL])
def test_markers_of_v_prediction(family, made, write):
    """Empty tensors, of NoobAI-XL and others."""
    marked = having(v_pred=(0,))(made(family)[2])
    plain, v, zero_snr = (
        single_file.read(write(file)).fields.scheduler
        for file in (made(family)[2], marked, marked | {"ztsnr": np.zeros(0, np.float32)})
    )
    assert [s["prediction_type"] for s in (plain, v, zero_snr)] == ["epsilon", "v_prediction", "v_prediction"]
    assert [s.get("rescale_betas_zero_snr", False) for s in (plain, v, zero_snr)] == [False, False, True]
    assert zero_snr["timestep_spacing"] == "trailing"
    assert zero_snr["_class_name"] == ("DDIMScheduler" if family == SD1 else "EulerDiscreteScheduler")


STATED = {  # metadata of a file of Stable Diffusion 2 -> its prediction target, and whether that is assumed
    "nothing": ({}, "v_prediction", True),
    "epsilon": ({"modelspec.prediction_type": "epsilon"}, "epsilon", False),
    "v": ({"modelspec.prediction_type": "v"}, "v_prediction", False),
    "the base model": ({"modelspec.architecture": "stable-diffusion-v2-512"}, "epsilon", False),
    "the model of 768 pixels": ({"modelspec.architecture": "stable-diffusion-v2-768-v/lora"}, "v_prediction", False),
    "something else": ({"modelspec.prediction_type": "?", "modelspec.title": "x"}, "v_prediction", True),
}


@pytest.mark.parametrize("case", STATED)
def test_what_a_file_states_of_its_prediction(case, made, tmp_path, capsys):
    metadata, expected, assumed = STATED[case]
    save_file({k: np.ascontiguousarray(v) for k, v in made(SD2)[2].items()}, tmp_path / "m.safetensors", metadata)
    assert single_file.read(tmp_path / "m.safetensors").fields.scheduler["prediction_type"] == expected
    warning = capsys.readouterr().err
    assert ("does not state its prediction target; assumed is v" in warning) == assumed
    for flag, target in {"v": "v_prediction", "eps": "epsilon"}.items():
        found = single_file.read(tmp_path / "m.safetensors", prediction=flag)
        assert found.fields.scheduler["prediction_type"] == target
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("dtype", [ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2])
def test_fp8(dtype, made, write):
    eighths = {k: v.astype(dtype) if v.dtype == np.float32 else v for k, v in made(SD1)[2].items()}
    found = single_file.read(write(eighths), params_dtype=ml_dtypes.bfloat16)
    expected = {k: v.astype(dtype).astype(ml_dtypes.bfloat16) for k, v in made(SD1)[1]["unet"].items()}
    assert_equal(state_dict_from_params(found.unet[1]), expected)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("suffix", ["scale_weight", "weight_scale"])
def test_scaled_fp8(suffix, rows, dtype, made, write):
    """ComfyUI's: weight times scale, one number for a tensor or one for each row; biases and others as they are."""
    tensors, expected = {"scaled_fp8": np.zeros(2, ml_dtypes.float8_e4m3fn)}, {}
    for name, value in made(SD1)[2].items():
        tensors[name] = expected[name] = value
        if not (name.startswith(UNET) and name.endswith(".weight") and value.ndim > 1):
            continue
        axes = tuple(range(1, value.ndim)) if rows else None
        scale = (np.abs(value).max(axes) / 448).astype(np.float32)
        spread = scale.reshape(-1, *[1] * (value.ndim - 1))
        tensors[name] = (value / spread).astype(ml_dtypes.float8_e4m3fn)
        expected[name] = tensors[name].astype(np.float32) * spread
        tensors[f"{name.removesuffix('weight')}{suffix}"] = scale.reshape(-1, 1) if rows else scale
        tensors[f"{name.removesuffix('weight')}scale_input"] = np.float32(3)
    found = single_file.read(write(tensors), params_dtype=dtype)
    plain = single_file.read(write(expected), params_dtype=dtype)
    assert_equal(state_dict_from_params(found.unet[1]), state_dict_from_params(plain.unet[1]))
    original = made(SD1)[1]["unet"]
    for name, value in state_dict_from_params(found.unet[1]).items():  # 3 bits of mantissa
        bound = 0.07 * np.abs(original[name]).max() + 1e-6
        assert np.abs(np.float32(value) - original[name]).max() <= bound, name


@pytest.mark.parametrize("dtype", [ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2])
def test_fp8_with_a_format_for_each_layer(dtype, made, write):
    """ComfyUI's later files: each quantized layer has a scale and its format, JSON as uint8."""
    layer = "model.diffusion_model.input_blocks.0.0."
    weight = made(SD1)[2][f"{layer}weight"].astype(dtype)
    tensors = dict(made(SD1)[2]) | {f"{layer}weight": weight, f"{layer}weight_scale": np.float32(2)}
    name = "float8_e4m3fn" if dtype == ml_dtypes.float8_e4m3fn else "float8_e5m2"
    tensors[f"{layer}comfy_quant"] = layer_format({"format": name})
    got = state_dict_from_params(single_file.read(write(tensors)).unet[1])
    np.testing.assert_array_equal(got["conv_in.weight"], weight.astype(np.float32) * 2)


@pytest.mark.parametrize(
    ("stored", "found"), [({"format": "nvfp4"}, "'nvfp4'"), ({"format": "int8_tensorwise"}, "'int8_"), ({}, "None")]
)
def test_another_quantization_format(stored, found, made, write):
    name = "model.diffusion_model.out.2.comfy_quant"
    with pytest.raises(InputError, match=f"out.2.comfy_quant says that the layer is quantized as {found}.*e4m3fn"):
        single_file.read(write(dict(made(SD1)[2]) | {name: layer_format(stored)}))


def layer_format(value):
    return np.frombuffer(json.dumps(value).encode(), np.uint8)


def test_a_scale_of_another_shape(made, write):
    name = f"{UNET}out.2."
    scale = {f"{name}scale_weight": np.ones(3, np.float32), "scaled_fp8": np.zeros(0, ml_dtypes.float8_e4m3fn)}
    with pytest.raises(
        InputError, match=r"scale_weight has shape \[3\], of a weight of \[4, .*one number, or one a row"
    ):
        single_file.read(write(dict(made(SD1)[2]) | scale))


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("part", ["model.diffusion_model.out.2.weight", "first_stage_model.decoder.conv_in.bias"])
def test_weights_that_are_not_finite(value, part, made, write):
    tensors = dict(made(SD1)[2])
    tensors[part] = tensors[part].copy()
    tensors[part].flat[-1] = value
    with pytest.raises(InputError, match=r"conv_(out\.weight|in\.bias) has values that are not finite"):
        single_file.read(write(tensors))


def test_large_weights_are_finite():
    check_finite("w", np.full(4, 3e38, np.float32))
    check_finite("w", np.full(4, 6e4, np.float16))
    with pytest.raises(InputError, match="w has values that are not finite"):
        check_finite("w", np.array([3e38, 3e38, -np.inf], np.float32))


def test_an_autoencoder_must_be_one(made, write):
    with pytest.raises(InputError, match=r"has no autoencoder \(VAE\): neither in"):
        single_file.read_autoencoder(write(only(UNET)(made(SD1)[2])))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_truncated_files_are_refused(share, made, write, tmp_path):
    tensors = only("first_stage_model.")(made(SD1)[2])
    for path in (write(tensors), ldm_files.write_checkpoint(tmp_path / "m.ckpt", tensors)):
        content = path.read_bytes()
        path.write_bytes(content[: int(share * len(content))])
        with pytest.raises(InputError, match=path.name):
            single_file.read_autoencoder(path)


CODE = {  # opcodes beside the state_dict that call something
    "a shell": "Vcallbacks\ncposix\nsystem\n(Vtouch WITNESS\ntRs",
    "an import": "Vcallbacks\ncbuiltins\n__import__\n(Vos\ntRs",
    "eval": "Vcallbacks\ncbuiltins\neval\n(Vopen('WITNESS', 'w')\ntRs",
    "a method of a stand-in": "Vcallbacks\ncbuiltins\ngetattr\n(cnumpy\nndarray\nVtofile\ntRs",
    "a folder": "Vcallbacks\ncos\nmkdir\n(VWITNESS\ntRs",
}


@pytest.mark.parametrize("case", CODE)
def test_code_beside_the_weights_does_not_run(case, made, tmp_path):
    witness = tmp_path / "witness"
    path = tmp_path / "m.ckpt"
    tensors = {"decoder.conv_in.weight": np.zeros((1, 1), np.float32)}
    ldm_files.write_checkpoint(path, tensors, more=CODE[case].replace("WITNESS", str(witness)))
    with pytest.raises(InputError, match=r"its pickle uses .*, which no file of weights needs"):
        single_file.read(path)
    assert not witness.exists()


def test_stand_ins_do_nothing_and_are_no_weights(made, tmp_path):
    """What looks like NumPy's or lightning's is taken, but not looked up: here it would write a file."""
    witness, tensors = tmp_path / "witness", {"decoder.conv_in.weight": np.zeros((1, 1), np.float32)}
    call = f"cnumpy\nsave\n(V{witness}\nI1\ntR"
    path = ldm_files.write_checkpoint(tmp_path / "m.ckpt", tensors, more=f"Vcallbacks\n{call}s")
    with pytest.raises(InputError, match=r"is an autoencoder \(VAE\) alone"):
        single_file.read(path)
    path = ldm_files.write_checkpoint(tmp_path / "m.ckpt", tensors, inside=f"Vweight\n{call}s")
    with pytest.raises(InputError, match="'weight' in its state_dict is an object of the training code, not a tensor"):
        single_file.read(path)
    assert not list(tmp_path.glob("witness*"))
