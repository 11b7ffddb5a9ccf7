"""Models written as single files: read back as the same model, or refused before a wrong file is left."""

import json
from dataclasses import replace

import jax
import ldm_files
import ml_dtypes
import numpy as np
import pytest
import random_runs
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from ldm_jax import command_line, convert
from ldm_jax.errors import InputError
from ldm_jax.export.single_file import write_single_file
from ldm_jax.interop.lora_files import read_lora, write_lora
from ldm_jax.pipeline.load import load
from ldm_jax.pipeline.lora import with_lora
from ldm_jax.pipeline.model import fingerprint

SD1, SD2, XL, REFINER, _, UPSCALER, PLAIN = ldm_files.UNETS


@pytest.fixture(scope="module")
def model_of(tmp_path_factory):
    """model_of(family) -> the model of a diffusers folder, its parameters, and the folder."""
    known = {}

    def make(family):
        if family not in known:
            folder = ldm_files.write_folder(tmp_path_factory.mktemp("model") / "folder", family)
            known[family] = (*load(folder), folder)
        return known[family]

    return make


def tensors_equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize("family", [SD1, SD2, XL, REFINER])
def test_what_is_written_is_read(family, model_of, tmp_path):
    model, params, folder = model_of(family)
    file = tmp_path / "model.safetensors"
    (note,) = write_single_file(model, params, file)
    assert "its vocabulary of 517 tokens is not CLIP's" in note
    (tmp_path / "tokenizer").symlink_to(folder / model.conditioning.components[0].replace("text_encoder", "tokenizer"))
    again, params_again = load(file)
    tensors_equal(params_again, params)
    assert (again.prediction, again.process) == (model.prediction, model.process)
    assert again.denoiser == model.denoiser.clone(dtype=again.denoiser.dtype)
    with safe_open(file, "np") as opened:
        assert opened.metadata()["modelspec.prediction_type"] == {"eps": "epsilon", "v": "v"}[model.prediction]


def test_depths_of_transformers_where_there_are_none(model_of, tmp_path):
    """The refiner's config.json states one depth for all levels, of which the outer have no attention."""
    model, params, _ = model_of(REFINER)
    assert model.denoiser.transformer_layers_per_block == (1, 2, 2)
    same = replace(model, denoiser=model.denoiser.clone(transformer_layers_per_block=2))
    write_single_file(same, params, tmp_path / "model.safetensors")
    other = replace(model, denoiser=model.denoiser.clone(transformer_layers_per_block=(1, 1, 2)))
    with pytest.raises(InputError, match=r"transformer_layers_per_block = \(1, 1, 2\), not \(1, 2, 2\)"):
        write_single_file(other, params, tmp_path / "other.safetensors")


@pytest.mark.parametrize("zero_snr", [False, True])
def test_the_prediction_target_and_zero_snr_are_stated(zero_snr, model_of, tmp_path):
    model, params, folder = model_of(SD1)
    fields = dict(model.origin.schedulers["scheduler"]) | {"rescale_betas_zero_snr": zero_snr}
    model = replace(model, prediction="v", origin=model.origin._replace(schedulers={"scheduler": fields}))
    write_single_file(model, params, tmp_path / "model.safetensors")
    names = {"v_pred"} | ({"ztsnr"} if zero_snr else set())
    assert {name for name, value in load_file(tmp_path / "model.safetensors").items() if not value.size} == names
    (tmp_path / "tokenizer").symlink_to(folder / "tokenizer")
    again, _ = load(tmp_path / "model.safetensors")
    assert (again.prediction, again.process.alpha[-1] < 1e-6) == ("v", zero_snr)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_command(dtype, model_of, tmp_path, capsys):
    _, params, folder = model_of(SD1)
    file = tmp_path / "new" / "model.safetensors"
    command = ["convert", f"--model={folder}", f"--to={file}", f"--dtype={dtype}"]
    assert command_line.run(convert.main, command) == 0
    assert f"Single file in {dtype}: {file}" in capsys.readouterr().out
    kind = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}[dtype]
    with file.open("rb") as content:
        header = json.loads(content.read(int.from_bytes(content.read(8), "little")))
    stored = {entry["dtype"] for name, entry in header.items() if name != "__metadata__"}
    assert stored == {{"float16": "F16", "bfloat16": "BF16"}[dtype]}
    (file.parent / "tokenizer").symlink_to(folder / "tokenizer")
    _, again = load(file)
    tensors_equal(again, jax.tree.map(lambda a: a.astype(kind).astype(np.float32), params | {"shift": params["shift"]})
                  | {name: params[name] for name in ("shift", "scale")})  # fmt: skip
    before = file.read_bytes()
    assert command_line.run(convert.main, command) == 2
    assert "exists; choose a new file" in capsys.readouterr().err
    assert file.read_bytes() == before


def large(params):
    """With a weight beyond half precision."""
    changed = jax.tree.map(np.array, params["denoiser"])
    changed["conv_in"]["bias"][0] = 1e6
    return params | {"denoiser": changed}


