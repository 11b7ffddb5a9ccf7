"""Scores against hand-computed values, closed forms and the definitions written out slowly."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm_jax.evaluation.metrics import (
    frechet_distance,
    frechet_distance_of_moments,
    kernel_distance,
    moments,
    precision_recall,
    psnr,
    ssim,
)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


# Frechet distance


def test_moments_of_three_points():
    mean, cov = moments(np.array([[0, 0], [2, 0], [1, 3]], np.float32))
    np.testing.assert_allclose(mean, [1, 1])
    np.testing.assert_allclose(cov, [[1, 0], [0, 3]])
    with pytest.raises(ValueError, match="at least 2"):
        moments(np.zeros((1, 4)))


def test_frechet_distance_of_commuting_gaussians_is_the_closed_form():
    """Diagonal covariances: sum (m1 - m2)^2 + sum (s1 - s2)^2."""
    s1, s2 = np.array([1.0, 2.0, 0.0]), np.array([3.0, 0.5, 1.0])
    got = frechet_distance_of_moments(np.array([1.0, 0, 0]), np.diag(s1**2), np.array([0, 0, 2.0]), np.diag(s2**2))
    assert got == pytest.approx(5 + 4 + 2.25 + 1, rel=1e-12)


def test_frechet_distance_of_general_gaussians_in_two_dimensions():
    """tr sqrt(M) of a 2x2 M with positive eigenvalues is sqrt(tr M + 2 sqrt(det M))."""
    a, b = np.array([[2.0, 0.7], [0.7, 1.0]]), np.array([[1.0, -0.4], [-0.4, 3.0]])
    trace_root = math.sqrt(np.trace(a @ b) + 2 * math.sqrt(np.linalg.det(a @ b)))
    got = frechet_distance_of_moments(np.zeros(2), a, np.zeros(2), b)
    assert got == pytest.approx(np.trace(a) + np.trace(b) - 2 * trace_root, rel=1e-12)


def test_frechet_distance_with_fewer_vectors_than_dimensions():
    """Rank-deficient covariances, where a plain sqrtm of the product loses digits or turns complex."""
    x = normal(20, 60)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-5)
    assert frechet_distance(x, x + 2) == pytest.approx(4 * 60, rel=1e-6)


@settings(max_examples=20)
@given(st.integers(0, 10_000), st.integers(2, 12), st.integers(1, 6))
def test_frechet_distance_is_symmetric_non_negative_and_invariant_to_rotation(seed, n, d):
    x, y = normal(n, d, seed=seed), normal(n + 3, d, seed=seed + 1) * 2 + 1
    rotation, _ = np.linalg.qr(normal(d, d, seed=seed))
    fd = frechet_distance(x, y)
    assert fd >= 0
    assert frechet_distance(y, x) == pytest.approx(fd, rel=1e-6, abs=1e-6)
    assert frechet_distance(x @ rotation, y @ rotation) == pytest.approx(fd, rel=1e-6, abs=1e-6)


# Kernel distance


def test_kernel_distance_by_hand():
    """Two one-dimensional vectors each, one subset of everything: k(x, y) = (xy + 1)^3."""
    mean, std = kernel_distance(np.array([[0.0], [1.0]]), np.array([[1.0], [2.0]]), subsets=3, subset_size=2)
    # within x: k(0,1) = 1; within y: k(1,2) = 27; across: 1, 1, 8, 27
    assert mean == pytest.approx(1 + 27 - 2 * (1 + 1 + 8 + 27) / 4)
    assert std == pytest.approx(0, abs=1e-12)


def test_kernel_distance_is_unbiased_seeded_and_sees_a_shift():
    x, y = normal(400, 8, seed=1), normal(500, 8, seed=2)
    mean, std = kernel_distance(x, y, subsets=50, subset_size=100)
    assert abs(mean) < 3 * std / math.sqrt(5)  # nearer 0 than a biased estimate, whose excess is about 0.07
    assert (mean, std) == kernel_distance(x, y, subsets=50, subset_size=100)
    assert (mean, std) != kernel_distance(x, y, subsets=50, subset_size=100, seed=1)
    assert kernel_distance(x + 1, y, subsets=10, subset_size=100)[0] > 10 * std
    with pytest.raises(ValueError, match="at least 2"):
        kernel_distance(x[:1], y)


# Precision and recall


def test_precision_recall_by_hand():
    """On a line, k = 1. Radii of the reference 0, 1, 3: 1, 1, 2; of the features 0.5, 5.5, 9: 5, 3.5, 3.5."""
    reference, features = np.array([[0.0], [1], [3]]), np.array([[0.5], [5.5], [9]])
    precision, recall = precision_recall(features, reference, k=1)
    assert precision == pytest.approx(1 / 3)  # 0.5 is covered; 5.5 is 2.5 from 3; 9 is far
    assert recall == pytest.approx(1.0)  # 0.5 reaches from -4.5 to 5.5
    assert precision_recall(reference, features, k=1) == (recall, precision)


def test_precision_recall_equals_the_slow_definition():
    x, y = normal(60, 5, seed=1), normal(70, 5, seed=2) * 0.7 + 0.3

    def covered(points, centres, k):
        radii = [sorted(np.linalg.norm(centres - c, axis=1))[k] for c in centres]
        return np.mean([any(np.linalg.norm(p - c) <= r for c, r in zip(centres, radii)) for p in points])

    for k in (1, 3):
        assert precision_recall(x, y, k=k) == pytest.approx((covered(x, y, k), covered(y, x, k)))
    assert precision_recall(x.astype(np.float32) + 1000, y.astype(np.float32) + 1000)[0] == pytest.approx(
        covered(x, y, 3)
    )


def test_precision_recall_crosses_block_borders_and_bounds():
    x = normal(2300, 2, seed=1).astype(np.float32)
    assert precision_recall(x, x) == (1.0, 1.0)
    assert precision_recall(x + 100, x) == (0.0, 0.0)
    with pytest.raises(ValueError, match="more than k=3"):
        precision_recall(x[:3], x)


# Reconstructions


def images(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def test_psnr_by_hand():
    x = np.zeros((2, 4, 4, 1), np.uint8)
    y = x.copy()
    y[0], y[1, 0, 0] = 255, 51
    got = psnr(x, y)
    assert got[0] == pytest.approx(0)
    assert got[1] == pytest.approx(10 * math.log10(16 * 25))  # mse = (255/5)^2 / 16
    assert psnr(x, x)[0] == math.inf


def test_ssim_equals_the_definition_window_by_window():
    """Wang 2004 with scikit-image's gaussian_weights=True, use_sample_covariance=False, borders cropped."""
    x, noise = images(2, 13, 15, 3), images(2, 13, 15, 3, seed=1)
    y = (0.7 * x + 0.3 * noise).astype(np.uint8)
    offsets = np.arange(-5, 6)
    w = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    w /= w.sum()
    expected = np.zeros(2)
    for n in range(2):
        windows = []
        for c in range(3):
            for i in range(13 - 10):
                for j in range(15 - 10):
                    a, b = (v[n, i : i + 11, j : j + 11, c].astype(float) for v in (x, y))
                    ma, mb = np.sum(w * a), np.sum(w * b)
                    va, vb, cab = np.sum(w * (a - ma) ** 2), np.sum(w * (b - mb) ** 2), np.sum(w * (a - ma) * (b - mb))
                    c1, c2 = 2.55**2, 7.65**2
                    windows.append((2 * ma * mb + c1) * (2 * cab + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2)))
        expected[n] = np.mean(windows)
    np.testing.assert_allclose(ssim(x, y), expected, rtol=1e-10)
    np.testing.assert_allclose(ssim(x, x), 1)


def test_ssim_of_flat_images_is_the_luminance_term():
    x, y = np.full((1, 11, 11, 1), 100, np.uint8), np.full((1, 11, 11, 1), 150, np.uint8)
    c1 = 2.55**2
    assert ssim(x, y)[0] == pytest.approx((2 * 15000 + c1) / (10000 + 22500 + c1))


@pytest.mark.parametrize("score", [psnr, ssim])
def test_pairs_must_match(score):
    with pytest.raises(ValueError, match="one shape"):
        score(images(2, 12, 12, 1), images(1, 12, 12, 1))
    with pytest.raises(ValueError, match="uint8"):
        score(images(2, 12, 12, 1).astype(np.float32), images(2, 12, 12, 1))
    with pytest.raises(ValueError, match="11x11"):
        ssim(images(1, 10, 12, 1), images(1, 10, 12, 1))
