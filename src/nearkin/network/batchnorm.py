"""BatchNorm with statistics over all ranks: N ranks compute what one process computes on the whole batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from nearkin.distributed import gather_rows, sum_over_ranks
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
    found = [
        m for m in module.modules() if isinstance(m, _BatchNorm) and type(m) is not SyncBatchNorm
    ]
    for norm in found:
        _check_known(norm)
    if device_type == "cuda":
        from timm.layers.norm_act import convert_sync_batchnorm

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
        statistics = _statistics(x.detach())
        if self.track_running_stats:
            self._track(statistics)
        ones, zeros = statistics.mean.new_ones(()), statistics.mean.new_zeros(())
        weight = ones.expand(self.num_features) if self.weight is None else self.weight
        bias = zeros.expand(self.num_features) if self.bias is None else self.bias
        inverse = torch.rsqrt(statistics.squares / statistics.n + self.eps)
        output: Tensor = _Normalise.apply(x, statistics.mean, inverse, statistics.n, weight, bias)
        return output

    @torch.no_grad()
    def _track(self, statistics: _Statistics) -> None:
        if (
            self.running_mean is None
            or self.running_var is None
            or self.num_batches_tracked is None
        ):
            return
        self.num_batches_tracked += 1
        momentum = self.momentum
        if momentum is None:  # the plain average over all batches so far
            momentum = 1.0 / float(self.num_batches_tracked)
        unbiased = statistics.squares / (statistics.n - 1)
        self.running_mean.lerp_(statistics.mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), momentum)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"BatchNorm needs [N, C, ...], not {tuple(input.shape)}.")


class _Statistics(NamedTuple):
    """mean: `[C]`. squares: `[C]`, the sum of squared distances from the mean. n: scalar, values per channel."""

    mean: Tensor
    squares: Tensor
    n: Tensor


def _check_known(norm: _BatchNorm) -> None:
    from timm.layers.norm_act import BatchNormAct2d

    if type(norm) not in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, BatchNormAct2d):
        raise ConfigError(
            f"{type(norm).__name__} cannot be synchronised between processes; "
            "train with one process or choose a model with another normalisation."
        )


@torch.no_grad()
def _statistics(x: Tensor) -> _Statistics:
    """Statistics of the channels of x `[N, C, ...]` over all ranks, by the update of Chan, Golub and LeVeque (1979)."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    dims = _all_but_channels(x)
    mean = wide.mean(dims)
    squares = (wide - _per_channel(mean, x)).square_().sum(dims)
    count = x.numel() // x.shape[1]
    row = torch.cat([mean, squares, mean.new_full((1,), count)])
    rows = gather_rows(row[None])
    if rows.shape[0] * count < 2:
        raise ValueError(
            "BatchNorm needs more than one value per channel to train; use a larger batch."
        )
    means, all_squares, counts = torch.split(rows, [x.shape[1], x.shape[1], 1], dim=1)
    total = counts.sum()
    merged = (counts / total * means).sum(0)
    between = (counts * (means - merged).square()).sum(0)
    return _Statistics(merged, all_squares.sum(0) + between, total)


class _Normalise(torch.autograd.Function):
    """y = (x - mean) * inverse * weight + bias, where mean and inverse are the statistics of x over all ranks.

    With h = (x - mean) * inverse, g = dL/dy and sums over all ranks:
    dL/dx = weight * inverse * (g - sum(g) / n - h * sum(g h) / n); dL/dweight and dL/dbias are this rank's
    share of sum(g h) and sum(g), which DDP sums like any other gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        mean: Tensor,
        inverse: Tensor,
        count: Tensor,
        weight: Tensor,
        bias: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x, mean, inverse, count, weight)
        centred = x.to(mean.dtype) - _per_channel(mean, x)
        scale = _per_channel(inverse * weight, x)
        return torch.addcmul(_per_channel(bias.to(mean.dtype), x), centred, scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, inverse, count, weight = ctx.saved_tensors
        dims = _all_but_channels(x)
        wide = grad.to(mean.dtype)
        normal = (x.to(mean.dtype) - _per_channel(mean, x)) * _per_channel(inverse, x)
        local = torch.stack([wide.sum(dims), (wide * normal).sum(dims)])
        shift, slope = sum_over_ranks(local) / count
        wide = wide - _per_channel(shift, x) - normal * _per_channel(slope, x)
        into_x = (wide * _per_channel(inverse * weight, x)).to(x.dtype)
        return into_x, None, None, None, local[1].to(weight.dtype), local[0].to(weight.dtype)


def _all_but_channels(x: Tensor) -> list[int]:
    return [0, *range(2, x.dim())]


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    """`values` `[C]` shaped to broadcast over x `[N, C, ...]`."""
    return values.view(-1, *[1] * (x.dim() - 2))
