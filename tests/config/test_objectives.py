"""The fields of config.diffusion.objective: each bad value, and what does not go together."""

import importlib

import pytest
import tiny

from ldm_jax.config import rules
from ldm_jax.errors import InputError

MEAN_FLOW = {
    "diffusion.objective": "mean_flow",
    "diffusion.schedule": "rectified_flow",
    "diffusion.prediction": "flow",
}
CONSISTENCY = {"diffusion.objective": "consistency", "init_from": "base", "stages": ("diffusion",)}
FIELDS = {"mean_flow": MEAN_FLOW, "consistency": CONSISTENCY, "diffusion": {}}


def config_of(changes):
    config = tiny.get_config().unlock()
    config.update_from_flattened_dict(changes)
    return config.lock()


@pytest.mark.parametrize("objective", FIELDS)
def test_they_are_valid(objective):
    rules.validate(config_of(FIELDS[objective]))


BAD = {  # an objective, its changes -> what the line must say
    "an unknown objective": ("diffusion", {"diffusion.objective": "meanflow"}, "did you mean mean_flow?"),
    "an unknown tangent": ("mean_flow", {"mean_flow.tangent": "data"}, "it must be one of sample, network"),
    "a ratio above 1": ("mean_flow", {"mean_flow.interval_ratio": 1.5}, "it must be from 0.0 to 1.0"),
    "a negative guidance": ("mean_flow", {"mean_flow.guidance": -1.0}, "config.mean_flow.guidance is -1.0"),
    "a kappa of 1": ("mean_flow", {"mean_flow.kappa": 1.0}, "it must be from 0.0 to 0.99"),
    "a large power": ("mean_flow", {"mean_flow.adaptive_power": 3.0}, "it must be from 0.0 to 2.0"),
    "another schedule": (
        "mean_flow",
        {"diffusion.schedule": "cosine"},
        "config.diffusion.schedule is 'cosine'; with config.diffusion.objective=mean_flow it must be 'rectified_flow'",
    ),
    "another prediction": ("mean_flow", {"diffusion.prediction": "z0"}, "it must be 'flow'"),
    "a weighting": ("mean_flow", {"diffusion.weighting": "min_snr"}, "a weight of its own, mean_flow.adaptive_power"),
    "another sampler": ("mean_flow", {"sampling.sampler": "unipc"}, "it must be 'ddim'"),
    "noise": ("mean_flow", {"sampling.eta": 0.5}, "MeanFlow's steps have no noise"),
    "a learned variance": ("mean_flow", {"diffusion.variance": "learned"}, "it must be 'fixed'"),
    "a pretrained model": ("mean_flow", CONSISTENCY | {"diffusion.objective": "mean_flow"}, "trained from scratch"),
    "a transformer": ("mean_flow", {"denoiser": "dit"}, "it must be 'unet': the DiT has no embedding of the interval"),
    "texts": (
        "mean_flow",
        {"stages": ("autoencoder", "clip", "diffusion"), "data.caption_key": "captions"},
        "no MeanFlow",
    ),
    "no model to distill": ("diffusion", {"diffusion.objective": "consistency"}, "needs config.init_from, the model"),
    "scales that fall": ("consistency", {"consistency.guidance_max": 2.0}, "at least config.consistency.guidance_min"),
    "a negative scale": ("consistency", {"consistency.guidance_min": -1.0}, "it must be 0 or more"),
    "a negative highest scale": ("consistency", {"consistency.guidance_max": -1.0}, "it must be 0 or more"),
    "no c": ("consistency", {"consistency.huber_c": 0.0}, "it must be from 1e-06 to 10.0"),
    "min-SNR": ("consistency", {"diffusion.weighting": "min_snr"}, "the pseudo-Huber loss, without a weight"),
    "a token": ("consistency", {"textual_inversion.token": "<a>"}, "consistency distillation trains the denoiser"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_value_is_refused(case):
    objective, changes, words = BAD[case]
    with pytest.raises(InputError) as error:
        rules.validate(config_of(FIELDS[objective] | changes))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_the_recipes_have_their_objectives():
    """And the sampling that goes with them: one step, and four steps of lcm, without guidance."""
    recipes = {
        name: importlib.import_module(f"configs.{name}").get_config() for name in ("fashion_mnist_meanflow", "lcm")
    }
    few = {name: (c.diffusion.objective, c.sampling.sampler, c.sampling.steps) for name, c in recipes.items()}
    assert few == {"fashion_mnist_meanflow": ("mean_flow", "ddim", 1), "lcm": ("consistency", "lcm", 4)}
    assert all(config.sampling.guidance == 1 for config in recipes.values())
