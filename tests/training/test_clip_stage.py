"""CLIP's step: what it learns, what each example is paired with, and that devices and bad numbers change nothing."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from ml_collections import ConfigDict

from ldm_jax.evaluation.retrieval import retrieval
from ldm_jax.models.pixels import to_pixels
from ldm_jax.pipeline.from_config import build_clip
from ldm_jax.runtime.parallel import parallel_step, replicate, shard
from ldm_jax.training.contrastive import caption_arrays
from ldm_jax.training.from_config import make_clip_stage
from ldm_jax.training.loop import first_nonfinite
from ldm_jax.training.validation import make_validation

FIELDS = {
    "projection_dim": 8, "text_width": 16, "text_layers": 1, "text_heads": 2, "image_width": 16, "image_layers": 1,
    "image_heads": 2, "patch_size": 4, "max_shift": 0, "max_zoom": 0.0, "steps": 150, "learning_rate": 1e-2,
    "optimizer": "adamw", "warmup_steps": 0, "decay": "constant", "adam_b2": 0.99, "weight_decay": 0.0,
    "clip_norm": 1.0, "ema_decay": 0.9,
}  # fmt: skip


def build(**changes):
    config = tiny.get_config().unlock()
    config.clip = ConfigDict(FIELDS | changes)
    clip = build_clip(config, vocab_size=30, max_length=6, eos_token_id=29)
    return clip, make_clip_stage(clip, config)


def captions():
    """Ten classes with two captions each: those of class c have token c, the second also 10 + c; those of class 9
    are class 8's."""
    ids = np.full((10, 2, 6), 29)
    ids[:, :, 0] = 28
    ids[:, :, 1] = np.arange(10)[:, None]
    ids[:, 1, 2] = 10 + np.arange(10)
    ids[9] = ids[8]
    return ids


TEXTS = {"texts": caption_arrays(captions())}
IMAGES = np.random.default_rng(0).integers(0, 256, (16, 8, 8, 1)).astype(np.uint8)
LABELS = np.array([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4, 5], np.int32)  # some classes twice


def batch(n=16, step=0):
    return {"x": IMAGES[:n], "label": LABELS[:n], "id": np.arange(n, dtype=np.int32), "step": np.int32(step)}


@pytest.fixture(scope="module")
def compiled():
    """A stage with its first state and its compiled step."""
    clip, stage = build()
    init = jax.jit(stage.init)
    return SimpleNamespace(clip=clip, stage=stage, state=init(jax.random.key(0)), step=jax.jit(stage.step))


def test_it_learns_to_retrieve_the_images_of_one_batch(compiled):
    """Texts retrieve their images and images their texts, though images share classes, and classes captions."""
    state, losses = compiled.state, []
    for number in range(150):
        state, metrics = compiled.step(state, TEXTS, batch(step=number), np.uint32(0))
        losses.append(float(metrics["loss"]))
    assert np.isfinite(losses).all()
    assert 1 / 0.07 < metrics["scale"] <= 100.001
    assert metrics["text_accuracy"] == metrics["image_accuracy"] == 1.0
    embed = jax.jit(lambda params, ids, x: compiled.clip.apply({"params": params}, ids, x)[:2])
    text, image = map(np.asarray, embed(state.params, captions().reshape(20, 6), to_pixels(IMAGES)))
    own = np.minimum(LABELS, 8)  # classes 8 and 9 are the same in words
    true = np.minimum(np.repeat(np.arange(10), 2), 8)[:, None] == own
    scores = retrieval(text, image, true)
    assert scores == dict.fromkeys(scores, 1.0) and len(scores) == 6
    # The best loss there can be is the entropy of the targets: two of 16 texts, or two images, are true of 14.
    assert np.mean(losses[-5:]) < np.log(2) * 14 / 16 + 0.15


def augmentation(stage, state):
    """A function (batch, seed) -> the images and texts of a step."""
    seen = jax.jit(lambda *arguments: {name: stage.trace(*arguments)[name] for name in ("x", "ids")})
    return lambda batch, seed=0: jax.device_get(seen(state, TEXTS, batch, np.uint32(seed)))


def test_one_of_its_captions_is_sampled_for_each_example(compiled):
    """Each of the two comes up about as often; which one is a matter of the example, not of its place in the batch."""
    sample = augmentation(compiled.stage, compiled.state)
    many = {"x": np.repeat(IMAGES[:1], 400, 0), "label": np.full(400, 3), "id": np.arange(400), "step": np.int32(0)}
    seen = sample(many)
    second = (seen["ids"] == captions()[3, 1]).all(1)
    assert ((seen["ids"] == captions()[3, 0]).all(1) | second).all()
    assert abs(second.mean() - 0.5) < 4 * 0.5 / 20
    np.testing.assert_allclose(seen["x"], to_pixels(many["x"]), atol=1e-6)
    assert np.array_equal(sample(many | {"id": np.arange(400)[::-1]})["ids"], seen["ids"][::-1])
    later, other = sample(many | {"step": np.int32(1)})["ids"], sample(many, seed=1)["ids"]
    assert (later != seen["ids"]).any() and (other != seen["ids"]).any()