def with_scheduler(model, **fields):
    schedulers = {"scheduler": dict(model.origin.schedulers["scheduler"]) | fields}
    return replace(model, origin=model.origin._replace(schedulers=schedulers))


REFUSED = {  # family, change of (model, params), dtype -> what the line must say
    "no texts": (PLAIN, lambda m, p: (m, p), "float32", "single files are of Stable Diffusion 1, 2 and XL"),
    "the upscaler": (UPSCALER, lambda m, p: (m, p), "float32", "of the x4 upscaler are not written"),
    "another schedule": (SD1, lambda m, p: (with_scheduler(m, beta_end=0.02), p), "float32", "its beta_end is 0.02"),
    "another scale": (SD1, lambda m, p: (m, p | {"scale": 2 * p["scale"]}), "float32", "these have a scale of"),
    "other heads": (
        SD1, lambda m, p: (replace(m, denoiser=m.denoiser.clone(attention_heads=4)), p), "float32",
        "its UNet is not that of Stable Diffusion 1: attention_heads = 4"),
    "weights beyond half precision": (SD1, lambda m, p: (m, large(p)), "float16", "has values that are not finite"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_single_file_cannot_state_is_refused(case, model_of, tmp_path):
    family, change, dtype, words = REFUSED[case]
    model, params, _ = model_of(family)
    with pytest.raises(InputError, match=words):
        write_single_file(*change(model, params), tmp_path / "model.safetensors", dtype=dtype)


def test_a_run_is_no_single_file(tmp_path, capsys):
    run, file = random_runs.random_run(tmp_path / "run"), tmp_path / "model.safetensors"
    assert command_line.run(convert.main, ["convert", f"--model={run}", f"--to={file}"]) == 2
    assert "this is a model of a run" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [run]


def lora_state(model, rng):
    """LoRA in diffusers' names, of a layer of the UNet and one of the text encoder."""
    width = model.conditioning.encoders[0].hidden_size
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    shapes = {f"unet.{layer}.lora": (width, 32), "text_encoder.text_model.encoder.layers.0.self_attn.q_proj."
              "lora_linear_layer": (width, width)}  # fmt: skip
    state = {}
    for name, (inner, outer) in shapes.items():
        state |= {f"{name}.down.weight": rng.normal(size=(2, inner)), f"{name}.up.weight": rng.normal(size=(outer, 2))}
    return {name: value.astype(np.float32) for name, value in state.items()}


def test_merged_lora_and_kohyas_names(model_of, tmp_path, capsys):
    model, params, folder = model_of(SD1)
    files = {name: tmp_path / f"{name}.safetensors" for name in ("diffusers", "kohya", "again", "merged")}
    save_file(lora_state(model, np.random.default_rng(0)), files["diffusers"])

    def run(source, to, *flags):
        return command_line.run(convert.main, ["convert", f"--model={source}", f"--to={to}", *flags])

    assert run(files["diffusers"], files["kohya"], "--lora_names=kohya") == 0
    assert all(name.startswith(("lora_unet_", "lora_te_text_model_")) for name in load_file(files["kohya"]))
    by_name = {name: with_lora(model, params, files[name], 0.5) for name in ("diffusers", "kohya")}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), by_name["diffusers"], by_name["kohya"])
    assert fingerprint(model, by_name["kohya"]) != fingerprint(model, params)
    assert run(folder, tmp_path / "merged", f"--merge_lora={files['kohya']}", "--lora_scale=0.5") == 0
    tensors_equal(load(tmp_path / "merged")[1], by_name["kohya"])
    assert run(files["kohya"], files["again"], "--lora_names=diffusers") == 2
    assert "has kohya's name, from which diffusers' does not follow" in capsys.readouterr().err
    assert run(folder, tmp_path / "other", "--lora_names=kohya") == 2
    assert "must end in .safetensors" in capsys.readouterr().err
    for flag in (
        "dtype=float16",
        "merge_lora=FILE",
        "vae=FOLDER",
        "tokenizer=FOLDER",
        "prediction=v",
        "ema_sigma_rel=0.1",
    ):
        assert run(files["diffusers"], files["again"], "--lora_names=kohya", f"--{flag}") == 2
        line = capsys.readouterr().err
        assert f"--{flag.split('=')[0]} is of models; with --lora_names LoRA alone is written" in line
        assert not files["again"].exists()


def test_lora_is_written_with_its_scale(tmp_path):
    rng = np.random.default_rng(1)
    state = {f"unet.a.b.lora.{side}.weight": rng.normal(size=(2, 2)).astype(np.float32) for side in ("down", "up")}
    save_file(state | {"unet.a.b.alpha": np.array(3, np.float32)}, tmp_path / "one.safetensors")
    pairs = read_lora(tmp_path / "one.safetensors")
    for names in ("kohya", "diffusers"):
        write_lora(tmp_path / f"{names}.safetensors", pairs, names=names)
        ((_, again),) = read_lora(tmp_path / f"{names}.safetensors").items()
        np.testing.assert_allclose(again.delta(), pairs["unet", "a.b"].delta(), rtol=1e-6)
