"""diffusers' folders: tiny ones made by hand, read, written, and refused."""

import errno
import json
import os
import pickle
import zipfile

import jax
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors import safe_open
from safetensors.numpy import save_file

from ldm_jax.errors import InputError
from ldm_jax.interop.diffusers import state_dict_from_params
from ldm_jax.interop.folder import (
    component_config,
    load_autoencoder,
    load_unet,
    read_index,
    read_settings,
    write_component,
)
from ldm_jax.interop.modules import (
    abstract_params,
    autoencoder_from_config,
    config_from_autoencoder,
    config_from_unet,
    unet_from_config,
)
from ldm_jax.interop.weights import read_state_dict, write_safetensors

RNG = np.random.default_rng(0)
STATE = {
    "a.weight": RNG.normal(size=(2, 3)).astype(np.float32),
    "a.bias": RNG.normal(size=2).astype(np.float32),
    "b.weight": RNG.normal(size=(3, 2, 1, 1)).astype(np.float32),
    "position_ids": np.arange(5)[None],
}
NAME = "diffusion_pytorch_model"


def arrays_of(folder, **kwargs):
    """The weights in a folder, read."""
    return {name: np.asarray(tensor) for name, tensor in read_state_dict(folder, **kwargs).items()}


def assert_same(got, want):
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert (got[name].dtype, got[name].shape) == (value.dtype, value.shape), name
        assert got[name].tobytes() == value.tobytes(), name


def save_sharded(folder, state, name, shards, variant=""):
    """Tensor i of the state goes to file i mod `shards`; the index as diffusers writes it."""
    files = [f"{name}{variant}-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    where = {tensor: files[i % shards] for i, tensor in enumerate(state)}
    for file in files:
        save_file({tensor: state[tensor] for tensor in state if where[tensor] == file}, folder / file)
    index = folder / f"{name}.safetensors.index{variant}.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))
    return index, files


def save_bin(path, state):
    """A zip as torch writes it; its pickle in protocol 0, so that one can read it."""
    types = {"float32": "FloatStorage", "float16": "HalfStorage", "int64": "LongStorage"}
    ints = lambda values: "(" + "".join(f"I{n}\n" for n in values) + "t"  # noqa: E731
    text = "(d"
    for i, (name, value) in enumerate(state.items()):
        strides = [step // value.itemsize for step in value.strides]
        storage = f"(Vstorage\nctorch\n{types[value.dtype.name]}\nV{i}\nVcpu\nI{value.size}\ntQ"
        text += f"V{name}\nctorch._utils\n_rebuild_tensor_v2\n({storage}I0\n{ints(value.shape)}{ints(strides)}I00\nNtRs"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("weights/data.pkl", text + ".")
        for i, value in enumerate(state.values()):
            archive.writestr(f"weights/data/{i}", value.tobytes())


def half(state):
    return {name: v.astype(np.float16) if v.dtype == np.float32 else v for name, v in state.items()}


# The index and the configs


INDEX = {
    "_class_name": "StableDiffusionXLPipeline",
    "_diffusers_version": "0.19.0",
    "force_zeros_for_empty_prompt": True,
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
    "image_encoder": [None, None],
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "id2label": {"0": "tench"},
    "sizes": [1, 2, 3],
}


def test_index(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps(INDEX))
    assert read_index(tmp_path) == {
        "scheduler": ("diffusers", "EulerDiscreteScheduler"),
        "unet": ("diffusers", "UNet2DConditionModel"),
    }
    settings = ("_class_name", "_diffusers_version", "force_zeros_for_empty_prompt", "id2label", "sizes")
    assert read_settings(tmp_path) == {name: INDEX[name] for name in settings}


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "there is no .*model_index.json"),
        ("{", "model_index.json is damaged"),
        ("[]", "model_index.json is damaged: it holds no JSON object"),
        ('{"unet": [null, null], "safety_checker": ["a", "B"]}', "is damaged: it names no component"),
    ],
)
def test_no_index(tmp_path, text, message):
    if text is not None:
        (tmp_path / "model_index.json").write_text(text)
    with pytest.raises(InputError, match=message):
        read_index(tmp_path)