def test_images_are_augmented_if_asked(compiled):
    """Mirrored alone, half of them; moved and zoomed, hardly any is as it was."""
    x = np.asarray(to_pixels(IMAGES))
    with_flips = tiny.get_config().unlock()
    with_flips.data.flip = True
    with_flips.clip = ConfigDict(FIELDS)
    flipped = augmentation(make_clip_stage(compiled.clip, with_flips), compiled.state)(batch())["x"]
    same, mirrored = ((np.abs(flipped - y) < 1e-6).all((1, 2, 3)) for y in (x, x[:, :, ::-1]))
    assert (same ^ mirrored).all() and 2 < same.sum() < 14
    moved = augmentation(build(max_shift=2, max_zoom=0.2)[1], compiled.state)(batch())["x"]
    assert ((np.abs(moved - x) > 1e-3).any((1, 2, 3))).sum() >= 14
    assert np.abs(moved).max() <= 1.0001


def test_four_devices_take_the_same_step_as_one(compiled, four_devices):
    """Images of one class fall on different devices."""
    one, many = compiled.state, replicate(jax.device_get(compiled.state))  # a copy: it is donated
    step_many = parallel_step(compiled.stage)
    assert jax.local_device_count() == 4
    arrays = {name: value for name, value in batch().items() if name != "step"}
    for number in range(3):
        one, metrics_one = compiled.step(one, TEXTS, batch(step=number), np.uint32(5))
        many, metrics_many = step_many(many, TEXTS, {}, shard(arrays), np.int32(number), np.uint32(5))
        for name in metrics_one:
            np.testing.assert_allclose(metrics_one[name], metrics_many[name], rtol=2e-3, atol=1e-5, err_msg=name)
    assert int(many.step) == 3
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=2e-3), one.params, many.params)


def test_the_scale_is_bounded_and_the_average_follows(compiled):
    """From a scale of 100 on, the step takes it no higher, however far apart the embeddings lie."""
    top = compiled.state.params | {"logit_scale": jnp.float32(np.log(100))}
    state = compiled.state.replace(params=top, ema_params=top)
    after, _ = compiled.step(state, TEXTS, batch(), np.uint32(0))
    assert after.params["logit_scale"] <= np.log(100) * (1 + 1e-6)
    rate = 1 / 10  # (1 + n) / (10 + n) at n = 0
    expected = jax.tree.map(lambda e, p: rate * e + (1 - rate) * p, state.ema_params, after.params)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), after.ema_params, expected)


def test_a_step_that_is_not_finite_freezes_the_state(compiled):
    broken = jax.tree.map(lambda a: a, compiled.state)  # new dicts around the same arrays
    broken.params["image"]["pre_layrnorm"]["bias"] *= np.nan
    frozen, metrics = compiled.step(broken, TEXTS, batch(), np.uint32(0))
    assert not np.isfinite(metrics["loss"])
    jax.tree.map(np.testing.assert_array_equal, frozen, broken)
    # A good batch, but not the one the state waits for.
    later, _ = compiled.step(compiled.state, TEXTS, batch(step=2), np.uint32(0))
    jax.tree.map(np.testing.assert_array_equal, later, compiled.state)
    seen = traced(compiled.stage, broken)
    assert list(seen) == ["params", "x", "ids", "text", "image", "loss", "gradient"]
    assert first_nonfinite(seen) == "params/image/pre_layrnorm/bias"
    del seen["params"]
    assert first_nonfinite(seen).startswith("image/")


def traced(stage, state):
    """`stage.trace` compiled, which loses the order of its dict, in that order."""
    order = []

    def trace(*arguments):
        seen = stage.trace(*arguments)
        order.extend(seen)
        return seen

    seen = jax.jit(trace)(state, TEXTS, batch(), np.uint32(0))
    return {name: seen[name] for name in order}


class Held:
    """A data set of sixteen held-out examples."""

    def __len__(self):
        return 16

    def __getitem__(self, rows):
        return {"x": IMAGES[rows], "label": LABELS[rows]}


def test_validation_is_that_of_whole_batches_over_all_devices(compiled, four_devices):
    """Two batches of eight on four devices, against one device; without augmentation whatever the stage does."""
    _, stage = build(max_shift=2)
    validate = make_validation(stage, Held(), num=100, batch_size=8)
    got = validate(replicate(compiled.state.params), TEXTS, 0)
    expected, alone = [], jax.jit(compiled.stage.validate)
    for rows in (np.arange(0, 16, 2), np.arange(1, 16, 2)):
        held = Held()[rows] | {"id": rows.astype(np.int32)}
        expected.append(alone(compiled.state.params, TEXTS, held, np.uint32(0)))
    assert got.keys() == {"validation_loss", "validation_text_accuracy", "validation_image_accuracy"}
    for name in expected[0]:
        np.testing.assert_allclose(got[f"validation_{name}"], np.mean([e[name] for e in expected]), rtol=1e-4)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"max_shift": -1}, r"max_shift must be 0 or more and max_zoom in \[0, 1\); got -1 and 0.0"),
        ({"max_zoom": 1.0}, r"max_zoom in \[0, 1\); got 0 and 1.0"),
        ({"text_heads": 3}, "num_attention_heads must divide hidden_size; got 3 for 16"),
        ({"patch_size": 3}, "patch_size must divide image_size; got 3 for 8"),
        ({"projection_dim": 0}, "projection_dim must be 1 or more; got 0"),
    ],
)
def test_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        build(**changes)


def test_stages_are_equal_and_hashed_by_value(compiled):
    _, same = build()
    assert same is not compiled.stage and same == compiled.stage and hash(same) == hash(compiled.stage)
    assert parallel_step(same) is parallel_step(compiled.stage)
    for field, value in {"max_shift": 1, "learning_rate": 0.5, "text_width": 32}.items():
        assert build(**{field: value})[1] != compiled.stage, field
