"""FID's Inception and the reader of PyTorch files against torch-fidelity and torch themselves."""

import importlib.util
import sys
from types import ModuleType

import jax
import ml_dtypes
import numpy as np
import pytest
import torch

from ldm_jax.evaluation.features import inception_features
from ldm_jax.interop.weights import read_weights
from ldm_jax.models.inception import inception_input


@pytest.fixture(scope="module")
def fidelity():
    """The two modules of torch-fidelity that matter, without its __init__, which imports torchvision."""
    spec = importlib.util.find_spec("torch_fidelity")
    assert spec, "torch-fidelity is missing; `make parity` installs it"
    package = ModuleType("torch_fidelity")
    package.__path__ = list(spec.submodule_search_locations)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torch_fidelity", package)
        names = ("feature_extractor_inceptionv3", "interpolate_compat_tensorflow")
        return [importlib.import_module(f"torch_fidelity.{name}") for name in names]


@pytest.fixture(scope="module")
def oracle(fidelity, tmp_path_factory):
    """torch-fidelity's extractor with random weights, and the file they are in."""
    extractor, _ = fidelity
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extractor, "load_state_dict_from_url", lambda *_, **__: None)
        patch.setattr(extractor.FeatureExtractorInceptionV3, "load_state_dict", lambda self, _: None)
        model = extractor.FeatureExtractorInceptionV3("inception", ["2048"])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Conv2d):
                scale = (2 / module.weight[0].numel()) ** 0.5
                module.weight.copy_(torch.randn(module.weight.shape, generator=generator) * scale)
            elif isinstance(module, torch.nn.BatchNorm2d):
                for tensor, low, high in (
                    (module.weight, 0.8, 1.2),
                    (module.bias, -0.1, 0.1),
                    (module.running_mean, -0.1, 0.1),
                    (module.running_var, 0.5, 1.5),
                ):
                    tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)
    path = tmp_path_factory.mktemp("inception") / "weights-inception.pth"
    torch.save(model.state_dict(), path)
    return model, path


def images(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def to_torch(x):
    return torch.from_numpy(np.ascontiguousarray(np.broadcast_to(x, (*x.shape[:3], 3)).transpose(0, 3, 1, 2)))


@pytest.mark.parametrize("shape", [(1, 28, 28, 1), (1, 64, 48, 3), (1, 299, 299, 3), (1, 400, 320, 3)])
def test_the_input_is_torch_fidelitys(fidelity, shape):
    x = images(*shape)
    resized = fidelity[1].interpolate_bilinear_2d_like_tensorflow1x(
        to_torch(x).float(), size=(299, 299), align_corners=False
    )
    expected = ((resized - 128) / 128).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(jax.jit(inception_input)(x), expected, atol=2e-5)


def test_features_are_torch_fidelitys(oracle):
    model, path = oracle
    x = images(2, 40, 40, 3)
    with torch.no_grad():
        expected = model(to_torch(x))[0].numpy()
    features = inception_features(path, batch_size=2)(x)
    assert features.shape == (2, 2048) and np.abs(expected).max() > 0.1
    np.testing.assert_allclose(features, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("zipped", [True, False])
def test_files_that_torch_writes(tmp_path, zipped):
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    tensors = {
        "plain": base,
        "transposed": base.T,
        "row": base[2],
        "strided": base[::2, 1::3],
        "scalar": torch.tensor(3, dtype=torch.int64),
        "empty": torch.zeros(0, 3),
        "half": base.half(),
        "bfloat16": base.bfloat16(),
        "double": base.double(),
        "bool": base > 3,
        "parameter": torch.nn.Parameter(base + 1),
    }
    path = tmp_path / "weights.pth"
    torch.save({"state_dict": tensors, "epoch": 3}, path, _use_new_zipfile_serialization=zipped)
    got = read_weights(path)
    assert list(got) == list(tensors)
    for name, tensor in tensors.items():
        is_bfloat16 = name == "bfloat16"
        expected = tensor.detach().float().numpy() if is_bfloat16 else tensor.detach().numpy()
        assert got[name].dtype == (ml_dtypes.bfloat16 if is_bfloat16 else expected.dtype)
        np.testing.assert_array_equal(got[name], expected)
