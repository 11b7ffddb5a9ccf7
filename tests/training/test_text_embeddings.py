"""The conditions that a model is trained on: text embeddings from the cache, or the inputs of encoders that are trained
too."""

from dataclasses import replace
from functools import partial

import diffusers_folder
import jax
import numpy as np
import pytest
from finetuning import CAPTIONS

from configs import finetune as finetune_config
from ldm_jax.errors import InputError
from ldm_jax.models.conditioning import ClassConditioning, ClassEmbedder, EncodedConditioning, NoConditioning
from ldm_jax.pipeline.from_config import identity_scale
from ldm_jax.pipeline.load import load
from ldm_jax.pipeline.trainable import LoRA, Parts
from ldm_jax.training.from_config import make_diffusion_stage
from ldm_jax.training.text_embeddings import check_memory, freeze, index_captions

ONE_EACH = [(text,) for text in CAPTIONS]
DENOISER, WITH_TEXT = Parts(("denoiser",)), Parts(("denoiser", "conditioning"))


@pytest.fixture(scope="module")
def config():
    config = finetune_config.get_config().unlock()
    config.evaluation.batch_size = 8
    return config.lock()


@pytest.fixture(scope="module")
def text_model(tmp_path_factory):
    return load(diffusers_folder.write_stable_diffusion(tmp_path_factory.mktemp("text") / "model"))


def caption_files(cache):
    return sorted(cache.glob("*.texts.npz"))


def test_each_caption_is_encoded_once_and_cached(text_model, config, tmp_path):
    """A row each, the last of the null condition; the second time from the cache."""
    model, params = text_model
    trained_model, frozen = freeze(model, params, DENOISER, ONE_EACH, config, tmp_path)
    assert trained_model == replace(model, conditioning=EncodedConditioning()) != model
    assert sorted(frozen) == ["first_stage", "scale", "shift", "table"]
    table, _ = model.conditioning.table(CAPTIONS, None, model.image_shape[:2])
    expected = jax.jit(model.conditioning.encode)(params["conditioning"], table)["context"]
    assert frozen["table"].keys() == {"context"} and frozen["table"]["context"].shape == (5, 8, 16)
    assert frozen["table"]["context"].dtype == np.float32
    np.testing.assert_allclose(frozen["table"]["context"], expected, atol=1e-5)
    (cached,) = caption_files(tmp_path)
    written = cached.stat().st_mtime_ns
    _, again = freeze(model, params, DENOISER, ONE_EACH, config, tmp_path)
    np.testing.assert_array_equal(again["table"]["context"], frozen["table"]["context"])
    assert cached.stat().st_mtime_ns == written
    other = params | {"conditioning": jax.tree.map(lambda p: p + np.float32(0.1), params["conditioning"])}
    freeze(model, other, DENOISER, ONE_EACH, config, tmp_path)
    freeze(model, params, DENOISER, ONE_EACH[:3], config, tmp_path)
    assert len(caption_files(tmp_path)) == 3


@pytest.mark.parametrize("trainable", [DENOISER, WITH_TEXT, LoRA(2, 4.0)])
def test_the_model_s_own_parameters_stay_whole(trainable, text_model, config, tmp_path):
    """Which training is sampled with, too."""
    model, params = text_model
    before = dict(params)
    _, frozen = freeze(model, params, trainable, ONE_EACH, config, tmp_path)
    assert params.keys() == before.keys() and all(params[name] is before[name] for name in before)
    assert "conditioning" not in frozen


def test_captions_are_indexed_by_their_class():
    """Each text once, whatever the number of classes that have it; where there are fewer they are repeated."""
    texts, rows = index_captions([("a", "b", "c"), ("b",), ("d", "a")])
    assert texts == ("a", "b", "c", "d")
    np.testing.assert_array_equal(rows, [[0, 1, 2], [1, 1, 1], [3, 0, 3]])
    assert rows.dtype == np.int32


def test_several_captions_of_a_class_are_rows_of_the_table(text_model, config, tmp_path):
    captions = [("low", "wool"), ("low",)]
    _, frozen = freeze(*text_model, DENOISER, captions, config, tmp_path)
    assert frozen["table"]["context"].shape == (3, 8, 16)
    np.testing.assert_array_equal(frozen["captions"], [[0, 1], [0, 0]])


