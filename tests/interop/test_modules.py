"""diffusers' configs to our modules and back, and every value that must be refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.errors import InputError
from ldm_jax.interop.config_fields import FIXED, IGNORED, TABLES, defaults
from ldm_jax.interop.modules import (
    abstract_params,
    autoencoder_from_config,
    config_from_autoencoder,
    config_from_unet,
    dit_from_config,
    unet_from_config,
)
from ldm_jax.models.autoencoder import AutoencoderKL, VQModel
from ldm_jax.models.unet import Added, UNet
from ldm_jax.models.unet2d import UNet2D

CONDITION = {"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.6.0"}
PLAIN = {"_class_name": "UNet2DModel"}
KL = {"_class_name": "AutoencoderKL"}
VQ = {"_class_name": "VQModel"}

SDXL = CONDITION | {
    "_name_or_path": "anything",
    "addition_embed_type": "text_time",
    "addition_embed_type_num_heads": 64,
    "addition_time_embed_dim": 4,
    "attention_head_dim": [1, 2, 4],
    "block_out_channels": [8, 16, 32],
    "class_embed_type": None,
    "cross_attention_dim": 12,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "mid_block_only_cross_attention": None,
    "norm_num_groups": 8,
    "num_attention_heads": None,
    "projection_class_embeddings_input_dim": 29,
    "sample_size": 128,
    "transformer_layers_per_block": [1, 2, 3],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "upcast_attention": None,
    "use_linear_projection": True,
}
OURS_OF_SDXL = UNet(
    block_out_channels=(8, 16, 32),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    attention_heads=(1, 2, 4),
    transformer_layers_per_block=(1, 2, 3),
    cross_attention_dim=12,
    use_linear_projection=True,
    norm_num_groups=8,
    addition_embed_type="text_time",
    addition_time_embed_dim=4,
    projection_class_embeddings_input_dim=29,
)
CELEBAHQ = PLAIN | {
    "attention_head_dim": 4,
    "block_out_channels": [8, 16],
    "down_block_types": ["UNetResDownBlock2D", "AttnDownBlock2D"],
    "norm_num_groups": 4,
    "sample_size": 64,
    "up_block_types": ["UNetResAttnUpBlock2D", "UpBlock2D"],
}
OURS_OF_CELEBAHQ = UNet2D(
    block_out_channels=(8, 16),
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=4,
    norm_num_groups=4,
)


@pytest.mark.parametrize(
    "config, ours",
    [
        (SDXL, OURS_OF_SDXL),
        (CELEBAHQ, OURS_OF_CELEBAHQ),
        (CONDITION, UNet(cross_attention_dim=1280)),
        (PLAIN, UNet2D()),
    ],
)
def test_unets(config, ours):
    """Also: absent fields have diffusers' defaults, and old names of blocks are today's."""
    unet = unet_from_config(json.loads(json.dumps(config)))
    assert unet == ours
    assert unet_from_config(config, dtype=jnp.bfloat16) == ours.clone(dtype=jnp.bfloat16)
    back = json.loads(json.dumps(config_from_unet(unet, 64)))
    assert unet_from_config(back) == unet
    assert (back["sample_size"], back["_class_name"]) == (64, config["_class_name"])
    assert back.keys() - {"_class_name", "_diffusers_version"} == defaults(config["_class_name"]).keys()


def test_attention_head_dim_is_the_number_of_heads():
    assert unet_from_config(CONDITION | {"attention_head_dim": [5, 10, 20, 20]}).attention_heads == (5, 10, 20, 20)
    assert unet_from_config(CONDITION | {"attention_head_dim": 5, "num_attention_heads": 4}).attention_heads == 4
    assert config_from_unet(UNet(attention_heads=(5, 10, 20, 20)), 64)["attention_head_dim"] == [5, 10, 20, 20]


def test_what_is_the_same_at_all_levels():
    unet = unet_from_config(CONDITION | {"layers_per_block": [3, 3, 3, 3], "cross_attention_dim": [7, 7, 7, 7]})
    assert (unet.layers_per_block, unet.cross_attention_dim) == (3, 7)


def test_sizes_of_an_addition_that_is_not_there():
    """diffusers reads them only with an addition_embed_type."""
    assert unet_from_config(CONDITION | {"addition_time_embed_dim": 256}) == unet_from_config(CONDITION)


LEVELS = {
    "block_out_channels": [8, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
}


@pytest.mark.parametrize(
    "config, ours, shift, scale",
    [
        (KL, AutoencoderKL(block_out_channels=(64,), layers_per_block=1), 0, 0.18215),
        (KL | LEVELS, AutoencoderKL(block_out_channels=(8, 16), layers_per_block=1), 0, 0.18215),
        (
            KL | LEVELS | {"scaling_factor": 0.3611, "shift_factor": 0.1159, "use_quant_conv": False},
            AutoencoderKL(block_out_channels=(8, 16), layers_per_block=1, use_quant_conv=False),
            0.1159,
            0.3611,
        ),
        (
            KL
            | {"latents_mean": [1, 2, 3, 4.5], "latents_std": [1, 2, 4, 5], "scaling_factor": 2, "latent_channels": 4},
            AutoencoderKL(block_out_channels=(64,), layers_per_block=1),
            [1, 2, 3, 4.5],
            [2, 1, 0.5, 0.4],
        ),
        (VQ, VQModel(block_out_channels=(64,), layers_per_block=1), 0, 1),
        (
            VQ | LEVELS | {"scaling_factor": 0.18215, "vq_embed_dim": 5, "num_vq_embeddings": 8},
            VQModel(block_out_channels=(8, 16), layers_per_block=1, vq_embed_dim=5, num_vq_embeddings=8),
            0,
            0.18215,
        ),
    ],
)
def test_autoencoders(config, ours, shift, scale):
    """A VQModel without a scaling factor is older than the field: 1, not diffusers' default."""
    channels = getattr(ours, "vq_embed_dim", None) or ours.latent_channels
    module, *scaling = autoencoder_from_config(config, dtype=jnp.bfloat16)
    assert module == ours.clone(dtype=jnp.bfloat16)
    for got, want in zip(scaling, (shift, scale)):
        assert (got.shape, got.dtype) == ((channels,), np.float32)
        np.testing.assert_array_equal(got, np.broadcast_to(np.float32(want), channels))

    back = json.loads(json.dumps(config_from_autoencoder(ours, *scaling, 256)))
    module, *again = autoencoder_from_config(back)
    assert module == ours
    np.testing.assert_allclose(again, scaling, rtol=2e-7)
    assert back["sample_size"] == 256
    if np.ndim(scale) == 0:
        assert back["scaling_factor"] == scale  # no more digits than were given


