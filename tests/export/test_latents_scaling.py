import jax
import numpy as np

from ldm_jax.export.latents_scaling import into_autoencoder
from ldm_jax.models.autoencoder import AutoencoderKL
from ldm_jax.models.first_stage import FirstStage, from_latents, to_latents


def test_the_same_latents_and_images_without_shift_and_scale():
    autoencoder = AutoencoderKL(block_out_channels=(8, 8), latent_channels=3, layers_per_block=1, norm_num_groups=4)
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    params = autoencoder.init(jax.random.key(1), x)["params"]
    params = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(jax.random.key(p.size), p.shape), params)
    scaling = {"shift": np.float32([0.5, -1, 2]), "scale": np.float32([0.3, 1, 4])}
    scaled = {"denoiser": {}, "first_stage": params, **scaling}
    first_stage, folded = FirstStage(autoencoder), into_autoencoder(scaled)
    assert not folded["shift"].any() and (folded["scale"] == 1).all() and folded["denoiser"] == {}
    moments, plain = (first_stage.encode(some["first_stage"], x) for some in (scaled, folded))
    z = to_latents(first_stage.mode(moments), scaled["shift"], scaled["scale"])
    np.testing.assert_allclose(first_stage.mode(plain), z, rtol=1e-4, atol=1e-5)
    keys = jax.random.split(jax.random.key(2), 2)
    sampled = to_latents(first_stage.sample(moments, keys), scaled["shift"], scaled["scale"])
    np.testing.assert_allclose(first_stage.sample(plain, keys), sampled, rtol=1e-4, atol=1e-5)
    before = first_stage.decode(params, from_latents(z, scaled["shift"], scaled["scale"]))
    np.testing.assert_allclose(first_stage.decode(folded["first_stage"], z), before, rtol=1e-4, atol=1e-4)
