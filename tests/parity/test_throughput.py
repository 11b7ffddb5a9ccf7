"""experiments/throughput in PyTorch: the same networks as ldm_jax's worker, which train and sample."""

import jax
import pytest
import torch

from experiments.throughput import torch_worker
from experiments.throughput.networks import NETWORKS
from ldm_jax.interop.modules import abstract_params, unet_from_config
from tests.experiments.test_throughput import TINY_NETWORKS


@pytest.mark.parametrize("name", NETWORKS)
def test_the_networks_have_as_many_parameters(name):
    with torch.device("meta"):
        unet = torch_worker.UNet2DConditionModel(**NETWORKS[name].config)
    module = unet_from_config({"_class_name": "UNet2DConditionModel", **NETWORKS[name].config})
    count = sum(leaf.size for leaf in jax.tree.leaves(abstract_params(module)))
    assert sum(p.numel() for p in unet.parameters()) == count


@pytest.mark.parametrize("name", TINY_NETWORKS)
@pytest.mark.parametrize("what", ["train", "sample"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_network_trains_and_samples(monkeypatch, name, what, dtype):
    monkeypatch.setattr(torch_worker, "NETWORKS", TINY_NETWORKS)
    work = torch_worker.Work(name, 2, dtype, "eager", what)
    before = [p.detach().clone() for p in work.unet.parameters()]
    getattr(work, what)()
    work.wait()
    changed = any(not torch.equal(old, new) for old, new in zip(before, work.unet.parameters()))
    assert changed == (what == "train")
    assert all(torch.isfinite(p).all() for p in work.unet.parameters())
