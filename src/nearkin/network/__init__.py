"""Networks: timm backbones, heads, BatchNorm over ranks, dropout keyed by the sample, weights from files."""

from nearkin.network.backbone import (
    Backbone,
    build_backbone,
    check_eval_size,
    default_memory_format,
    prefers_adamw,
)
from nearkin.network.batchnorm import SyncBatchNorm, synchronise_batchnorm
from nearkin.network.heads import CosineClassifier, Head, Norm, projection_head, projection_sizes
from nearkin.network.keyed_dropout import KeyedDropout, KeyedDropPath, RandomKey, key_randomness
from nearkin.network.network import Network
from nearkin.network.weights import LoadReport, load_weights, read_safetensors, read_tensors

__all__ = [
    "Backbone",
    "CosineClassifier",
    "Head",
    "KeyedDropPath",
    "KeyedDropout",
    "LoadReport",
    "Network",
    "Norm",
    "RandomKey",
    "SyncBatchNorm",
    "build_backbone",
    "check_eval_size",
    "default_memory_format",
    "key_randomness",
    "load_weights",
    "prefers_adamw",
    "projection_head",
    "projection_sizes",
    "read_safetensors",
    "read_tensors",
    "synchronise_batchnorm",
]