def test_a_vq_model_that_diffusers_has_no_words_for():
    for shift, scale in (([0.1] * 3, [1.0] * 3), ([0.0] * 3, [1.0, 1.0, 2.0])):
        with pytest.raises(InputError, match="one scaling_factor and no shift or scale per channel"):
            config_from_autoencoder(VQModel(), np.array(shift), np.array(scale), 32)


# Another value for every field that is supported: it must arrive in the module, or in the scaling.
CHANGES = {
    "UNet2DConditionModel": {
        "in_channels": 9,
        "out_channels": 8,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "down_block_types": ["DownBlock2D"] * 4,
        "mid_block_type": None,
        "up_block_types": ["UpBlock2D"] * 4,
        "only_cross_attention": [True, True, True, False],
        "block_out_channels": [32, 64, 64, 64],
        "layers_per_block": 1,
        "dropout": 0.1,
        "norm_num_groups": 16,
        "cross_attention_dim": 768,
        "transformer_layers_per_block": [1, 2, 10, 10],
        "attention_head_dim": 16,
        "num_attention_heads": [1, 2, 3, 4],
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "num_class_embeds": 1000,
        "time_cond_proj_dim": 256,
    },
    "UNet2DModel": {
        "in_channels": 1,
        "out_channels": 6,
        "freq_shift": 1,
        "flip_sin_to_cos": False,
        "down_block_types": ["DownBlock2D"] * 4,
        "mid_block_type": None,
        "up_block_types": ["UpBlock2D"] * 4,
        "block_out_channels": [32, 64, 64, 64],
        "layers_per_block": 1,
        "dropout": 0.1,
        "attention_head_dim": None,
        "norm_num_groups": 16,
        "add_attention": False,
    },
    "AutoencoderKL": {
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": [32],
        "layers_per_block": 2,
        "latent_channels": 16,
        "norm_num_groups": 16,
        "scaling_factor": 1,
        "shift_factor": -0.5,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "mid_block_add_attention": False,
    },
    "DiTTransformer2DModel": {
        "num_attention_heads": 8,
        "attention_head_dim": 64,
        "num_layers": 12,
        "in_channels": 16,
        "out_channels": 8,
        "patch_size": 4,
        "sample_size": 64,
        "num_embeds_ada_norm": 10,
    },
    "VQModel": {
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": [32],
        "layers_per_block": 2,
        "latent_channels": 4,
        "num_vq_embeddings": 8192,
        "norm_num_groups": 16,
        "vq_embed_dim": 4,
        "scaling_factor": 0.5,
        "mid_block_add_attention": False,
    },
}
TOGETHER = {
    "UNet2DConditionModel": {"addition_time_embed_dim", "projection_class_embeddings_input_dim"},
    "UNet2DModel": set(),
    "DiTTransformer2DModel": set(),
    "AutoencoderKL": {"latents_mean", "latents_std", "down_block_types", "up_block_types"},
    "VQModel": {"down_block_types", "up_block_types"},
}


