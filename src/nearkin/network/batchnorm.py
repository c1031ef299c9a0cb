"""BatchNorm with statistics over all ranks: N ranks compute what one process computes on the whole batch."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from nearkin.distributed import gather_rows
from nearkin.errors import ConfigError


def swap_modules(root: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Replace each key of `replacements` in `root` by its value, in place. Returns `root`, or its own replacement.

    A module that is used in two places stays one module.
    """
    for parent in list(root.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in replacements:
                parent._modules[name] = replacements[child]
    return replacements.get(root, root)


def synchronise_batchnorm(module: nn.Module, device_type: str) -> nn.Module:
    """Replace every BatchNorm in `module` by one with statistics over all ranks; parameters and buffers are kept.

    device_type: "cuda" takes torch's SyncBatchNorm (and timm's, where an activation belongs to the module), which
    exists only there. Other devices take the `SyncBatchNorm` of this file.

    Returns `module` itself unless it is a BatchNorm. Raises ConfigError for an unknown subclass of BatchNorm: left
    alone it would train on the statistics of one rank.
    """
    from timm.layers.norm_act import BatchNormAct2d, convert_sync_batchnorm

    found = [
        m for m in module.modules() if isinstance(m, _BatchNorm) and type(m) is not SyncBatchNorm
    ]
    for norm in found:
        if type(norm) not in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, BatchNormAct2d):
            raise ConfigError(
                f"{type(norm).__name__} cannot be synchronised between processes; "
                "train with one process or choose a model with another normalisation."
            )
    if device_type == "cuda":
        converted: nn.Module = convert_sync_batchnorm(module)  # type: ignore[no-untyped-call]
        return converted
    return swap_modules(module, {norm: SyncBatchNorm(norm) for norm in found})


class SyncBatchNorm(_BatchNorm):
    """BatchNorm over the rows of all ranks, for CPUs, where torch has none.

    In training, with n values per channel on all ranks together:
    y = (x - mean) / sqrt(M2 / n + eps) * weight + bias, where mean and M2 (the centred sum of squares) are
    merged from those of the ranks, which avoids cancellation. Ranks may hold different numbers of rows, at least
    one each. The running variance is the unbiased M2 / (n - 1). In evaluation it is torch's own.
    Statistics are at least float32, also under autocast; y has the dtype of x.

    `original`: a BatchNorm1d, 2d or 3d, or timm's BatchNormAct2d. Its parameters, buffers, settings and children
    (timm's dropout and activation, which run after the normalisation) keep their names.
    """

    def __init__(self, original: _BatchNorm) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(original.__dict__)

    def forward(self, input: Tensor) -> Tensor:
        output = self._normalise(input) if self.training else super().forward(input)
        for after in self.children():
            output = after(output)
        return output

    def _normalise(self, x: Tensor) -> Tensor:
        mean, squares, count = _statistics(x)
        if self.track_running_stats:
            self._track(mean, squares / (count - 1))
        scale = torch.rsqrt(squares / count + self.eps)
        if self.weight is not None:
            scale = scale * self.weight
        output = (x.to(mean.dtype) - _per_channel(mean, x)) * _per_channel(scale, x)
        if self.bias is not None:
            output = output + _per_channel(self.bias.to(mean.dtype), x)
        return output.to(x.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        momentum = self.momentum
        if momentum is None:  # the plain average over all batches so far
            momentum = 1.0 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(variance.to(self.running_var.dtype), momentum)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"BatchNorm needs [N, C, ...], not {tuple(input.shape)}.")


def _statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean `[C]`, sum of squared distances from it `[C]` and number of values of the channels, over all ranks.

    x: `[N, C, ...]`. By the update of Chan, Golub and LeVeque (1979); `gather_rows` gives the gradient over ranks.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    dims = [0, *range(2, x.dim())]
    mean = wide.mean(dims)
    squares = (wide - _per_channel(mean, x)).square().sum(dims)
    count = x.numel() // x.shape[1]
    rows = gather_rows(torch.cat([mean, squares, mean.new_full((1,), count)])[None])
    if rows.shape[0] * count < 2:
        raise ValueError(
            "BatchNorm needs more than one value per channel to train; use a larger batch."
        )
    means, all_squares, counts = torch.split(rows, [x.shape[1], x.shape[1], 1], dim=1)
    merged = (counts / counts.sum() * means).sum(0)
    between = (counts * (means - merged).square()).sum(0)
    return merged, all_squares.sum(0) + between, counts.sum()


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    """`values` `[C]` shaped to broadcast over x `[N, C, ...]`."""
    return values.view(-1, *[1] * (x.dim() - 2))
