"""The mathematics: pure functions of tensors, one value per anchor out.

Imports torch and jaxtyping only.
"""

from nearkin.functional._common import PerAnchor, SoftPairs, mean_valid, soft_pairs
from nearkin.functional.classification import binary_cross_entropy, cross_entropy, symmetric_ce
from nearkin.functional.contrastive import (
    instance_nce,
    instance_nce_bank,
    schane,
    sincere,
    supcon_in,
    supcon_out,
)
from nearkin.functional.gpaco import gpaco
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
    "sincere",
    "soft_pairs",
    "supcon_in",
    "supcon_out",
    "symmetric_ce",
    "triplet_batch_hard",
    "varcon",
]
