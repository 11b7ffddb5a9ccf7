"""Metrics as float64 NumPy: distances between feature sets, PSNR and SSIM of images.

Feature sets are [N, D] arrays of any float type; images are uint8 [N, H, W, C].
"""

import math
from collections.abc import Iterator

import numpy as np
from scipy import linalg, ndimage


def moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean [D] and unbiased covariance [D, D] of features [N, D]; ValueError for N below 2."""
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"moments need features [N, D] with N of at least 2, got {list(features.shape)}")
    features = features.astype(np.float64)
    mean = features.mean(axis=0)
    centred = features - mean
    return mean, centred.T @ centred / (len(features) - 1)


def frechet_distance(features: np.ndarray, reference: np.ndarray) -> float:
    """Fréchet distance of Gaussians fitted to feature sets [N, D] and [M, D] (Heusel et al. 2017, equation 6)."""
    return frechet_distance_of_moments(*moments(features), *moments(reference))


def frechet_distance_of_moments(mean1: np.ndarray, cov1: np.ndarray, mean2: np.ndarray, cov2: np.ndarray) -> float:
    """Fréchet distance |mean1 - mean2|^2 + tr(cov1 + cov2 - 2 (cov1 cov2)^(1/2)), means [D], covariances [D, D].

    The matrix square root of cov1 cov2 is inaccurate where that is near singular (N < D). It has the eigenvalues of the
    symmetric S cov2 S with S = cov1^(1/2), and the trace needs only the roots of those.
    """
    values, vectors = linalg.eigh(cov1)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    product = root @ cov2 @ root
    trace_root = np.sqrt(np.clip(linalg.eigvalsh((product + product.T) / 2), 0, None)).sum()
    distance = np.sum((mean1 - mean2) ** 2) + np.trace(cov1) + np.trace(cov2) - 2 * trace_root
    return max(0.0, float(distance))


def kernel_distance(
    features: np.ndarray, reference: np.ndarray, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Kernel inception distance (Binkowski et al. 2018): the squared MMD with k(x, y) = (x.y / D + 1)^3, unbiased.

    Returns the mean and standard deviation over random subsets of features [N, D] and reference [M, D], each of
    `subset_size` or min(N, M) vectors, at least 2, else ValueError. The mean may fall slightly below 0.
    """
    size = min(subset_size, len(features), len(reference))
    if size < 2:
        raise ValueError(f"kernel_distance needs at least 2 vectors of each, got {len(features)} and {len(reference)}")
    rng = np.random.default_rng(seed)

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        base = (x @ y.T).astype(np.float64) / x.shape[1] + 1  # float32 is exact enough: subsets differ far more
        return base * base * base

    estimates = []
    for _ in range(subsets):
        x = features[rng.choice(len(features), size, replace=False)]
        y = reference[rng.choice(len(reference), size, replace=False)]
        k_xx, k_yy, k_xy = kernel(x, x), kernel(y, y), kernel(x, y)
        within = (k_xx.sum() - np.trace(k_xx) + k_yy.sum() - np.trace(k_yy)) / (size * (size - 1))
        estimates.append(within - 2 * k_xy.mean())
    return float(np.mean(estimates)), float(np.std(estimates))


def precision_recall(features: np.ndarray, reference: np.ndarray, *, k: int = 3) -> tuple[float, float]:
    """Precision and recall of a generative model (Kynkaanniemi et al. 2019, equations 1 and 2).

    Precision is the fraction of `features` within the manifold of `reference`: inside the ball around some reference
    vector that reaches to its k-th nearest neighbour (other than itself). Recall is the same with the sets exchanged.
    `features` [N, D] are of generated images, `reference` [M, D] of real ones; ValueError unless N > k and M > k.
    """
    if min(len(features), len(reference)) <= k:
        raise ValueError(f"precision_recall needs more than k={k} vectors, got {len(features)} and {len(reference)}")
    return _fraction_covered(features, reference, k), _fraction_covered(reference, features, k)


def _fraction_covered(points: np.ndarray, centres: np.ndarray, k: int) -> float:
    radii = np.concatenate([np.partition(d, k, axis=1)[:, k] for d in _squared_distances(centres, centres)])
    covered = [np.any(d <= radii, axis=1) for d in _squared_distances(points, centres)]
    return float(np.mean(np.concatenate(covered)))


def _squared_distances(x: np.ndarray, y: np.ndarray, rows: int = 1000) -> Iterator[np.ndarray]:
    """|x_i - y_j|^2 in blocks [rows, M], so that 50,000 x 50,000 fits in memory.

    In float32, which is twice as fast, and exact enough for the order of neighbours of centred sets.
    """
    centre = y.mean(axis=0, dtype=np.float64)
    x, y = (x - centre).astype(np.float32), (y - centre).astype(np.float32)
    y_norms = np.sum(y**2, axis=1)
    for start in range(0, len(x), rows):
        block = x[start : start + rows]
        yield np.sum(block**2, axis=1)[:, None] + y_norms - 2 * block @ y.T


def psnr(images: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio 10 log10(255^2 / mse) in dB, per image, [N]; infinite for equal images."""
    _check_pairs(images, others)
    mse = np.mean((images.astype(np.float64) - others.astype(np.float64)) ** 2, axis=(1, 2, 3))
    with np.errstate(divide="ignore"):
        return 10 * np.log10(255.0**2 / mse)


def ssim(images: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Structural similarity (Wang et al. 2004, equation 13), per image, [N], at most 1.

    Gaussian window of 11 x 11 and sigma 1.5, K1 = 0.01, K2 = 0.03, L = 255, weighted (biased) moments; the mean over
    the windows inside the image and channels. ValueError for images smaller than 11 x 11.
    """
    _check_pairs(images, others)
    if min(images.shape[1:3]) < 11:
        raise ValueError(f"ssim needs images of at least 11x11, got {images.shape[1]}x{images.shape[2]}")
    x, y = images.astype(np.float64), others.astype(np.float64)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mu_x, mu_y = _gaussian_window(x), _gaussian_window(y)
    var_x, var_y = _gaussian_window(x * x) - mu_x**2, _gaussian_window(y * y) - mu_y**2
    cov = _gaussian_window(x * y) - mu_x * mu_y
    local = (2 * mu_x * mu_y + c1) * (2 * cov + c2) / ((mu_x**2 + mu_y**2 + c1) * (var_x + var_y + c2))
    return local.mean(axis=(1, 2, 3))


def _gaussian_window(x: np.ndarray, radius: int = 5, sigma: float = 1.5) -> np.ndarray:
    """Gaussian-weighted mean of every (2 radius + 1)^2 window inside the image: [N, H, W, C] -> [N, H-10, W-10, C]."""
    weights = np.array([math.exp(-(i**2) / (2 * sigma**2)) for i in range(-radius, radius + 1)])
    weights /= weights.sum()
    for axis in (1, 2):
        x = ndimage.correlate1d(x, weights, axis=axis)
    return x[:, radius:-radius, radius:-radius]


def _check_pairs(images: np.ndarray, others: np.ndarray) -> None:
    if images.shape != others.shape or images.ndim != 4 or images.dtype != np.uint8 or others.dtype != np.uint8:
        arrays = f"{images.dtype} {list(images.shape)} and {others.dtype} {list(others.shape)}"
        raise ValueError(f"two uint8 arrays of one shape [N, H, W, C] expected, got {arrays}")