def read(config):
    """The module and, of an autoencoder, its scaling, as something to compare."""
    if "UNet" in config["_class_name"]:
        return unet_from_config(config)
    if "Transformer" in config["_class_name"]:
        return dit_from_config(config)
    module, shift, scale = autoencoder_from_config(config)
    return module, shift.tolist(), scale.tolist()


@pytest.mark.parametrize("name", TABLES)
def test_every_supported_field_arrives(name):
    supported = {field for field, (_, kind) in TABLES[name].items() if kind is not FIXED and kind is not IGNORED}
    assert supported == CHANGES[name].keys() | TOGETHER[name]
    for field, value in CHANGES[name].items():
        assert read({"_class_name": name, field: value}) != read({"_class_name": name}), field


@pytest.mark.parametrize("name", TABLES)
def test_every_other_field_is_refused_unless_it_is_the_default(name):
    for field, (default, kind) in TABLES[name].items():
        if kind is FIXED:
            other = default + 1 if isinstance(default, int | float) and not isinstance(default, bool) else "other"
            with pytest.raises(InputError) as caught:
                read({"_class_name": name, field: other})
            expected = f"{name}: {field}={json.dumps(other)} is not supported; supported is {json.dumps(default)}"
            assert str(caught.value) == expected
            read({"_class_name": name, field: default})
        elif kind is IGNORED:
            assert read({"_class_name": name, field: "other"}) == read({"_class_name": name})