def test_component_config(tmp_path):
    for name, file in (("unet", "config.json"), ("low_res_scheduler", "scheduler_config.json")):
        with pytest.raises(InputError, match=f"there is no folder .*{name}"):
            component_config(tmp_path, name)
        (tmp_path / name).mkdir()
        with pytest.raises(InputError, match=f"there is no .*{file}"):
            component_config(tmp_path, name)
        (tmp_path / name / file).write_text('{"in_channels": 4}')
        assert component_config(tmp_path, name) == {"in_channels": 4}
    (tmp_path / "unet" / "config.json").write_text("3")
    with pytest.raises(InputError, match="damaged: it holds no JSON object"):
        component_config(tmp_path, "unet")


# Reading weights


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.safetensors", "model.safetensors"])
def test_whole_files(tmp_path, name):
    save_file(STATE, tmp_path / name)
    assert_same(arrays_of(tmp_path), STATE)


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "pytorch_model.bin"])
def test_pickles(tmp_path, name):
    save_bin(tmp_path / name, STATE)
    assert_same(arrays_of(tmp_path), STATE)
    assert_same(arrays_of(tmp_path, dtype=np.float16), half(STATE))


@pytest.mark.parametrize("name", ["diffusion_pytorch_model", "model"])
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards(tmp_path, name, variant):
    save_sharded(tmp_path, STATE, name, 3, f".{variant}" if variant else "")
    assert_same(arrays_of(tmp_path, variant=variant), STATE)
    assert_same(arrays_of(tmp_path), STATE)  # the only ones there are


def test_old_name_of_a_variants_index(tmp_path):
    index, _ = save_sharded(tmp_path, STATE, NAME, 2, ".fp16")
    index.rename(tmp_path / f"{NAME}.safetensors.fp16.index.json")
    assert_same(arrays_of(tmp_path, variant="fp16"), STATE)


def test_full_precision_comes_first(tmp_path):
    other = {name: value + 1 for name, value in STATE.items()}
    save_file(half(other), tmp_path / f"{NAME}.fp16.safetensors")
    assert_same(arrays_of(tmp_path), half(other))
    save_bin(tmp_path / f"{NAME}.bin", STATE)
    assert_same(arrays_of(tmp_path), STATE)
    assert_same(arrays_of(tmp_path, variant="fp16"), half(other))
    save_file(other, tmp_path / f"{NAME}.safetensors")  # before a pickle
    assert_same(arrays_of(tmp_path), other)
    save_sharded(tmp_path, STATE, NAME, 2)  # as diffusers has it
    assert_same(arrays_of(tmp_path), STATE)


TYPES = {
    "float64": np.array([1.5, -2.25]),
    "float32": np.array([[1e-40, 3.0]], np.float32),
    "float16": np.array([1.5], np.float16),
    "bfloat16": np.array([1.5, -3e38], ml_dtypes.bfloat16),
    "int64": np.array([2**40]),
    "uint8": np.array([255], np.uint8),
    "bool": np.array([True, False]),
    "scalar": np.array(3.0, np.float32),
    "empty": np.zeros((0, 3), np.float32),
}


@pytest.mark.parametrize("dtype", [None, np.float32, ml_dtypes.bfloat16])
def test_types(tmp_path, dtype):
    """Floats are cast, integers are not."""
    write_component(tmp_path, {"_class_name": "Any"}, TYPES)
    floats = {"float64", "float32", "float16", "bfloat16", "scalar", "empty"} if dtype else set()
    want = {name: value.astype(dtype) if name in floats else value for name, value in TYPES.items()}
    assert_same(arrays_of(tmp_path, dtype=dtype), want)


def test_weights_stay_in_the_file_until_they_are_asked_for(tmp_path):
    save_file(STATE, tmp_path / f"{NAME}.safetensors")
    state = read_state_dict(tmp_path, dtype=np.float16)
    changed = {name: value + 1 for name, value in STATE.items()}
    save_file(changed, tmp_path / f"{NAME}.safetensors")
    assert_same({name: np.asarray(tensor) for name, tensor in state.items()}, half(changed))


# Refusals


