"""Batch normalisation folded into Inception's convolutions, and files that are not its weights."""

import hashlib

import jax
import numpy as np
import pytest

from ldm_jax.errors import InputError
from ldm_jax.interop import inception_weights
from ldm_jax.interop.inception_weights import load_inception
from ldm_jax.models.inception import InceptionV3

FIRST = "Conv2d_1a_3x3"


@pytest.fixture
def tensors():
    """Tensors under the published names; only the first layer has values of its own."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(InceptionV3().init, jax.random.key(0), np.zeros((1, 32, 32, 3), np.uint8))["params"]
    made = {"fc.weight": np.zeros((1008, 2048), np.float32)}
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        name = jax.tree_util.keystr(path[:-1], simple=True, separator=".")
        if leaf.ndim == 4:
            kernel = np.ones((), np.float32)
            made[f"{name}.conv.weight"] = np.broadcast_to(kernel, (leaf.shape[3], leaf.shape[2], *leaf.shape[:2]))
            for suffix in ("weight", "bias", "running_mean", "running_var"):
                made[f"{name}.bn.{suffix}"] = np.ones(leaf.shape[3], np.float32)
    for name in made:
        if name.startswith(FIRST):
            made[name] = rng.uniform(0.5, 1.5, made[name].shape).astype(np.float32)
    return made


@pytest.fixture
def load(monkeypatch, tmp_path):
    path = tmp_path / "weights.pth"
    path.write_bytes(b"the file")

    def load(tensors):
        monkeypatch.setattr(inception_weights, "read_weights", lambda _: tensors)
        return load_inception(path)

    return load


def test_folding_is_convolution_then_batch_norm(tensors, load):
    params, digest = load(tensors)
    assert digest == hashlib.sha256(b"the file").hexdigest()
    patch = np.random.default_rng(1).normal(size=(3, 3, 3))  # one position: height, width, channels
    gamma, beta, mean, variance = (
        tensors[f"{FIRST}.bn.{name}"] for name in ("weight", "bias", "running_mean", "running_var")
    )
    response = np.einsum("oihw,hwi->o", tensors[f"{FIRST}.conv.weight"], patch)
    expected = gamma * (response - mean) / np.sqrt(variance + 1e-3) + beta
    got = np.einsum("hwio,hwi->o", params[FIRST]["kernel"], patch) + params[FIRST]["bias"]
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    np.testing.assert_allclose(params["Mixed_7c"]["branch_pool"]["bias"], 1 - 1 / np.sqrt(1.001), rtol=1e-4)


def test_the_tree_is_the_modules(tensors, load):
    params, _ = load(tensors)
    expected = jax.eval_shape(InceptionV3().init, jax.random.key(0), np.zeros((1, 32, 32, 3), np.uint8))["params"]
    assert jax.tree.structure(params) == jax.tree.structure(expected)
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, expected)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(params))


def test_missing_and_misshapen_tensors_are_named(tensors, load, tmp_path):
    name = "Mixed_6c.branch7x7_2.bn.running_var"
    with pytest.raises(InputError, match=f"there is no {name}"):
        load({key: value for key, value in tensors.items() if key != name})
    with pytest.raises(InputError, match=rf"{name} is \(3,\), expected \(160,\)"):
        load(tensors | {name: np.zeros(3)})
    with pytest.raises(InputError, match="there is no Conv2d_1a_3x3"):
        load({"w": np.zeros(2)})


def test_a_missing_file(tmp_path):
    with pytest.raises(InputError, match="there is no file of weights"):
        load_inception(tmp_path / "absent.pth")
