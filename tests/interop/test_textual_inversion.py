"""Textual inversion files: their layouts, the tokens and rows that they add, and what is refused."""

from dataclasses import replace

import ldm_files
import numpy as np
import pytest
import random_runs
from safetensors.numpy import save_file

from ldm_jax.errors import InputError
from ldm_jax.interop.textual_inversion import Embedding, read_embedding, write_embedding
from ldm_jax.pipeline.load import load
from ldm_jax.pipeline.textual_inversion import with_embedding
from ldm_jax.pipeline.trainable import token_table, with_token_table

RNG = np.random.default_rng(0)
VECTORS = RNG.normal(size=(3, 64)).astype(np.float32)


def written(folder, state, name="toy.safetensors"):
    save_file(state, folder / name)
    return folder / name


LAYOUTS = {  # tensors -> token, numbers of vectors
    "diffusers": ({"<toy>": VECTORS[0]}, "<toy>", [1]),
    "several vectors": ({"<toy>": VECTORS}, "<toy>", [3]),
    "of UIs": ({"emb_params": VECTORS}, "toy", [3]),
    "of SDXL": ({"clip_l": VECTORS, "clip_g": VECTORS}, "toy", [3, 3]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, tmp_path):
    state, token, counts = LAYOUTS[layout]
    found = read_embedding(written(tmp_path, state))
    assert (found.token, [len(vectors) for vectors in found.vectors]) == (token, counts)
    for vectors in found.vectors:
        np.testing.assert_array_equal(vectors, VECTORS[: len(vectors)])


@pytest.mark.parametrize("vectors", [(VECTORS,), (VECTORS[:1],), (VECTORS, VECTORS[:, :5].copy())])
def test_what_is_written_is_read(vectors, tmp_path):
    """The token too, of SDXL by the metadata."""
    write_embedding(tmp_path / "learned_embeds.safetensors", Embedding("<toy>", vectors))
    found = read_embedding(tmp_path / "learned_embeds.safetensors")
    assert found.token == "<toy>"
    for one, other in zip(found.vectors, vectors, strict=True):
        np.testing.assert_array_equal(one, other)


REFUSED = {
    "two tensors": ({"a": VECTORS, "b": VECTORS}, "has a, b; a textual inversion file has one tensor"),
    "nan": ({"a": VECTORS * np.nan}, "has values that are not finite"),
    "three axes": ({"a": VECTORS[None]}, r"these are \[1, 3, 64\]"),
    "other numbers": ({"clip_l": VECTORS, "clip_g": VECTORS[:2]}, r"these are \[3, 64\] and \[2, 64\]"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, tmp_path):
    state, words = REFUSED[case]
    with pytest.raises(InputError, match=words):
        read_embedding(written(tmp_path, state))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load(ldm_files.write_folder(tmp_path_factory.mktemp("model") / "folder", "Stable Diffusion 1"))


def padded(model, params, rows):
    """The model with so many further rows of zeros in its table, of no token, as some models have; or fewer rows."""
    (encoder,), (tree,) = model.conditioning.encoders, params["conditioning"]
    table = np.pad(token_table(tree), ((0, max(rows, 0)), (0, 0)))[: rows if rows < 0 else None]
    encoders = (encoder.clone(vocab_size=len(table)),)
    model = replace(model, conditioning=replace(model.conditioning, encoders=encoders))
    return model, params | {"conditioning": [with_token_table(tree, table)]}


@pytest.mark.parametrize("rows", [0, 2, 9])
def test_a_prompt_with_the_token_has_its_vectors(rows, model, tmp_path):
    (before, params), path = model, written(tmp_path, {"<toy>": VECTORS})
    after, changed, token = with_embedding(*padded(before, params, rows), path)
    size = before.conditioning.encoders[0].vocab_size
    assert token == "<toy>" and after.conditioning.encoders[0].vocab_size == size + 3
    table = changed["conditioning"][0]["embeddings"]["token_embedding"]["embedding"]
    np.testing.assert_array_equal(table[size:], VECTORS)
    np.testing.assert_array_equal(table[:size], params["conditioning"][0]["embeddings"]["token_embedding"]["embedding"])
    ids, plain = (m.conditioning.tokenizers[0](["low <toy> low", "low low"]).ids for m in (after, before))
    first = ids[0].tolist()
    place = first.index(size)
    assert first[place : place + 3] == [size, size + 1, size + 2]
    np.testing.assert_array_equal(ids[1], plain[1])  # without the token nothing changes
    assert before.conditioning.tokenizers[0].vocab_size == size
    with pytest.raises(InputError, match="the vocabulary has a token '<toy>' already"):
        with_embedding(after, changed, path)


def test_other_models(model, tmp_path):
    with pytest.raises(InputError, match=r"its vectors have \[5\] channels; its text encoders \[64\]"):
        with_embedding(*model, written(tmp_path, {"a": VECTORS[:, :5].copy()}))
    with pytest.raises(InputError, match="is for text-to-image models; this one has no text encoder"):
        with_embedding(*random_runs.random_model(), written(tmp_path, {"a": VECTORS}))
    with pytest.raises(InputError, match="does not exist"):
        with_embedding(*model, tmp_path / "gone.pt")
    with pytest.raises(InputError, match=r"the text encoder has vectors of 515 tokens, its tokenizer 517"):
        with_embedding(*padded(*model, -2), written(tmp_path, {"<toy>": VECTORS}))
