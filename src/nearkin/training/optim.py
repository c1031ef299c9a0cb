"""Learning-rate schedule, parameter groups and optimisers, and their state by name."""

from __future__ import annotations

import inspect
import math
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nearkin.imports import import_eager
from nearkin.network import layer_scales
from nearkin.settings import Settings

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer


def lr_factor(step: int, *, steps: int, warmup: int, floor: float) -> float:
    """The learning rate of `step` (from 0) over its peak: linear warm-up, then a cosine to `floor`.

    warm-up: (step + 1) / (warmup + 1), so that the first rate is not 0 and step `warmup` has the peak.
    cosine: floor + (1 - floor)(1 + cos(pi t)) / 2 with t from 0 at the end of the warm-up to 1 at the last step.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    t = (step - warmup) / max(1, steps - 1 - warmup)
    return floor + (1.0 - floor) * (1.0 + math.cos(math.pi * min(1.0, t))) / 2.0


def parameter_groups(
    network: nn.Module,
    *,
    weight_decay: float,
    decay_all: bool,
    layer_decay: float,
    head_lr: float = 1.0,
) -> list[dict[str, Any]]:
    """Weight decay for matrices and filters, none for norms and biases; with `decay_all` for everything.

    head_lr: learning rate of all that is not in the backbone, as a multiple of the last layer's.
    A backbone may name further parameters that never decay (`no_weight_decay`: patterns, e.g. of position embeddings).
    layer_decay: below 1 there are two such groups per layer, each with its `lr_scale`: see `layer_scales`.

    Raises ConfigError for a `layer_decay` below 1 and a backbone that does not name its layers.
    """
    backbone = getattr(network, "backbone", network)
    exempt = getattr(backbone, "no_weight_decay", None)
    patterns = [f"backbone.{name}" for name in (exempt() if callable(exempt) else ())]
    scales = layer_scales(backbone, layer_decay) if layer_decay < 1.0 else {}
    scaled = layer_decay < 1.0 or head_lr != 1.0
    groups: dict[tuple[float, bool], list[Tensor]] = {}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            named = any(fnmatchcase(name, pattern) for pattern in patterns)
            decays = decay_all or (parameter.dim() > 1 and not named)
            bare = name.removeprefix("backbone.")
            head = backbone is not network and bare == name
            scale = head_lr if head else scales.get(bare, 1.0)
            groups.setdefault((scale, decays), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": weight_decay if decays else 0.0}
        | ({"lr_scale": scale} if scaled else {})
        for (scale, decays), parameters in sorted(
            groups.items(), key=lambda group: group[0], reverse=True
        )
    ]


def build_optimizer(network: nn.Module, settings: Settings) -> Optimizer:
    """torch's `sgd` or `adamw`, or timm's `lamb`, with the options that begin at `optimizer` in `RunConfig`."""
    groups = parameter_groups(
        network,
        weight_decay=settings.weight_decay,
        decay_all=settings.decay_all,
        layer_decay=settings.layer_decay,
        head_lr=settings.head_lr,
    )
    kind: Any
    options: dict[str, Any]
    if settings.optimizer == "lamb":
        kind = import_eager("timm.optim").Lamb
        # LAMB clips to 1 by itself (You et al. 2020), unless another norm is given.
        options = {} if settings.clip_grad is None else {"max_grad_norm": None}
    elif settings.optimizer == "sgd":
        momentum = settings.momentum
        kind = torch.optim.SGD
        options = {"momentum": momentum, "nesterov": settings.nesterov and momentum > 0}
        options["fused"] = True  # one pass over the weights
    else:
        kind, options = torch.optim.AdamW, {"fused": True}
    optimizer: Optimizer = _eager(kind)(groups, lr=settings.lr, weight_decay=0.0, **options)
    return optimizer


def _eager(kind: Any) -> Any:
    """`kind` with methods that do not import `torch._dynamo`, which takes 2.3 s (docs/decisions/013-start-up.md).

    torch wraps them so that a compiled graph leaves the optimiser out; nearkin compiles the backbone only. The wrapper
    of `step` also switches the gradient off.
    """
    methods = ("add_param_group", "load_state_dict", "state_dict", "step", "zero_grad")
    plain = {name: inspect.unwrap(getattr(kind, name)) for name in methods}
    return type(kind.__name__, (kind,), plain | {"step": torch.no_grad()(plain["step"])})


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Set the learning rate of every group; a group's own `lr_scale` multiplies it."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def optimizer_tensors(optimizer: Optimizer, network: nn.Module) -> dict[str, Tensor]:
    """The optimiser's state as `parameter/key` -> tensor, ready for safetensors.

    Some optimisers (LAMB) count in their groups: these go under `#number/key`.
    """
    names = {id(p): name for name, p in network.named_parameters()}
    tensors = {
        f"{names[id(parameter)]}/{key}": torch.as_tensor(value)
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
        if value is not None
    }
    for number, group in enumerate(optimizer.param_groups):
        if "step" in group:
            tensors[f"#{number}/step"] = torch.as_tensor(group["step"])
    return tensors


def load_optimizer_tensors(
    optimizer: Optimizer, network: nn.Module, tensors: dict[str, Tensor]
) -> None:
    """Restore what `optimizer_tensors` gave, each tensor with the memory format of its parameter.

    The last bit of a sum over a tensor depends on its memory format, so equal values alone are not enough.
    """
    parameters = dict(network.named_parameters())
    for name, value in tensors.items():
        path, key = name.rsplit("/", 1)
        if path.startswith("#"):
            optimizer.param_groups[int(path[1:])][key] = value.clone()
            continue
        parameter = parameters[path]
        if value.shape == parameter.shape:
            placed = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        else:
            # A fused optimiser counts its steps on the device, the others on the host.
            fused = optimizer.defaults.get("fused")
            placed = value.to(parameter.device if fused else "cpu").clone()
        optimizer.state[parameter][key] = placed
