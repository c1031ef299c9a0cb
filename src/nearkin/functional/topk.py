"""The largest scores of each column, found by groups."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

GROUP = 4  # rows of a group: more make fewer maxima, and more members to gather


def largest(
    scores: Float[Tensor, "k n"], count: int
) -> tuple[Float[Tensor, "n m"], Int[Tensor, "n m"]]:
    """The `count` largest of each column and where they are, in any order; of fewer rows all.

    scores: `[K, N]`; groups need a K that is a multiple of `GROUP`. Group g is the rows g, g + K / GROUP,
    g + 2 K / GROUP and so on, so that maxima take whole vectors. The members of the `count` groups with
    the largest maxima, found in the same way, are enough: a group outside has no member above the smallest
    of these maxima, which are `count` scores already. Among equal scores any may be chosen, as torch.topk does.
    Source: our choice.
    """
    rows = len(scores)
    groups = rows // GROUP
    if rows % GROUP or groups <= 2 * count:
        values, index = scores.T.topk(min(count, rows), dim=1, sorted=False)
        return values, index
    _, best = largest(scores.view(GROUP, groups, -1).amax(0), count)
    start = torch.arange(0, rows, groups, device=scores.device)
    members = (best[:, None] + start[:, None]).flatten(1)
    values, at = scores.T.gather(1, members).topk(count, dim=1, sorted=False)
    return values, members.gather(1, at)