def refusal(folder, **kwargs):
    with pytest.raises(InputError) as caught:
        arrays_of(folder, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_no_weights(tmp_path):
    assert "there is no folder" in refusal(tmp_path / "unet")
    assert f"has no weights, for instance {NAME}.safetensors; it has no weights at all" in refusal(tmp_path)
    save_file(STATE, tmp_path / f"{NAME}.non_ema.safetensors")
    assert f"{NAME}.safetensors; it has {NAME}.non_ema.safetensors" in refusal(tmp_path)
    message = refusal(tmp_path, variant="fp16")
    assert f"has no weights of the variant 'fp16', for instance {NAME}.fp16.safetensors; it has" in message
    assert_same(arrays_of(tmp_path, variant="non_ema"), STATE)


def test_shards_without_their_index(tmp_path):
    index, files = save_sharded(tmp_path, STATE, NAME, 2)
    index.unlink()
    assert ", ".join(files) in refusal(tmp_path)


def test_a_missing_shard(tmp_path):
    index, files = save_sharded(tmp_path, STATE, NAME, 2)
    (tmp_path / files[1]).unlink()
    assert f"{files[1]} is missing; {index.name} lists weights in it" in refusal(tmp_path)


def test_an_index_that_names_what_is_not_there(tmp_path):
    index, files = save_sharded(tmp_path, STATE, NAME, 2)
    contents = json.loads(index.read_text())
    contents["weight_map"]["c.weight"] = files[0]
    index.write_text(json.dumps(contents))
    assert f"{files[0]} has no tensor c.weight, which {index.name} lists" in refusal(tmp_path)


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "is damaged"),
        ("{}", "is damaged: it has no weight_map"),
        ('{"weight_map": ["a"]}', "is damaged: its weight_map must name a file"),
        ('{"weight_map": {"a": 3}}', "is damaged: its weight_map must name a file"),
        ('{"weight_map": {"a": "../weights.safetensors"}}', "is damaged: its weight_map must name a file"),
        ('{"weight_map": {"a": ""}}', "is damaged: its weight_map must name a file"),
        ('{"weight_map": {}}', "has no tensors"),
    ],
)
def test_damaged_indices(tmp_path, text, message):
    (tmp_path / f"{NAME}.safetensors.index.json").write_text(text)
    assert message in refusal(tmp_path)


def test_every_truncation(tmp_path):
    path = tmp_path / f"{NAME}.safetensors"
    save_file(STATE, path)
    data = path.read_bytes()
    for length in range(0, len(data), 7):
        path.write_bytes(data[:length])
        assert f"{path} is damaged: it ends within" in refusal(tmp_path)


def write_header(path, header, data=b"\0" * 24):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


ENTRY = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


@pytest.mark.parametrize(
    "header, message",
    [
        (b"\xff\xff", "its header cannot be read"),
        (b"[" * 100_000, "its header cannot be read"),
        ([], "its header cannot be read"),
        ({"a": 3}, "its header cannot be read"),
        ({"a": {"dtype": "F32", "shape": [2, 3]}}, "its header cannot be read"),
        ({"a": ENTRY | {"shape": [2, 4]}}, "its header cannot be read"),
        ({"a": ENTRY | {"shape": [-2, -3]}}, "its header cannot be read"),
        ({"a": ENTRY | {"shape": [2.0, 3]}}, "its header cannot be read"),
        ({"a": ENTRY | {"data_offsets": [24, 0]}}, "its header cannot be read"),
        ({"a": ENTRY | {"data_offsets": [-24, 0]}}, "its header cannot be read"),
        ({"a": ENTRY | {"data_offsets": [0]}}, "its header cannot be read"),
        ({"a": ENTRY | {"data_offsets": [4, 28]}}, "it ends within a"),
        ({"a": ENTRY | {"shape": [2**62, 2**62], "data_offsets": [0, 2**126]}}, "it ends within a"),
        ({"a": ENTRY | {"dtype": "F4"}}, "holds a tensor of type F4; supported are F64, F32"),
        ({}, "has no tensors"),
        ({"__metadata__": {"format": "pt"}}, "has no tensors"),
    ],
)
def test_damaged_headers(tmp_path, header, message):
    write_header(tmp_path / f"{NAME}.safetensors", {"a": ENTRY})
    np.testing.assert_array_equal(arrays_of(tmp_path)["a"], np.zeros((2, 3)))
    write_header(tmp_path / f"{NAME}.safetensors", header)
    assert message in refusal(tmp_path)


def test_a_malicious_pickle_does_not_run(tmp_path):
    class Call:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'witness'}",)

    with zipfile.ZipFile(tmp_path / f"{NAME}.bin", "w") as archive:
        archive.writestr("weights/data.pkl", pickle.dumps({"a.weight": Call()}))
    assert "its pickle uses" in refusal(tmp_path)
    assert not (tmp_path / "witness").exists()


# Writing


