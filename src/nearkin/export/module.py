"""The module that is exported: preprocessing, network and softmax in operations that exporters can translate."""

from __future__ import annotations

from copy import deepcopy
from typing import cast

import torch
from torch import Tensor, nn

from nearkin.data.transforms import LONGEST, EvalSpec
from nearkin.errors import ExportError
from nearkin.evaluation.model import Bundle
from nearkin.network import build_backbone

MOST_BITS = 22  # of the fraction of a weight; torch stops there too


class Exported(nn.Module):
    """A trained network without what training added to it (keyed dropout, hooks for CPUs, memory formats).

    raw: float `[N, C, S, S]`, normalised -> logits `[N, K]`. Otherwise uint8 `[N, H, W, C]`, decoded images of any
    size -> probabilities `[N, K]` = softmax(logits / temperature).
    """

    mean: Tensor
    std: Tensor

    def __init__(self, bundle: Bundle, *, raw: bool) -> None:
        super().__init__()
        network, description = bundle.network, bundle.description
        self.preprocess = None if raw else Preprocess(description.transform)
        self.register_buffer("mean", network.mean.detach().cpu().float().clone())
        self.register_buffer("std", network.std.detach().cpu().float().clone())
        self.backbone = plain_backbone(bundle)
        heads = (network.heads[name] for name in network.chain("logits"))
        self.heads = nn.Sequential(*map(deepcopy, heads))  # the network may be float64
        self.temperature = temperature(bundle)
        self.float().eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        if self.preprocess is None:
            return self._logits(images)
        pixels = self.preprocess(images)
        logits = self._logits((pixels / 255 - self.mean) / self.std)
        return (logits / self.temperature).softmax(1)

    def _logits(self, pixels: Tensor) -> Tensor:
        logits: Tensor = self.heads(self.backbone(pixels))
        return logits


def temperature(bundle: Bundle) -> float:
    """1 where none was fitted."""
    return bundle.description.temperature or 1.0


def plain_backbone(bundle: Bundle) -> nn.Module:
    """The backbone as timm builds it, with the trained weights, on the CPU, in eval mode."""
    spec = bundle.description.spec
    backbone = build_backbone(
        spec.model,
        pretrained=False,
        channels=spec.channels,
        image_size=spec.image_size,
        stem=spec.stem,
        drop_path=spec.drop_path,
        options=spec.model_options,
    ).module
    backbone.load_state_dict(bundle.network.backbone.state_dict())
    return backbone.eval()


class Preprocess(nn.Module):
    """The evaluation transform: uint8 `[N, H, W, C]` -> whole numbers from 0 to 255 as float32 `[N, C, S, S]`.

    Resizing is a product with a matrix for each axis, whose weights are rounded as torch rounds them for uint8 images,
    so that the pixels are those of training and evaluation. The Resize operator of ONNX rounds in another way. The
    matrices also hold the crop, so that H and W can change from call to call.

    Raises ExportError for a transform that is not bilinear and antialiased.
    """

    def __init__(self, spec: EvalSpec) -> None:
        super().__init__()
        if spec.interpolation != "bilinear" or not spec.antialias:
            raise ExportError(
                f"The images of this model are resized by {spec.interpolation} interpolation "
                f"{'with' if spec.antialias else 'without'} antialiasing, which cannot be exported; use --raw."
            )
        self.resize, self.side = spec.resize, spec.image_size

    def forward(self, images: Tensor) -> Tensor:
        pixels = images.permute(0, 3, 1, 2).float()
        height, width = pixels.shape[-2:]
        longest = LONGEST * _shorter(height, width)
        across = resizing(width, _shorter(width, longest), height, self.resize, self.side)
        pixels = _rounded(pixels @ across.T)
        down = resizing(height, _shorter(height, longest), width, self.resize, self.side)
        return _rounded(down @ pixels)


def _rounded(pixels: Tensor) -> Tensor:
    return (pixels + 0.5).floor().clamp(0, 255)


def resizing(length: int, kept: int, other: int, resize: int, side: int) -> Tensor:
    """The matrix `[side, length]` that cuts an axis to `kept` pixels, resizes it and cuts out the centre.

    other: length of the other axis. The short side becomes `resize`, so this axis resize * kept // min(kept, other).
    Row i holds the weights of the output pixel i + crop: triangles of width max(1, scale) around scale * (i + 0.5),
    with scale = kept / resized, which sum to 1 and are rounded to as many bits as leave the largest below 2^15.
    """
    resized = resize * kept // _shorter(kept, other)
    scale = torch.ones((), dtype=torch.float64) * kept / resized
    reach = scale.clamp(min=1.0)
    centre = scale * (torch.arange(resized, dtype=torch.float64)[:, None] + 0.5)
    place = torch.arange(length, dtype=torch.float64)[None] - _half(length - kept)
    first = (centre - reach + 0.5).floor().clamp(min=0)
    last = (centre + reach + 0.5).floor().clamp(max=kept)
    weights = (1 - ((place - centre + 0.5) / reach).abs()).clamp(min=0)
    weights = weights * ((place >= first) & (place < last))
    weights = weights / weights.sum(1, keepdim=True)
    bits = torch.arange(1, MOST_BITS + 1, dtype=torch.float64)
    fitting = (weights.max() * torch.exp2(bits) + 0.5).floor() < 2**15
    unit = torch.exp2(fitting.to(torch.float64).sum())
    rows = torch.arange(side) + _half(resized - side)
    return ((weights * unit + 0.5).floor() / unit).float().index_select(0, rows)


def _shorter(one: int, other: int) -> int:
    """min, for sides that torch.export traces as symbols."""
    return cast("int", torch.sym_min(one, other))


def _half(pixels: int) -> int:
    """round(pixels / 2), with half a pixel to the even side as Python rounds."""
    return pixels // 2 + (pixels % 2) * (pixels // 2 % 2)
