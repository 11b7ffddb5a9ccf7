"""Cards: what is on them, that unlike ones are refused, that the cache is right and repairs itself."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.errors import InputError
from ldm_jax.evaluation import cards
from ldm_jax.evaluation.cards import evaluate_images, evaluate_reconstructions
from ldm_jax.evaluation.features import FeatureExtractor, PerceptualDistance, sha256_of_images
from ldm_jax.evaluation.metrics import frechet_distance, kernel_distance, precision_recall, psnr, ssim


class Counting:
    """A feature space one can compute by hand: the mean of each quarter of the image. Counts the images it sees."""

    seen = 0

    def __call__(self, params, images):
        self.seen += len(images)
        n, height, width, _ = images.shape
        quarters = images.reshape(n, 2, height // 2, 2, width // 2, -1).astype(np.float32)
        return jnp.asarray(quarters.mean(axis=(2, 4, 5)).reshape(n, 4) / 255 * params)


def extractor(name="VGG16", **changes):
    fields = {"layer": "quarters", "resize": 32, "weights_sha256": "ab" * 32, "params": 1.0, "batch_size": 1}
    return FeatureExtractor(name=name, apply=Counting(), **(fields | changes))


def images(n, seed=0, shift=0, side=12):
    return np.random.default_rng(seed).integers(0, 200, (n, side, side, 1), dtype=np.uint8) + np.uint8(shift)


def quarters(x):
    return np.asarray(Counting()(1.0, x))


def test_cards_say_all_there_is_to_know():
    generated, reference, train = images(20, 1, shift=10), images(30, 2), images(50, 3)
    space = extractor()
    got = evaluate_images(
        generated, reference, extractor=space, train=train, reconstructions=reference[:25], reference_split="validation"
    )
    assert list(got) == ["FD-VGG16", "KID-VGG16", "precision-VGG16", "recall-VGG16"]
    assert json.loads(json.dumps(got)) == got
    card = got["FD-VGG16"]
    assert card["value"] == pytest.approx(frechet_distance(quarters(generated), quarters(reference)))
    assert card["autoencoder"] == pytest.approx(frechet_distance(quarters(reference[:25]), quarters(reference)))
    assert 0 < card["floor"] < card["value"]
    assert (card["n"], card["reference_n"], card["floor_n"], card["autoencoder_n"]) == (20, 30, 20, 25)
    assert (card["reference"], card["resize"], card["weights_sha256"]) == ("validation", 32, "ab" * 32)
    assert card["reference_sha256"] == sha256_of_images(reference)
    assert card["better"] == "lower" and card["std"] is None
    kid = got["KID-VGG16"]
    expected = kernel_distance(quarters(generated), quarters(reference), subset_size=1000)
    assert (kid["value"], kid["std"]) == pytest.approx(expected)
    assert kid["method"] == "kernel distance, mean of 100 subsets of 20; VGG16, quarters"
    precision, recall = precision_recall(quarters(generated), quarters(reference))
    assert (got["precision-VGG16"]["value"], got["recall-VGG16"]["value"]) == pytest.approx((precision, recall))
    assert got["recall-VGG16"]["better"] == "higher"
    assert got["precision-VGG16"]["autoencoder"] == 1.0


def test_floor_and_autoencoder_may_be_left_out_and_small_training_sets_are_used_whole():
    generated, reference = images(20, 1), images(30, 2)
    bare = evaluate_images(generated, reference, extractor=extractor())["FD-VGG16"]
    assert bare["floor"] is bare["floor_n"] is bare["autoencoder"] is bare["autoencoder_n"] is None
    small = evaluate_images(generated, reference, extractor=extractor(), train=images(8, 3))["FD-VGG16"]
    assert small["floor_n"] == 8


def test_only_inception_scores_are_called_fid():
    got = evaluate_images(images(8, 1), images(9, 2), extractor=extractor("Inception"))
    assert list(got) == ["FID", "KID", "precision-Inception", "recall-Inception"]


def test_reference_and_floor_features_are_cached_by_content(tmp_path):
    generated, reference, train = images(5, 1), images(6, 2), images(9, 3)
    cache = tmp_path / "features"

    def run(reference=reference, train=train, **changes):
        space = extractor(**changes)
        scores = evaluate_images(generated, reference, extractor=space, train=train, cache=cache)
        return space.apply.seen, scores["FD-VGG16"]["value"]

    first = run()
    assert first[0] == 5 + 6 + 5
    assert run() == (5, first[1])
    assert len(list(cache.iterdir())) == 2
    assert run(reference=reference + np.uint8(1))[0] == 5 + 6
    assert run(weights_sha256="cd" * 32)[0] == run(resize=64)[0] == run(layer="other")[0] == 16
    for path in cache.iterdir():  # cut short, emptied or foreign: made anew
        path.write_bytes(path.read_bytes()[:100])
    assert run() == first
    for path in cache.iterdir():
        path.write_bytes(b"")
    assert run() == first
    for path in cache.iterdir():
        np.save(path, np.zeros((3, 4)))
    assert run() == first


def test_reconstruction_cards(tmp_path):
    originals = images(6, 1)
    decoded = originals.copy()
    decoded[:, 3:6] += np.uint8(20)
    lpips = PerceptualDistance(
        name="LPIPS-vgg16",
        resize=None,
        min_size=1,
        weights_sha256="ef" * 32,
        params=2.0,
        apply=lambda scale, x, y: jnp.abs(x.astype(jnp.float32) - y).mean(axis=(1, 2, 3)) * scale,
        batch_size=4,
    )
    space = extractor()
    got = evaluate_reconstructions(originals, decoded, extractor=space, lpips=lpips, split="validation", cache=tmp_path)
    assert list(got) == ["rFD-VGG16", "PSNR", "SSIM", "LPIPS-vgg16"]
    assert got["rFD-VGG16"]["value"] == pytest.approx(frechet_distance(quarters(decoded), quarters(originals)))
    assert got["PSNR"]["value"] == pytest.approx(psnr(originals, decoded).mean())
    assert got["SSIM"]["value"] == pytest.approx(ssim(originals, decoded).mean())
    assert got["LPIPS-vgg16"]["value"] == pytest.approx(2 * 20 * 3 / 12)
    assert got["LPIPS-vgg16"]["weights_sha256"] == "ef" * 32
    assert {card["reference"] for card in got.values()} == {"validation"}
    assert {card["n"] for card in got.values()} == {6}
    assert len(list(tmp_path.iterdir())) == 1


def test_reconstructions_are_looked_at_once_for_both_kinds_of_card():
    originals, decoded, space = images(6, 1), images(6, 2), extractor()
    first = evaluate_images(images(5, 3), originals, extractor=space, reconstructions=decoded)
    assert space.apply.seen == 5 + 6 + 6
    second = evaluate_reconstructions(originals, decoded, extractor=space)
    assert space.apply.seen == 5 + 6 + 6 + 6
    assert second["rFD-VGG16"]["value"] == first["FD-VGG16"]["autoencoder"]


def test_equal_images_count_as_100_dB_and_tiny_ones_have_no_ssim():
    tiny = images(4, side=8)
    got = evaluate_reconstructions(tiny, tiny, extractor=extractor())
    assert list(got) == ["rFD-VGG16", "PSNR"]
    assert got["PSNR"]["value"] == cards.PSNR_CAP
    assert got["rFD-VGG16"]["value"] == pytest.approx(0, abs=1e-7)


def test_bad_arrays_get_one_line():
    good = images(8)
    cases = [
        (lambda: evaluate_images(good.astype(float), good, extractor=extractor()), "the generated images must be"),
        (lambda: evaluate_images(good, good[0], extractor=extractor()), "the reference images must be"),
        (lambda: evaluate_images(good[:3], good, extractor=extractor()), "at least 4 generated images, got 3"),
        (lambda: evaluate_images(good, good, extractor=extractor(), train=good[:1]), "4 training images, got 1"),
        (lambda: evaluate_images(good, good, extractor=extractor(), reconstructions=good[:1]), "4 decoded images"),
        (lambda: evaluate_reconstructions(good, good[:4], extractor=extractor()), "the same 2 or more images"),
        (lambda: evaluate_reconstructions(good, good.astype(float), extractor=extractor()), "reconstructions must be"),
    ]
    for call, words in cases:
        with pytest.raises(InputError, match=words):
            call()