def test_what_is_written(tmp_path):
    """Contiguous, named by the kind of config, with the metadata that PyTorch's readers want."""
    transposed = STATE | {"a.weight": np.asfortranarray(STATE["a.weight"]), "scalar": np.float32(3)}
    want = STATE | {"scalar": np.array(3, np.float32)}
    for config, file in (
        ({"_class_name": "VQModel"}, f"{NAME}.safetensors"),
        ({"hidden_size": 4}, "model.safetensors"),
    ):
        folder = tmp_path / file.split(".")[0]
        write_component(folder, config, transposed)
        assert sorted(p.name for p in folder.iterdir()) == sorted(["config.json", file])
        assert_same(arrays_of(folder), want)
        with safe_open(folder / file, framework="numpy") as opened:
            assert opened.metadata() == {"format": "pt"}
            assert opened.get_tensor("a.weight").tobytes() == STATE["a.weight"].tobytes()
        version = {"_diffusers_version": "0.42.1"} if "_class_name" in config else {}
        assert json.loads((folder / "config.json").read_text()) == config | version
    write_component(folder, config, {"other": np.zeros(3)})  # over its own
    assert [*arrays_of(folder)] == ["other"]


def test_other_weights_are_not_left_beside(tmp_path):
    index, _ = save_sharded(tmp_path, STATE, NAME, 2)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError, match="holds other weights"):
        write_component(tmp_path, {"_class_name": "VQModel"}, STATE)
    assert sorted(tmp_path.iterdir()) == before
    with pytest.raises(InputError, match="is a file; it must be a folder"):
        write_component(index, {"_class_name": "VQModel"}, STATE)


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    write_component(tmp_path, {"_class_name": "VQModel"}, STATE)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def fail(array):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "ascontiguousarray", fail)  # what comes before each tensor is written
    with pytest.raises(OSError, match=r"No space left on device: '.*diffusion_pytorch_model\.safetensors'"):
        write_component(tmp_path, {"_class_name": "Other"}, STATE)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


# Modules with their parameters


KL = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [4, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "norm_num_groups": 2,
    "scaling_factor": 0.5,
    "shift_factor": 0.25,
}
UNETS = {
    "UNet2DConditionModel": {
        "_class_name": "UNet2DConditionModel",
        "block_out_channels": [4, 8],
        "cross_attention_dim": 3,
        "attention_head_dim": 2,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "layers_per_block": 1,
        "norm_num_groups": 2,
    },
    "UNet2DModel": {
        "_class_name": "UNet2DModel",
        "block_out_channels": [4, 8],
        "attention_head_dim": 4,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
        "layers_per_block": 1,
        "norm_num_groups": 2,
    },
}
SMALL = {
    "_class_name": "UNet2DModel",
    "block_out_channels": [4],
    "attention_head_dim": 4,
    "down_block_types": ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"],
    "mid_block_type": None,
    "layers_per_block": 2,
    "norm_num_groups": 2,
}


def draw_params(module):
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), abstract_params(module))


def assert_same_tree(got, want):
    assert_same(*({"/".join(path): leaf for path, leaf in flatten_dict(tree).items()} for tree in (got, want)))


@pytest.mark.parametrize("config", UNETS.values(), ids=UNETS.keys())
def test_a_unet_written_and_loaded(tmp_path, config):
    unet = unet_from_config(config)
    params = draw_params(unet)
    write_component(tmp_path / "a", config, state_dict_from_params(params))
    module, loaded = load_unet(tmp_path / "a")
    assert module == unet
    assert_same_tree(loaded, params)

    write_component(tmp_path / "b", config_from_unet(module, 8), state_dict_from_params(loaded))
    module, again = load_unet(tmp_path / "b")
    assert module == unet
    assert_same_tree(again, params)
    first, second = (folder / f"{NAME}.safetensors" for folder in (tmp_path / "a", tmp_path / "b"))
    assert first.read_bytes() == second.read_bytes()


def test_an_autoencoder_written_and_loaded(tmp_path):
    params = draw_params(autoencoder_from_config(KL)[0])
    write_component(tmp_path / "a", KL, state_dict_from_params(params))
    module, loaded, shift, scale = load_autoencoder(tmp_path / "a")
    assert module == autoencoder_from_config(KL)[0]
    assert_same_tree(loaded, params)
    assert (shift.tolist(), scale.tolist()) == ([0.25] * 4, [0.5] * 4)

    write_component(tmp_path / "b", config_from_autoencoder(module, shift, scale, 16), state_dict_from_params(loaded))
    again, loaded, *scaling = load_autoencoder(tmp_path / "b")
    assert again == module
    assert_same_tree(loaded, params)
    np.testing.assert_array_equal(scaling, [shift, scale])


