"""Two coordinates for each embedding, to be drawn as a map."""

from __future__ import annotations

import warnings
from importlib.util import find_spec

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.float32]


def pca(rows: Rows) -> tuple[Rows, float]:
    """The two principal components of `rows` `[N, e]`, `[N, 2]`, and the share of the variance that they hold.

    Signs are such that the component of the largest weight is positive, so that the same rows give the same map.
    """
    centred = rows.astype(np.float64) - rows.mean(0, dtype=np.float64)
    values, vectors = np.linalg.eigh(centred.T @ centred)
    axes = vectors[:, ::-1][:, :2]
    axes = axes * np.sign(axes[np.abs(axes).argmax(0), np.arange(axes.shape[1])])
    found = centred @ axes
    if found.shape[1] < 2:  # an embedding of one number
        found = np.pad(found, ((0, 0), (0, 1)))
    total = float(values.sum())
    share = float(values[::-1][:2].sum()) / total if total > 0 else 1.0
    return found.astype(np.float32), share


def has_tsne() -> bool:
    """Whether the extra `tsne` is installed."""
    return find_spec("openTSNE") is not None


def tsne(rows: Rows) -> Rows:
    """t-SNE by openTSNE (van der Maaten and Hinton 2008) of `rows` `[N, e]` by cosine, `[N, 2]`; from the principal
    components, so that the same rows give the same map."""
    from openTSNE import TSNE

    count = len(rows)
    method = TSNE(
        perplexity=min(30, max(2, (count - 1) / 4)),
        metric="cosine",
        initialization="pca",
        early_exaggeration_iter=100,
        n_iter=250,
        negative_gradient_method="bh",
        random_state=0,
        n_jobs=1,  # its threads wait for one another where other programs compute, too: 20 times slower
    )
    with warnings.catch_warnings(action="ignore"):
        return np.asarray(method.fit(rows.astype(np.float64)), dtype=np.float32)


def unit_square(places: Rows) -> Rows:
    """`places` `[N, 2]` moved and scaled by one factor into [0, 1] x [0, 1], centred."""
    low, high = places.min(0), places.max(0)
    size = float((high - low).max()) or 1.0
    scaled: Rows = ((places - (low + high) / 2) / size + 0.5).astype(np.float32)
    return scaled.clip(0, 1)
