"""The mathematics: pure functions of tensors, one value per anchor out.

Imports torch and jaxtyping only.
"""

from nearkin.functional.classification import binary_cross_entropy, cross_entropy, symmetric_ce
from nearkin.functional.contrastive import (
    instance_nce,
    instance_nce_bank,
    sincere,
    supcon_in,
    supcon_out,
)
from nearkin.functional.gpaco import gpaco
from nearkin.functional.labels import SoftPairs, soft_pairs
from nearkin.functional.margin import (
    arcface_logits,
    arcface_margin,
    cosface_logits,
    cosface_margin,
    cosine_logits,
)
from nearkin.functional.neighbours import consistency_kl, neighbour_nll, neighbour_target
from nearkin.functional.orthogonal import orthogonal_projection
from nearkin.functional.per_anchor import PerAnchor, mean_valid
from nearkin.functional.schane import schane
from nearkin.functional.triplet import triplet_batch_hard
from nearkin.functional.varcon import varcon

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