def test_types_of_parameters_and_computation(tmp_path):
    """Half-precision files become float32, or bfloat16 if asked; bfloat16 parameters run."""
    config = SMALL
    params = draw_params(unet_from_config(config))
    in_half = jax.tree.map(lambda leaf: leaf.astype(np.float16), params)
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_safetensors(tmp_path / f"{NAME}.fp16.safetensors", state_dict_from_params(in_half))
    _, loaded = load_unet(tmp_path, variant="fp16")
    assert_same_tree(loaded, jax.tree.map(lambda leaf: leaf.astype(np.float32), in_half))
    unet, loaded = load_unet(tmp_path, dtype=ml_dtypes.bfloat16, params_dtype=ml_dtypes.bfloat16)
    assert_same_tree(loaded, jax.tree.map(lambda leaf: leaf.astype(ml_dtypes.bfloat16), in_half))
    assert unet.dtype == ml_dtypes.bfloat16
    out = jax.eval_shape(unet.apply, {"params": loaded}, np.zeros((1, 4, 4, 3), np.float32), np.zeros(1))
    assert out.shape == (1, 4, 4, 3)


@pytest.mark.parametrize(
    "load, config, change, message",
    [
        (load_unet, SMALL, {"act_fn": "gelu"}, 'UNet2DModel: act_fn="gelu"'),
        (load_unet, SMALL, {"norm_num_groups": 3}, "multiple of norm_num_groups=3"),
        (
            load_unet,
            SMALL,
            {"in_channels": 4},
            r"size mismatch \(1\): conv_in.weight \(4, 3, 3, 3\) for",
        ),
        (load_unet, SMALL, {"layers_per_block": 1}, "unexpected keys"),
        (load_unet, SMALL, {"_class_name": "AutoencoderKL"}, "of no supported model"),
        (load_autoencoder, KL, {"_class_name": "UNet2DModel"}, "of no supported model"),
        (load_autoencoder, KL, {"latent_channels": 3}, "size mismatch"),
        (load_autoencoder, KL, {"norm_num_groups": 3}, "multiple of norm_num_groups=3"),
    ],
)
def test_a_folder_that_does_not_fit(tmp_path, load, config, change, message):
    module = unet_from_config(config) if load is load_unet else autoencoder_from_config(config)[0]
    write_component(tmp_path, config, state_dict_from_params(draw_params(module)))
    load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(InputError, match=message) as caught:
        load(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}: ") and "\n" not in str(caught.value)


def test_no_config(tmp_path):
    for load in (load_unet, load_autoencoder):
        with pytest.raises(InputError, match="there is no folder"):
            load(tmp_path / "unet")
        with pytest.raises(InputError, match=r"there is no .*config\.json"):
            load(tmp_path)


@pytest.mark.parametrize("first", [b"<", b"\x80\x02", b"PK\x03"])
def test_a_header_whose_length_looks_like_another_file(first, tmp_path):
    """The first bytes of safetensors are a number, whatever they spell."""
    length = int.from_bytes(first, "little")
    length += 256 ** len(first) * (length < 200)  # enough for the header
    header = json.dumps({"a": ENTRY}).encode().ljust(length)
    path = tmp_path / f"{NAME}.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(24))
    assert path.read_bytes().startswith(first)
    np.testing.assert_array_equal(arrays_of(tmp_path)["a"], np.zeros((2, 3)))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "is a Git LFS pointer"),
        (b"<!DOCTYPE html><html></html>", "is a web page, not weights"),
        (b"\n<html>login</html>", "is a web page, not weights"),
    ],
)
def test_downloads_that_are_no_weights(content, words, tmp_path):
    for name in (f"{NAME}.safetensors", f"{NAME}.bin"):
        (tmp_path / name).write_bytes(content)
        assert words in refusal(tmp_path)
        (tmp_path / name).unlink()


def test_names_do_not_matter_but_the_content(tmp_path):
    """A pickle under the name of safetensors, and the other way round."""
    write_header(tmp_path / f"{NAME}.safetensors", {"a": ENTRY})
    content = (tmp_path / f"{NAME}.safetensors").read_bytes()
    (tmp_path / f"{NAME}.bin").write_bytes(content)
    (tmp_path / f"{NAME}.safetensors").unlink()
    np.testing.assert_array_equal(arrays_of(tmp_path)["a"], np.zeros((2, 3)))