@pytest.mark.slow
def test_text_encoders_that_are_trained_too_take_the_captions_in_the_step(text_model, config, tmp_path):
    """The same conditions and loss as with the embeddings, of which a gradient goes into the encoders."""
    (model, params), results = text_model, []
    moments, index = np.random.default_rng(0).normal(size=(8, 1, 8, 8, 8)), np.arange(8, dtype=np.int32)
    batch = {"moments": moments.astype(np.float32), "label": index % 4, "id": index, "step": np.int32(0)}
    for trainable in (DENOISER, WITH_TEXT):
        trained_model, frozen = freeze(model, params, trainable, ONE_EACH, config, tmp_path)
        with_dropout = config.copy_and_resolve_references().unlock()
        with_dropout.diffusion.label_dropout = 0.3
        stage = make_diffusion_stage(trained_model, trainable, with_dropout)
        state = stage.init(jax.random.key(0), params)
        seen = jax.jit(stage.trace)(state, frozen, batch, np.uint32(0))
        results.append({name: seen[name] for name in ("context", "loss")} | {"of": seen["gradient"]["denoiser"]})
    assert trained_model == model and sorted(frozen["table"]) == ["ids", "time_ids", "zeros"]
    assert sorted(state.params) == ["conditioning", "denoiser"] and "conditioning" not in frozen
    assert len(caption_files(tmp_path)) == 1  # of the embeddings alone
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), *results)
    assert max(np.abs(g).max() for g in jax.tree.leaves(seen["gradient"]["conditioning"])) > 1e-4


def test_two_text_encoders_have_zeros_for_the_null_condition(config, tmp_path):
    """Pooled text and sizes go through the cache as well."""
    model, params = load(diffusers_folder.write_stable_diffusion(tmp_path / "model", xl=True))
    _, frozen = freeze(model, params, LoRA(2, 4.0), ONE_EACH[:2], config, tmp_path)
    assert sorted(frozen) == ["denoiser", "first_stage", "scale", "shift", "table"]
    context, (pooled, sizes) = frozen["table"]["context"], frozen["table"]["added"]
    assert (context.shape, pooled.shape) == ((3, 8, 32), (3, 12))
    assert not context[-1].any() and not pooled[-1].any()
    assert context[:2].any(axis=(1, 2)).all() and pooled[:2].any(axis=1).all()
    np.testing.assert_array_equal(sizes, np.tile([16, 16, 0, 0, 16, 16], (3, 1)))


def test_what_is_too_long_for_the_context_is_said(text_model, config, tmp_path, capsys):
    freeze(*text_model, DENOISER, [*ONE_EACH, ("low " * 8,)], config, tmp_path)
    assert "1 of the 5 captions are longer than the text encoder's context" in capsys.readouterr().out


@pytest.mark.parametrize("conditioning", [ClassConditioning(ClassEmbedder(3, 16)), NoConditioning()])
def test_other_conditions_need_no_captions(conditioning, text_model, config, tmp_path):
    model = replace(text_model[0], conditioning=conditioning)
    params = {"denoiser": {}, "conditioning": {}, "first_stage": {}} | identity_scale(4)
    same, frozen = freeze(model, params, DENOISER, (), config, tmp_path)
    assert same == model and sorted(frozen) == ["conditioning", "first_stage", "scale", "shift", "table"]
    np.testing.assert_array_equal(frozen["table"], conditioning.table())
    assert not caption_files(tmp_path)
    check_memory(model, params, (), config)


def test_embeddings_beyond_the_memory_are_refused(text_model, config):
    """4 bytes for each of the 8 x 16 features of four captions and the null condition."""
    small, size = config.copy_and_resolve_references().unlock(), 4 * 8 * 16 * 5 / 2**30
    small.data.memory_limit_gb = 1.01 * size
    check_memory(*text_model, ONE_EACH, small)
    small.data.memory_limit_gb = 0.99 * size
    with pytest.raises(InputError, match=r"the text embeddings of 4 captions take .* GB, more than"):
        check_memory(*text_model, ONE_EACH, small)
