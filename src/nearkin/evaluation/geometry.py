"""Six numbers that describe the embeddings of a split, and show collapse."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from nearkin.errors import DivergedError

EQUAL = 1e-9  # rows nearer than this to their mean count as equal
ROWS = 2_000  # at most so many, evenly spread: the pairs are a matrix
SPECTRUM = 512  # the spectrum costs the cube of the smaller of rows and width


@torch.no_grad()
def geometry(embeddings: Tensor, labels: Tensor) -> dict[str, float | None]:
    """Computed from rows z of unit length, in float64; None where no pair of the kind exists.

    intra_cosine, inter_cosine: means of z_i . z_j over pairs of one class and of two.
    alignment: mean |z_i - z_j|^2 over pairs of one class, 2 - 2 intra_cosine where no row is zero (Wang and Isola 2020,
        equation 1; there the pairs are two views of an image).
    uniformity: log mean over pairs of e^(-2 |z_i - z_j|^2), 0 when all are equal (the same, equation 2).
    effective_rank: exp of the entropy of the singular values of the centred rows over their sum (Roy and Vetterli
        2007), 0 when all are equal.
    isotropy: min over c of Z(c) / max over c of Z(c), Z(c) = sum_i e^(c . z_i), c over the eigenvectors of Z'Z with
        both signs, in (0, 1] (Mu and Viswanath 2018, section 2; there with one arbitrary sign).

    embeddings: `[N, d]` of any length; a zero row stays zero. labels: `[N]` class numbers. At most 2 000 evenly spread
    rows are taken, and for effective_rank and isotropy at most 512 of these where d > 512.

    Raises DivergedError when an embedding is not finite.
    """
    if not bool(embeddings.isfinite().all()):
        raise DivergedError("An embedding is not finite; lower the learning rate.")
    z, labels = F.normalize(_spread(embeddings, ROWS).double(), dim=1), _spread(labels, ROWS)
    few = z if z.shape[1] <= SPECTRUM else _spread(z, SPECTRUM)
    alignment, intra, inter = _pairs(z, labels)
    return {
        "alignment": alignment,
        "uniformity": _uniformity(z),
        "effective_rank": _effective_rank(few),
        "intra_cosine": intra,
        "inter_cosine": inter,
        "isotropy": _isotropy(few),
    }


def _spread(rows: Tensor, most: int) -> Tensor:
    """At most `most` of the rows, evenly spread."""
    return rows[:: max(1, -(-len(rows) // most))]


def _pairs(z: Tensor, labels: Tensor) -> tuple[float | None, float | None, float | None]:
    """alignment, intra_cosine, inter_cosine, by the sums of each class: no matrix of pairs."""
    classes, places = torch.unique(labels, return_inverse=True)
    sums = z.new_zeros(len(classes), z.shape[1]).index_add_(0, places, z)
    counts = torch.bincount(places, minlength=len(classes)).to(z)
    lengths = torch.bincount(places, weights=z.square().sum(1), minlength=len(classes))
    inside = sums.square().sum(1)  # sum of z_i . z_j over i and j of the class, i = j included
    within, between = float((counts * (counts - 1)).sum()), float(counts.sum() ** 2)
    between -= float(counts.square().sum())
    apart = 2 * float((counts * lengths - inside).sum())
    return (
        max(0.0, apart) / within if within else None,
        float((inside - lengths).sum()) / within if within else None,
        float(sums.sum(0).square().sum() - inside.sum()) / between if between else None,
    )


def _uniformity(z: Tensor) -> float | None:
    if len(z) < 2:
        return None
    squares = z.square().sum(1)
    scores = (z @ z.T).mul_(2).sub_(squares).sub_(squares[:, None]).clamp_(max=0).mul_(2)
    total = float(scores.exp_().fill_diagonal_(0).sum())
    return math.log(total / (len(z) * (len(z) - 1)))


def _effective_rank(z: Tensor) -> float:
    centred = z - z.mean(0)
    values = torch.linalg.eigvalsh(_gram(centred))
    largest = float(values.max())
    if largest <= (EQUAL * len(z)) ** 2:
        return 0.0
    # Rounding leaves about 1e-16 of the largest in place of zero; the root of that would count.
    singular = values.where(values > 1e-14 * largest, 0.0).sqrt()
    share = singular / singular.sum()
    return float((-torch.xlogy(share, share).sum()).exp())


def _isotropy(z: Tensor) -> float:
    # z c for every eigenvector c. With fewer rows than dimensions they come from z z'; the remaining c have Z = N,
    # which is never the largest and, for independent rows, not the smallest.
    values, vectors = torch.linalg.eigh(_gram(z))
    along = z @ vectors if len(z) >= z.shape[1] else vectors * values.clamp(min=0).sqrt()
    log_sums = torch.cat([along.logsumexp(0), (-along).logsumexp(0)])
    return float((log_sums.min() - log_sums.max()).exp())


def _gram(z: Tensor) -> Tensor:
    """The smaller of z'z and z z': the eigenvalues of both are the squares of the singular values."""
    return z.T @ z if len(z) >= z.shape[1] else z @ z.T
