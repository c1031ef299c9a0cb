"""The map of the embeddings."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.decomposition import PCA

from nearkin.evaluation.projection import pca, tsne, unit_square


def rows(n=50, e=7):
    return np.random.default_rng(0).normal(size=(n, e)).astype(np.float32) * np.arange(1, e + 1)


def test_the_principal_components_are_scikit_learns():
    found, share = pca(rows())
    other = PCA(2).fit(rows())
    expected = other.transform(rows())
    signs = np.sign((found * expected).sum(0))
    assert found == pytest.approx(expected * signs, abs=1e-3)
    assert share == pytest.approx(other.explained_variance_ratio_.sum())
    assert np.array_equal(pca(rows())[0], found)


def test_embeddings_without_a_second_dimension():
    assert pca(rows(e=1))[0].shape == (50, 2)
    found, share = pca(np.ones((5, 3), np.float32))
    assert np.isfinite(found).all()
    assert share == 1.0


def test_the_square_keeps_proportions():
    found = unit_square(np.array([[0, 0], [4, 0], [4, 2]], np.float32))
    assert found.tolist() == [[0, 0.25], [1, 0.25], [1, 0.75]]
    assert unit_square(np.zeros((3, 2), np.float32)).tolist() == [[0.5, 0.5]] * 3


def test_tsne_keeps_groups_together():
    pytest.importorskip("openTSNE")
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 3
    points = (8 * np.eye(5)[labels] + rng.normal(size=(60, 5))).astype(np.float32)
    found = tsne(points)
    distances = ((found[:, None] - found[None]) ** 2).sum(2) + np.diag(np.full(60, np.inf))
    assert (labels[distances.argmin(1)] == labels).mean() > 0.95
    assert np.array_equal(tsne(points), found)
