"""experiments/throughput: its networks train and sample, operations are counted, and a worker may fail."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.fashion_mnist import get_config
from experiments.throughput import jax_worker, networks, worker
from experiments.throughput.run import BUDGETS, Measurement, measure, table
from ldm_jax.interop.modules import abstract_params, unet_from_config
from ldm_jax.pipeline.from_config import from_config
from ldm_jax.runtime.operations import count_flops

TINY = networks.MAIN_JOB | {"sample_size": 4, "block_out_channels": (16, 32), "cross_attention_dim": 8}
ADDED = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4, "use_linear_projection": True,
         "projection_class_embeddings_input_dim": networks.POOLED + 4 * networks.TIME_IDS}  # fmt: skip
TINY_NETWORKS = {"text": networks.Network(TINY, 3, 2, 1.5), "SDXL": networks.Network(TINY | ADDED, 3, 2, 1.5)}


@pytest.mark.parametrize("name", TINY_NETWORKS)
def test_a_network_trains_and_samples(name):
    network = TINY_NETWORKS[name]
    model, params = jax_worker.make_model(network, "bfloat16")
    before = jax.device_get(params["denoiser"]["conv_in"]["kernel"])
    train, train_flops = jax_worker.make_train(model, params, 2)
    sample, sample_flops = jax_worker.make_sample(model, params, 2, network)
    assert [np.isfinite(train()["loss"]).all() for _ in range(2)] == [True, True]
    ((z, _),) = sample()
    assert z.shape == (2, 4, 4, 8) and np.isfinite(np.asarray(z)).all()
    np.testing.assert_array_equal(before, params["denoiser"]["conv_in"]["kernel"])
    # A backward pass has twice the operations of the forward pass, less the gradient of its input; sampling calls the
    # network for two conditions a step.
    one_call = sample_flops / (2 * network.steps)
    assert 2.9 * one_call < train_flops < 3.01 * one_call


def test_the_operations_of_stable_diffusion():
    """803 Gflop for a latent of 64 x 64; less 5/9 of the convolutions after upsampling, which see 4 pixels, not 9."""
    network = networks.NETWORKS["SD 1.5"]
    unet = unet_from_config({"_class_name": "UNet2DConditionModel", **network.config})
    z, t, context = (jax.ShapeDtypeStruct(shape, np.float32) for shape in ((1, 64, 64, 4), (1,), (1, 77, 768)))
    apply = jax.make_jaxpr(lambda params, z, t, context: unet.apply({"params": params}, z, t, context=context))
    upsampling = sum(2 * 9 * size**2 * width**2 for size, width in ((16, 1280), (32, 1280), (64, 640)))
    flops = count_flops(apply(abstract_params(unet), z, t, context).jaxpr)
    assert flops == pytest.approx(803e9 - 5 / 9 * upsampling, rel=0.002)


def test_a_row_has_the_median_ratio_within_rounds_and_workers_that_failed():
    row = {
        "measurement": Measurement("train", "SD 1.5", 10, "bfloat16", 1)._asdict(),
        "workers": {
            "ldm_jax": {"seconds": [1.0, 2.0, 4.0], "flops": 3e12, "memory": 2**31, "first_turn": 9.0},
            "torch eager": {"seconds": [1.5, 2.2, 8.0]},
            "torch.compile": {"seconds": [], "error": "it ended with status 1"},
        },
    }
    other = {
        "measurement": Measurement("sample", "SD 1.5", 1, "bfloat16", 1)._asdict(),
        "workers": {"ldm_jax": {"seconds": [], "error": "it ended with status 1"}, "torch eager": {"seconds": [2.0]}},
    }
    lines = table({"the row": row, "other": other}).splitlines()[2:]
    cells = [[cell.strip() for cell in line.removeprefix("|").removesuffix("|").split("|")] for line in lines]
    assert cells == [
        ["the row", "5", "4.55", "failed", "1.50x", "", "1.5", "2.0", "9"],
        ["other", "failed", "0.5", "", "", "", "", "", ""],
    ]


def test_a_worker_that_ends_is_an_error_of_its_row():
    each = Measurement("train", "no such network", 1, "float32", 1)
    row = measure(each, ("eager",), sys.executable, 1)
    assert set(row["workers"]) == {"ldm_jax", "torch eager"}
    assert all("ended with status 1" in worker["error"] for worker in row["workers"].values())


def test_a_worker_that_is_killed_between_two_turns_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "ROOT", tmp_path)
    (tmp_path / "idle.py").write_text("import time\nprint('{}', flush=True)\ntime.sleep(60)\n")
    idle = worker.Worker(sys.executable, "idle", [])
    idle.stop()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="it ended with status -9"):
            idle(1)


def test_the_network_is_that_of_the_main_job():
    unet = unet_from_config({"_class_name": "UNet2DConditionModel", **networks.MAIN_JOB}, dtype=jnp.dtype("float32"))
    assert unet == from_config(get_config(), tuple("0123456789")).denoiser


def test_names_of_measurements_differ():
    names = [each.name for each in BUDGETS["cpu"] + BUDGETS["gpu"]]
    assert len(set(names)) == len(names)
    assert {each.network for each in BUDGETS["gpu"]} == set(networks.NETWORKS)
