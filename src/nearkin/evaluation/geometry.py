"""What the embeddings of a split look like: six numbers that tell collapse and crowding from order."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

ROWS = 2_000  # at most so many, evenly spread: the pairs are a matrix
SPECTRUM = 512  # at most so many for singular values, which cost their cube


@torch.no_grad()
def geometry(embeddings: Tensor, labels: Tensor) -> dict[str, float | None]:
    """Of unit rows z, in float64; None where no pair of the kind exists.

    intra_cosine, inter_cosine: means of z_i . z_j over pairs of one class and of two.
    alignment: mean |z_i - z_j|^2 over pairs of one class = 2 - 2 intra_cosine (Wang and Isola 2020, equation 1; pairs
        are of a class, since an evaluation sees each image once).
    uniformity: log mean over pairs of e^(-2 |z_i - z_j|^2), 0 when all are equal (the same, equation 2).
    effective_rank: exp of the entropy of the singular values of the centred rows over their sum (Roy and Vetterli
        2007), 0 when all are equal.
    isotropy: min over c of Z(c) / max over c of Z(c), Z(c) = sum_i e^(c . z_i), c over the eigenvectors of Z'Z with
        both signs, in (0, 1] (Mu and Viswanath 2018, section 2; both signs, since an eigenvector has none, is ours).
        Both of the last two look at at most 512 rows.

    embeddings: `[N, d]` of any length. labels: `[N]` class numbers. At most 2 000 evenly spread rows are taken.
    """
    z, labels = F.normalize(_spread(embeddings, ROWS).double(), dim=1), _spread(labels, ROWS)
    few = _spread(z, SPECTRUM)
    intra, inter = _cosines(z, labels)
    return {
        "alignment": None if intra is None else 2 - 2 * intra,
        "uniformity": _uniformity(z),
        "effective_rank": _effective_rank(few),
        "intra_cosine": intra,
        "inter_cosine": inter,
        "isotropy": _isotropy(few),
    }


def _spread(rows: Tensor, most: int) -> Tensor:
    """At most `most` of the rows, evenly spread."""
    return rows[:: max(1, -(-len(rows) // most))]


def _cosines(z: Tensor, labels: Tensor) -> tuple[float | None, float | None]:
    """The mean cosine within and between classes, by sums of rows: no matrix of pairs."""
    classes, places = torch.unique(labels, return_inverse=True)
    sums = z.new_zeros(len(classes), z.shape[1]).index_add_(0, places, z)
    counts = torch.bincount(places, minlength=len(classes)).double()
    own = z.square().sum()
    within = sums.square().sum() - own
    pairs_within = float((counts * (counts - 1)).sum())
    between = sums.sum(0).square().sum() - sums.square().sum()
    pairs_between = float(counts.sum() ** 2 - counts.square().sum())
    return (
        float(within) / pairs_within if pairs_within else None,
        float(between) / pairs_between if pairs_between else None,
    )


def _uniformity(z: Tensor) -> float | None:
    if len(z) < 2:
        return None
    distance = (z.square().sum(1)[:, None] + z.square().sum(1) - 2 * z @ z.T).clamp(min=0)
    scores = (-2 * distance).fill_diagonal_(-torch.inf)
    pairs = torch.tensor(float(len(z) * (len(z) - 1)), dtype=z.dtype)
    return float(scores.flatten().logsumexp(0) - pairs.log().to(z.device))


def _effective_rank(z: Tensor) -> float:
    values = torch.linalg.svdvals(z - z.mean(0))
    if float(values.sum()) < 1e-9 * len(z):
        return 0.0
    share = values / values.sum()
    return float((-torch.xlogy(share, share).sum()).exp())


def _isotropy(z: Tensor) -> float:
    # Eigenvectors of Z'Z with an eigenvalue; along the others Z is N, neither least nor most.
    along = z @ torch.linalg.svd(z, full_matrices=False).Vh.T
    log_sums = torch.cat([along.logsumexp(0), (-along).logsumexp(0)])
    return float((log_sums.min() - log_sums.max()).exp())
