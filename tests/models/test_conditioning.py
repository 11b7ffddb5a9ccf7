"""Conditioning by classes, by texts or by nothing: their tables, and the denoiser's arguments that come of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bpe import LOW_LOWER, make_vocab, write_tokenizer

from ldm_jax.interop.tokenizer import load_tokenizer
from ldm_jax.models.clip import CLIPTextEncoder
from ldm_jax.models.conditioning import (
    ClassConditioning,
    ClassEmbedder,
    EncodedConditioning,
    NoConditioning,
    TextConditioning,
    interpolate,
)


def test_each_label_has_its_tokens():
    embedder = ClassEmbedder(num_classes=3, dim=4, tokens=2)
    table = np.arange(4 * 8, dtype=np.float32).reshape(4, 8)
    params = {"params": {"embedding": {"embedding": table}}}
    out = embedder.apply(params, jnp.array([0, 3]))
    assert np.array_equal(out, [[[0, 1, 2, 3], [4, 5, 6, 7]], [[24, 25, 26, 27], [28, 29, 30, 31]]])


def test_an_unconditional_model_has_the_null_row_alone():
    embedder = ClassEmbedder(num_classes=0, dim=4)
    out, variables = embedder.init_with_output(jax.random.key(0), jnp.zeros(5, jnp.int32))
    assert out.shape == (5, 1, 4)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == 4


def test_a_label_out_of_range_never_passes_for_a_class():
    embedder = ClassEmbedder(num_classes=3, dim=2)
    params = embedder.init(jax.random.key(0), jnp.zeros(1, jnp.int32))
    assert np.isnan(embedder.apply(params, jnp.array([4]))).all()


def test_half_precision():
    out, variables = ClassEmbedder(2, 4, dtype=jnp.bfloat16).init_with_output(jax.random.key(0), jnp.array([1]))
    assert out.dtype == jnp.bfloat16
    assert variables["params"]["embedding"]["embedding"].dtype == jnp.float32


@pytest.mark.parametrize("num_classes, tokens", [(-1, 1), (3, 0)])
def test_bad_sizes(num_classes, tokens):
    with pytest.raises(ValueError, match=f"got {num_classes} and {tokens}"):
        ClassEmbedder(num_classes, 4, tokens).init(jax.random.key(0), jnp.zeros(1, jnp.int32))


def test_the_last_row_of_a_table_of_classes_is_the_null_condition():
    conditioning = ClassConditioning(ClassEmbedder(num_classes=3, dim=4, tokens=2))
    assert conditioning.table().tolist() == [0, 1, 2, 3]
    params = conditioning.init(jax.random.key(0))
    cond = conditioning.encode(params, conditioning.table()[[1, -1]])
    rows = params["embedding"]["embedding"].reshape(4, 2, 4)
    np.testing.assert_array_equal(cond["context"], rows[np.array([1, 3])])


def test_no_conditioning_has_the_null_row_alone():
    conditioning = NoConditioning()
    assert conditioning.table().tolist() == [0]
    assert conditioning.encode(conditioning.init(jax.random.key(0)), conditioning.table()) == {}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """`texts(n, **fields)` -> conditioning by n text encoders, and their parameters."""
    write_tokenizer(folder := tmp_path_factory.mktemp("tokenizer"), LOW_LOWER, length=8)
    tokenizer = load_tokenizer(folder)

    def make(n, **fields):
        encoders = tuple(
            CLIPTextEncoder(
                vocab_size=len(make_vocab(LOW_LOWER)), hidden_size=8, intermediate_size=16, num_hidden_layers=2,
                num_attention_heads=2, max_position_embeddings=8, eos_token_id=2,
                projection_dim=6 if k == n - 1 and "time_ids" in fields else None,
            )
            for k in range(n)
        )  # fmt: skip
        ids = jnp.zeros((1, 8), jnp.int32)
        params = [encoder.init(jax.random.key(k), ids)["params"] for k, encoder in enumerate(encoders)]
        return TextConditioning(encoders, (tokenizer,) * n, **fields), params

    return make


def test_the_context_of_one_text_encoder_is_its_last_layer(texts):
    conditioning, params = texts(1)
    table, truncated = conditioning.table(["low", "lower " * 9], "wool", (16, 24))
    assert truncated == 1
    cond = conditioning.encode(params, table)
    assert cond.keys() == {"context"} and cond["context"].shape == (3, 8, 8)
    last = conditioning.encoders[0].apply({"params": params[0]}, table["ids"][0]).last
    np.testing.assert_array_equal(cond["context"], last)


@pytest.mark.parametrize("zeros", [True, False])
def test_two_text_encoders_are_concatenated_and_conditioned_on_the_size(zeros, texts):
    """Podell 2023, section 2; an absent negative prompt is zeros, or the empty text, as the model has it."""
    conditioning, params = texts(2, force_zeros_for_empty_prompt=zeros, time_ids="target_size")
    assert conditioning.components == ("text_encoder", "text_encoder_2")
    table, _ = conditioning.table(["low"], None, (16, 24))
    cond = conditioning.encode(params, table)
    np.testing.assert_array_equal(cond["added"].time_ids, [[16, 24, 0, 0, 16, 24]] * 2)
    assert cond["context"].shape == (2, 8, 16) and cond["added"].pooled.shape == (2, 6)
    for array in (cond["context"], cond["added"].pooled):
        assert np.asarray(array[0]).any() and np.asarray(array[1]).any() != zeros
    empty, _ = conditioning.table(["low"], "", (16, 24))
    assert np.asarray(conditioning.encode(params, empty)["context"][1]).any()


def test_the_refiner_has_the_second_text_encoder_alone_and_is_conditioned_on_aesthetic_scores(texts):
    """Podell 2023, section 2.5; the negative score goes with the null condition alone."""
    conditioning, params = texts(1, force_zeros_for_empty_prompt=False, time_ids="aesthetic_score")
    assert conditioning.components == ("text_encoder_2",)
    table, _ = conditioning.table(["low", "wool"], None, (16, 24))
    cond = conditioning.encode(params, table)
    np.testing.assert_array_equal(cond["added"].time_ids, [[16, 24, 0, 0, 6]] * 2 + [[16, 24, 0, 0, 2.5]])
    features = conditioning.encoders[0].apply({"params": params[0]}, table["ids"][0])
    np.testing.assert_array_equal(cond["context"], features.penultimate)
    np.testing.assert_array_equal(cond["added"].pooled, features.pooled)


def test_rows_that_are_encoded_already_are_the_arguments(texts):
    conditioning, params = texts(1)
    cond = conditioning.encode(params, conditioning.table(["low"], None, (8, 8))[0])
    assert EncodedConditioning().encode(None, cond) is cond


def test_conditionings_are_equal_by_value(texts):
    """Their tokenizers are no part of what is compiled."""
    (one, _), (other, _) = texts(1), texts(1)
    assert one == other and hash(one) == hash(other) and one != texts(2)[0]
    assert ClassConditioning(ClassEmbedder(3, 4)) == ClassConditioning(ClassEmbedder(3, 4)) != NoConditioning()


def test_interpolation_of_conditions():
    """Linear, from the one to the other; class labels are those of the one."""
    one, other = ({"context": jnp.full((3, 2, 2), v), "class_labels": jnp.full(3, int(v))} for v in (1.0, 3.0))
    between = interpolate(one, other, jnp.array([0.0, 0.25, 1.0]))
    np.testing.assert_allclose(between["context"][:, 0, 0], [1, 1.5, 3])
    assert between["class_labels"].tolist() == [1, 1, 1]
