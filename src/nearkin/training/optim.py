"""Optimisers through timm's factory, with our own groups, and their state by parameter name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer


def parameter_groups(
    network: nn.Module, *, weight_decay: float, decay_all: bool
) -> list[dict[str, Any]]:
    """Two groups: matrices and filters decay, norms and biases do not; with `decay_all` everything does.

    A backbone may name further parameters that never decay (`no_weight_decay`, e.g. position embeddings).
    """
    backbone = getattr(network, "backbone", network)
    exempt = getattr(backbone, "no_weight_decay", None)
    names = {f"backbone.{name}" for name in (exempt() if callable(exempt) else ())}
    decayed: list[Tensor] = []
    free: list[Tensor] = []
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            decays = decay_all or (parameter.dim() > 1 and name not in names)
            (decayed if decays else free).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": free, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(
    network: nn.Module,
    name: str,
    *,
    lr: float,
    weight_decay: float,
    momentum: float,
    decay_all: bool,
) -> Optimizer:
    """`sgd` (Nesterov), `adamw` or `lamb`."""
    from timm.optim._optim_factory import create_optimizer_v2

    groups = parameter_groups(network, weight_decay=weight_decay, decay_all=decay_all)
    extra: dict[str, Any] = {"momentum": momentum} if name == "sgd" else {}
    if name != "lamb":
        extra["fused"] = True  # one pass over the weights instead of one per operation
    optimizer: Optimizer = create_optimizer_v2(groups, opt=name, lr=lr, weight_decay=0.0, **extra)
    return optimizer


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
    """Put back what `optimizer_tensors` gave, each tensor with the layout of its parameter.

    A sum over a tensor depends on its layout in the last bit, so that restoring the values alone is not enough.
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