@pytest.mark.parametrize(
    "config, message",
    [
        (CONDITION | {"in_channels": 0}, "in_channels=0 is not supported; supported is a positive integer"),
        (CONDITION | {"in_channels": True}, "in_channels=true"),
        (CONDITION | {"in_channels": "4"}, 'in_channels="4"'),
        (CONDITION | {"norm_num_groups": None}, "norm_num_groups=null"),
        (CONDITION | {"block_out_channels": []}, r"block_out_channels=\[\] .* is a list of positive integers"),
        (CONDITION | {"block_out_channels": 320}, "block_out_channels=320"),
        (CONDITION | {"block_out_channels": [320, -1]}, r"block_out_channels=\[320, -1\]"),
        (CONDITION | {"down_block_types": ["KDownBlock2D"]}, "is a list of DownBlock2D and CrossAttnDownBlock2D"),
        (CONDITION | {"up_block_types": [None]}, "is a list of UpBlock2D and CrossAttnUpBlock2D"),
        (CONDITION | {"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, '"UNetMidBlock2DCrossAttn" or null'),
        (CONDITION | {"layers_per_block": [2, 2, 3, 2]}, "is a positive integer, the same for every level"),
        (CONDITION | {"cross_attention_dim": [7, 8]}, "cross_attention_dim=.* the same for every level"),
        (CONDITION | {"transformer_layers_per_block": [[1, 2], 3]}, "is a positive integer or a list of positive"),
        (CONDITION | {"attention_head_dim": None}, "attention_head_dim=null"),
        (CONDITION | {"num_attention_heads": 0}, "or a list of positive integers or null"),
        (CONDITION | {"only_cross_attention": [1]}, "is true or false or a list of them"),
        (CONDITION | {"use_linear_projection": "yes"}, 'use_linear_projection="yes"'),
        (CONDITION | {"addition_embed_type": "text_image"}, '="text_image" .* is "text_time" or null'),
        (CONDITION | {"freq_shift": float("nan")}, "freq_shift=NaN .* is a number"),
        (CONDITION | {"dropout": 1.0}, r"is a number in \[0, 1\)"),
        (CONDITION | {"resnet_time_scale_shift": "scale_shift"}, '="scale_shift" .* is "default"'),
        (CONDITION | {"dual_cross_attention": True}, "dual_cross_attention=true .* is false"),
        (CONDITION | {"new_feature": [3]}, r"UNet2DConditionModel: new_feature=\[3\] is not supported: .* not known"),
        (PLAIN | {"down_block_types": ["CrossAttnDownBlock2D"]}, "is a list of DownBlock2D and AttnDownBlock2D"),
        (PLAIN | {"num_class_embeds": 10}, "num_class_embeds=10 is not supported; supported is null"),
        (KL | {"scaling_factor": 0}, "scaling_factor=0 .* is a positive number"),
        (KL | {"shift_factor": "0"}, 'shift_factor="0" .* is a number or null'),
        (KL | {"latents_std": [1, 0]}, "is a list of positive numbers or null"),
        (KL | {"latents_mean": [0] * 4}, "latents_mean goes with latents_std, and neither"),
        (KL | {"latents_mean": [0] * 4, "latents_std": [1] * 4, "shift_factor": 0.1}, "neither with a shift_factor"),
        (KL | {"latents_mean": [0] * 3, "latents_std": [1] * 4}, "must have latent_channels=4 numbers"),
        (KL | {"block_out_channels": [32, 64]}, "down_block_types must have one entry .* it has 1 for 2"),
        (VQ | LEVELS | {"up_block_types": ["UpDecoderBlock2D"]}, "up_block_types must have one entry"),
        (VQ | {"down_block_types": ["AttnDownEncoderBlock2D"]}, "is a list of DownEncoderBlock2D"),
        (VQ | {"norm_type": "spatial"}, '="spatial" .* is "group"'),
    ],
)
def test_refusals(config, message):
    with pytest.raises(InputError, match=message) as caught:
        read(config)
    assert "\n" not in str(caught.value)


def test_fields_that_are_unknown_and_off():
    config = CONDITION | {"_anything": 3, "new_feature": None, "newer_feature": False, "class_embeddings_concat": None}
    assert unet_from_config(config) == unet_from_config(CONDITION)


@pytest.mark.parametrize("read_config, known", [(unet_from_config, PLAIN), (autoencoder_from_config, KL)])
def test_other_classes(read_config, known):
    for config, message in (
        ({}, "it has no _class_name; supported is"),
        ({"_class_name": "UNet3DConditionModel"}, 'its _class_name is "UNet3DConditionModel"; supported is'),
        ({"_class_name": ["UNet2DModel"]}, r"its _class_name is \[\"UNet2DModel\"\]"),
        (KL if known is PLAIN else PLAIN, "its _class_name is"),
    ):
        with pytest.raises(InputError, match=message):
            read_config(config)
    read_config(known)


ONE_LEVEL = {
    "block_out_channels": (8,),
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",),
    "mid_block_type": None,
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
ADDITION = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 29,
}
MODULES = {
    "addition": UNet(**ONE_LEVEL, **ADDITION),
    "labels": UNet(**ONE_LEVEL, num_class_embeds=5),
    "guidance": UNet(**ONE_LEVEL, time_cond_proj_dim=6),
    "context": UNet(**ONE_LEVEL | {"down_block_types": ("CrossAttnDownBlock2D",)}, attention_heads=2),
    "no context": UNet2D(**ONE_LEVEL),
    "KL": AutoencoderKL(block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1),
    "VQ": VQModel(block_out_channels=(8, 8, 16), norm_num_groups=4, layers_per_block=1),
}


@pytest.mark.parametrize("module", MODULES.values(), ids=MODULES.keys())
def test_shapes_of_the_parameters(module):
    """Those that another call of the network would make."""
    x = np.zeros((2, 8, 8, module.in_channels), np.float32)
    args, named = (x,), {}
    if isinstance(module, UNet | UNet2D):
        args = (x, np.zeros(2))
    if isinstance(module, UNet):
        args += (np.zeros((2, 3, module.cross_attention_dim)),)
        named["class_labels"] = np.zeros(2, np.int32) if module.num_class_embeds else None
        named["added"] = Added(np.zeros((2, 5)), np.zeros((2, 6))) if module.addition_embed_type else None
        named["timestep_cond"] = np.zeros((2, 6)) if module.time_cond_proj_dim else None
    expected = jax.eval_shape(module.init, jax.random.key(0), *args, **named)["params"]
    assert jax.tree.map(lambda leaf: leaf.shape, abstract_params(module)) == jax.tree.map(
        lambda leaf: leaf.shape, expected
    )


@pytest.mark.parametrize(
    "config, message",
    [
        (SDXL | {"attention_head_dim": [1, 2]}, "attention_heads must be one value or one for each of the 3 levels"),
        (SDXL | {"norm_num_groups": 5}, "multiple of norm_num_groups=5"),
        (SDXL | {"addition_time_embed_dim": None}, "go with addition_embed_type; got None"),
        (CELEBAHQ | {"attention_head_dim": 5}, "attention_head_dim must divide"),
        (KL | {"norm_num_groups": 5}, "multiple of norm_num_groups=5"),
    ],
)
def test_fields_that_do_not_fit_each_other(config, message):
    module = read(config)
    with pytest.raises(InputError, match=message):
        abstract_params(module[0] if isinstance(module, tuple) else module)
