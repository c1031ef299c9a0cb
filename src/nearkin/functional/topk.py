"""The largest scores of each row, found by groups."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

GROUP = 16  # columns of a group


def largest(
    scores: Float[Tensor, "n k"], count: int
) -> tuple[Float[Tensor, "n m"], Int[Tensor, "n m"]]:
    """The `count` largest of each row and where they are, in any order; of fewer columns all.

    scores: `[N, K]`, K a multiple of `GROUP`. Group g is the columns g, g + K / GROUP, g + 2 K / GROUP
    and so on, so that maxima take whole vectors. The members of the `count` groups with the largest
    maxima are enough: a group outside has no member above the smallest of these maxima, which are
    `count` scores already. Among equal scores any may be chosen, as torch.topk does.
    Source: our choice.
    """
    columns = scores.shape[1]
    groups = columns // GROUP
    if groups <= count:
        values, index = scores.topk(min(count, columns), dim=1, sorted=False)
        return values, index
    best = scores.view(-1, GROUP, groups).amax(1).topk(count, dim=1, sorted=False).indices
    start = torch.arange(0, columns, groups, device=scores.device)
    members = (best[:, None] + start[:, None]).flatten(1)
    values, at = scores.gather(1, members).topk(count, dim=1, sorted=False)
    return values, members.gather(1, at)
