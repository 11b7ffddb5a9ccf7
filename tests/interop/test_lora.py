"""LoRA files: what is written is read, in each layout to the same sum; what is not understood is refused."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ldm_jax.errors import InputError
from ldm_jax.interop.lora import add_lora, init_lora, merge, read_lora, save_lora

RNG = np.random.default_rng(0)
LAYER = "down_blocks.0.attn1.to_out.0"


def array(*shape):
    return RNG.normal(size=shape).astype(np.float32)


UNET = {
    "conv_in": {"kernel": array(3, 3, 4, 6), "bias": array(6)},
    "down_blocks_0": {
        "attn1": {"to_q": {"kernel": array(6, 6)}, "to_out_0": {"kernel": array(6, 6), "bias": array(6)}},
        "proj_in": {"kernel": array(1, 1, 6, 5)},
    },
}
DOWN, UP = array(2, 6), array(6, 2)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "lora.safetensors"


def added(path, scale=1.0):
    return add_lora(UNET, read_lora(path), scale, where="--lora=it")


def test_what_is_written_is_read(path):
    lora = init_lora(jax.random.key(0), UNET, 2)
    assert set(lora["down_blocks_0"]) == {"attn1"}
    jax.tree.map(np.testing.assert_array_equal, merge(UNET, lora, 3.0), UNET)
    lora = jax.tree.map(lambda p: array(*p.shape), lora)
    save_lora(path, lora, 3.0)
    names = [f"unet.down_blocks.0.attn1.{layer}.lora.{side}.weight" for layer in ("to_out.0", "to_q")
             for side in ("down", "up")]  # fmt: skip
    assert sorted(load_file(path)) == names
    for scale in (1.0, 0.5):
        here = merge(UNET, lora, 3.0 * scale)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), added(path, scale), here)


LAYOUTS = {  # keys of a file with DOWN and UP -> what they are multiplied by
    "diffusers": ({f"unet.{LAYER}.lora.down.weight": DOWN, f"unet.{LAYER}.lora.up.weight": UP}, {}, 1),
    "peft": ({f"unet.{LAYER}.lora_A.weight": DOWN, f"unet.{LAYER}.lora_B.weight": UP}, {}, 1),
    "before 0.22": (
        {f"unet.down_blocks.0.attn1.processor.to_out_lora.{side}.weight": a
         for side, a in (("down", DOWN), ("up", UP))}, {}, 1,
    ),
    "with an alpha": (
        {f"unet.{LAYER}.lora.down.weight": DOWN, f"unet.{LAYER}.lora.up.weight": UP,
         f"unet.{LAYER}.alpha": np.array(6, np.float32)}, {}, 3,
    ),
    "with peft's config": (
        {f"unet.{LAYER}.lora_A.weight": DOWN, f"unet.{LAYER}.lora_B.weight": UP}, {"unet.lora_alpha": 8}, 4,
    ),
}  # fmt: skip


def save(path, state, metadata):
    adapter = {"format": "pt", "lora_adapter_metadata": json.dumps(metadata)}
    save_file(state, path, metadata=adapter if metadata else None)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, path):
    state, metadata, times = LAYOUTS[layout]
    save(path, state, metadata)
    out = added(path)["down_blocks_0"]["attn1"]
    expected = UNET["down_blocks_0"]["attn1"]["to_out_0"]["kernel"] + times * (UP @ DOWN).T
    np.testing.assert_allclose(out["to_out_0"]["kernel"], expected, atol=1e-5)
    np.testing.assert_array_equal(out["to_q"]["kernel"], UNET["down_blocks_0"]["attn1"]["to_q"]["kernel"])


def test_convolutions(path):
    """In half precision, the layer of one pixel and that of nine."""
    state = {
        "conv_in": (array(2, 4, 3, 3), array(6, 2, 1, 1)),
        "down_blocks.0.proj_in": (array(2, 6, 1, 1), array(5, 2, 1, 1)),
    }
    halves = {f"unet.{layer}.lora.{side}.weight": a.astype(np.float16)
              for layer, pair in state.items() for side, a in zip(("down", "up"), pair)}  # fmt: skip
    save(path, halves, {})
    out = added(path)
    for layer, (down, up) in state.items():
        ours, before = out, UNET
        for name in layer.replace(".0", "_0").split("."):
            ours, before = ours[name], before[name]
        delta = np.einsum("or,rihw->hwio", up[:, :, 0, 0], down)
        np.testing.assert_allclose(ours["kernel"], before["kernel"] + delta, atol=1e-2)


def key(name, *shape):
    return {f"unet.{name}.weight": array(*shape)}


PAIR = LAYOUTS["diffusers"][0]
REFUSED = {
    "a text encoder's": (PAIR | {"text_encoder.x.lora.down.weight": DOWN}, {}, "has text_encoder.x"),
    "kohya's": ({"lora_unet_down_blocks_0.lora_down.weight": DOWN}, {}, "not those of kohya or ComfyUI"),
    "half a pair": (
        key(f"{LAYER}.lora.down", 2, 6), {}, "is damaged: down_blocks.0.attn1.to_out.0 lacks its down or up weight"),
    "an unknown layer": (
        key("mid.lora.down", 2, 6) | key("mid.lora.up", 6, 2), {}, "is for another model: this UNet has no layer mid"),
    "another width": (
        key(f"{LAYER}.lora.down", 2, 7) | key(f"{LAYER}.lora.up", 6, 2), {},
        r"\[6, 2\] x \[2, 7\] in it, but \[6, 6\]"),
    "ranks that do not agree": (
        key(f"{LAYER}.lora.down", 3, 6) | key(f"{LAYER}.lora.up", 6, 2), {}, "is for another model"),
    "a convolution for a linear layer": (
        key(f"{LAYER}.lora.down", 2, 6, 1, 1) | key(f"{LAYER}.lora.up", 6, 2, 1, 1), {}, "is for another model"),
    "DoRA": (PAIR, {"unet.use_dora": True}, "has use_dora, which is not supported"),
    "a config that is a list": (PAIR, [1], "lora_adapter_metadata cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, path):
    state, metadata, expected = REFUSED[case]
    save(path, state, metadata)
    with pytest.raises(InputError, match=expected) as error:
        added(path)
    assert "\n" not in str(error.value)


def test_files_that_are_none(path):
    with pytest.raises(InputError, match=r"lora.safetensors does not exist"):
        read_lora(path)
    with pytest.raises(InputError, match=r"must be a .safetensors file"):
        read_lora(_written(path.with_suffix(".bin"), b"x"))
    save(path, PAIR, {})
    with pytest.raises(InputError, match=r"is damaged"):
        read_lora(_written(path, path.read_bytes()[:-8]))


def _written(path, content):
    path.write_bytes(content)
    return path
