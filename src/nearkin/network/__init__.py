"""Networks: timm backbones, heads, BatchNorm over ranks, dropout keyed by the sample, weights from files."""

from nearkin.network.backbone import (
    Backbone,
    build_backbone,
    check_eval_size,
    default_memory_format,
    prefers_adamw,
)
from nearkin.network.batchnorm import SyncBatchNorm, synchronise_batchnorm
from nearkin.network.heads import (
    CosineClassifier,
    Head,
    Norm,
    ScaleBias,
    projection_head,
    projection_sizes,
)
from nearkin.network.keyed_dropout import KeyedDropout, KeyedDropPath, RandomKey, key_randomness
from nearkin.network.layers import blocks_below_heads, count_layers, layer_scales, names_layers
from nearkin.network.network import Network
from nearkin.network.packaged import PACKAGED
from nearkin.network.tensor_files import read_safetensors, read_tensors
from nearkin.network.weights import LoadReport, load_weights

__all__ = [
    "PACKAGED",
    "Backbone",
    "CosineClassifier",
    "Head",
    "KeyedDropPath",
    "KeyedDropout",
    "LoadReport",
    "Network",
    "Norm",
    "RandomKey",
    "ScaleBias",
    "SyncBatchNorm",
    "blocks_below_heads",
    "build_backbone",
    "check_eval_size",
    "count_layers",
    "default_memory_format",
    "key_randomness",
    "layer_scales",
    "load_weights",
    "names_layers",
    "prefers_adamw",
    "projection_head",
    "projection_sizes",
    "read_safetensors",
    "read_tensors",
    "synchronise_batchnorm",
]
