"""Retrieval by hand: three or four candidates, and what ties are worth."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm_jax.evaluation.retrieval import (
    class_embeddings,
    clip_score,
    r_precision,
    recall_at,
    retrieval,
    zero_shot_accuracy,
)

OWN = np.eye(3, dtype=bool)


def test_recall_counts_the_queries_that_find_theirs():
    """The true candidates are first, second and third."""
    similarity = np.array([[0.9, 0.1, 0.2], [0.5, 0.4, 0.3], [0.3, 0.2, 0.1]])
    assert [recall_at(similarity, OWN, k) for k in (1, 2, 3)] == [1 / 3, 2 / 3, 1.0]


def test_one_of_several_true_candidates_is_enough():
    true = np.array([[True, False, True, False]])
    assert recall_at(np.array([[0.1, 0.9, 0.8, 0.7]]), true, 1) == 0
    assert recall_at(np.array([[0.1, 0.9, 0.8, 0.7]]), true, 2) == 1


@pytest.mark.parametrize(
    "row, true, expected",
    [
        ([1, 1, 1, 1], [1, 0, 0, 0], [1 / 4, 2 / 4, 3 / 4, 1]),
        ([2, 1, 1, 0], [0, 1, 0, 0], [0, 1 / 2, 1, 1]),  # one is nearer, two are tied
        ([1, 1, 1, 0], [1, 1, 0, 0], [2 / 3, 1, 1, 1]),  # two places of three hold one of two: always
        ([2, 1, 1, 1], [0, 1, 1, 0], [0, 2 / 3, 1, 1]),
    ],
)
def test_ties_are_worth_their_expected_value(row, true, expected):
    got = [recall_at(np.array([row]), np.array([true], bool), k) for k in (1, 2, 3, 4)]
    np.testing.assert_allclose(got, expected)


@settings(max_examples=20)
@given(st.integers(0, 1000), st.integers(1, 6))
def test_ties_against_all_their_orders(seed, k):
    """The expected value is what breaking ties at random gives on average."""
    rng = np.random.default_rng(seed)
    similarity, true = rng.integers(0, 3, (1, 6)), rng.random((1, 6)) < 0.4
    true[0, rng.integers(6)] = True
    broken = similarity + rng.random((4000, 6)) * 0.5
    drawn = np.take_along_axis(np.repeat(true, 4000, 0), np.argsort(-broken, axis=1)[:, :k], axis=1).any(1)
    assert abs(recall_at(similarity, true, k) - drawn.mean()) < 0.04


def test_retrieval_goes_both_ways():
    """cos = [[1, 0.6, 0.8], [0, 0.8, 0.6]]: text 0 is true of pictures 0 and 1, text 1 of picture 2 alone.

    Text 0 finds picture 0 first; text 1 finds picture 1, then its own. Pictures 0, 1 and 2 are nearest to the texts 0,
    1 and 0: right, wrong, wrong.
    """
    text, image = np.eye(2), np.array([[1, 0], [0.6, 0.8], [0.8, 0.6]])
    true = np.array([[True, True, False], [False, False, True]])
    expected = {"text_to_image_recall@1": 0.5, "text_to_image_recall@2": 1.0, "text_to_image_recall@3": 1.0}
    expected |= {"image_to_text_recall@1": 1 / 3, "image_to_text_recall@2": 1.0}
    assert retrieval(text, image, true, (1, 2, 3)) == pytest.approx(expected)


def test_the_embedding_of_a_class_is_the_mean_direction_of_its_prompts():
    """(1, 0) and (0, 1) have the mean (1, 1) / 2, of the direction (1, 1) / sqrt(2)."""
    prompts = np.array([[[1, 0], [0, 1]], [[0, -1], [0, -1]]], np.float32)
    np.testing.assert_allclose(class_embeddings(prompts), [[np.sqrt(0.5)] * 2, [0, -1]])


def test_zero_shot_accuracy():
    """Pictures at 10, 40, 80 degrees, classes at 0 and 90: class 0, 0, 1."""
    angles = np.radians([10, 40, 80])
    image = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    assert zero_shot_accuracy(image, np.eye(2), np.array([0, 1, 1])) == pytest.approx(2 / 3)
    assert zero_shot_accuracy(image, np.ones((2, 2)), np.array([0, 1, 1])) == 0.5  # guessing
    assert r_precision(image, np.eye(2), np.array([0, 0, 1])) == 1.0


def test_clip_score_counts_opposites_as_zero():
    """100 (0.8 + 0 + 0) / 3 for cosines of 0.8, -0.6 and 0."""
    text = np.array([[1, 0], [1, 0], [1, 0]], np.float32)
    image = np.array([[0.8, 0.6], [-0.6, 0.8], [0, 1]], np.float32)
    assert clip_score(text, image) == pytest.approx(80 / 3)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: recall_at(np.ones((2, 3)), OWN, 1), r"must both be \[N, M\].*got \[2, 3\] and bool \[3, 3\]"),
        (lambda: recall_at(np.ones((3, 3)), OWN.astype(int), 1), r"bool; got \[3, 3\] and int64 \[3, 3\]"),
        (lambda: recall_at(np.ones((3, 3)), OWN, 0), "k must be in 1 to 3, the number of candidates; got 0"),
        (lambda: recall_at(np.ones((3, 3)), OWN, 4), "k must be in 1 to 3, the number of candidates; got 4"),
        (lambda: recall_at(np.ones((3, 3)), OWN & ~OWN[1], 1), "query 1 has no true candidate"),
        (lambda: zero_shot_accuracy(np.eye(2), np.eye(2), np.array([0, 2])), "labels must be in 0 to 1; got 0 to 2"),
        (lambda: clip_score(np.ones((2, 3)), np.ones((3, 3))), r"both be \[N, D\]; got \[2, 3\] and \[3, 3\]"),
    ],
)
def test_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
