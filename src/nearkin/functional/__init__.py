"""The losses: pure functions of tensors that return one value per anchor (`PerAnchor`; `orthogonal_projection` one of
the batch), and their targets and logits. Imports torch and jaxtyping only.

validate: all losses check the values of their arguments unless validate=False, and raise ValueError with the row:
integer labels must be in [0, C), or not negative where C is unknown; soft labels must be finite, not negative and sum
to 1; rows of unit length must have it within 1 %; in a bank -1 and rows of zeros are empty slots. On a GPU the check
is an asynchronous assertion without the row. Settings and numbers of rows are always checked. A training step passes
False; so must torch.vmap, whose tensors have no single value.
"""

from nearkin.functional._common import PerAnchor, SoftPairs, mean_valid, soft_pairs
from nearkin.functional.classification import binary_cross_entropy, cross_entropy, symmetric_ce
from nearkin.functional.contrastive import (
    gpaco,
    instance_nce,
    instance_nce_bank,
    schane,
    sigsup,
    sincere,
    supcon_in,
    supcon_out,
)
from nearkin.functional.margin import (
    arcface_logits,
    arcface_margin,
    cosface_logits,
    cosface_margin,
    cosine_logits,
)
from nearkin.functional.metric import orthogonal_projection, triplet_batch_hard, varcon
from nearkin.functional.neighbours import consistency_kl, neighbour_nll, neighbour_target

__all__ = [
    "PerAnchor",
    "SoftPairs",
    "arcface_logits",
    "arcface_margin",
    "binary_cross_entropy",
    "consistency_kl",
    "cosface_logits",
    "cosface_margin",
    "cosine_logits",
    "cross_entropy",
    "gpaco",
    "instance_nce",
    "instance_nce_bank",
    "mean_valid",
    "neighbour_nll",
    "neighbour_target",
    "orthogonal_projection",
    "schane",
    "sigsup",
    "sincere",
    "soft_pairs",
    "supcon_in",
    "supcon_out",
    "symmetric_ce",
    "triplet_batch_hard",
    "varcon",
]
