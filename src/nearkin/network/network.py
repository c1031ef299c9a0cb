"""A backbone and the heads of an objective: images in, `Outputs` out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from nearkin.errors import ModelError, printable
from nearkin.network.cpu import avoid_slow_attention, fill_strides
from nearkin.network.heads import Head, Slot
from nearkin.network.keyed_dropout import RandomKey, key_randomness
from nearkin.network.layers import blocks_below_heads
from nearkin.types import Outputs


class Network(nn.Module):
    """Images -> features -> the active heads, each of which reads one field of `Outputs` and writes another.

    backbone: `[N, C, H, W]` -> `[N, dim]`. heads: by name, in the order in which they run. mean, std: per channel, of
    pixels in [0, 1]; they are buffers, so that they are saved with the weights.
    drop_rate: dropout of the pooled features, in [0, 1).

    All dropout and stochastic depth, also of the heads, is drawn from `key`, which is set before each forward pass in
    training, or never: see `RandomKey`. A deep copy has its own key.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        heads: Mapping[str, Head],
        *,
        dim: int,
        mean: Sequence[float],
        std: Sequence[float],
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.dim, self.key = dim, RandomKey()
        self._compiled, self._memory_format = False, torch.contiguous_format
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(-1, 1, 1))
        self.backbone = backbone
        self.dropout = nn.Dropout(drop_rate)
        self.heads = nn.ModuleDict({name: head.module for name, head in heads.items()})
        self._slots = {name: (head.reads, head.writes) for name, head in heads.items()}
        key_randomness(self, self.key)
        fill_strides(self)
        avoid_slow_attention(self)
        # Parameters that are fixed from the start stay fixed in every stage.
        self._fixed = frozenset(n for n, p in self.named_parameters() if not p.requires_grad)
        self._still: set[str] = set()  # names of the parts of the backbone that stay in eval mode
        self.activate(tuple(heads), freeze_backbone=False)

    @property
    def classifies(self) -> bool:
        """Whether an active head writes class logits."""
        return any(self._slots[name][1] == "logits" for name in self.active)

    def chain(self, writes: Slot) -> tuple[str, ...]:
        """The active heads that the field `writes` depends on, in the order in which they run."""
        found: list[str] = []
        for name in reversed(self.active):
            reads, written = self._slots[name]
            if written == writes:
                found.insert(0, name)
                writes = reads
        return tuple(found)

    def activate(self, heads: tuple[str, ...], freeze_backbone: bool) -> None:
        """Run and train these heads, in this order.

        The other heads, and the backbone with `freeze_backbone`, get no gradient and stay in eval mode, also after
        `train()`. Everything else learns that was not frozen when the network was made, nor by `learn_blocks`. Raises
        ModelError for a head that the network does not have.
        """
        unknown = [name for name in heads if name not in self._slots]
        if unknown:
            raise ModelError(
                f"The network has no head {printable(unknown[0])}; it has {', '.join(self._slots)}."
            )
        self.active = heads
        self.freeze_backbone = freeze_backbone
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name not in self._fixed)
        for part in self._frozen():
            part.requires_grad_(False)
        self.train(self.training)

    def learn_blocks(self, blocks: int) -> None:
        """Let only the last `blocks` blocks of the backbone and what follows them learn (`blocks_below_heads`).

        The parts before them get no gradient and stay in eval mode, so that no graph is kept for them and their
        BatchNorm keeps its statistics. Raises ConfigError for a backbone that does not name its layers.
        """
        numbers = blocks_below_heads(self.backbone)
        self._fixed |= {f"backbone.{name}" for name, number in numbers.items() if number > blocks}
        for name, part in self.backbone.named_modules(prefix="backbone"):
            own = [f"{name}.{inner}" for inner, _ in part.named_parameters()]
            if own and self._fixed.issuperset(own):
                self._still.add(name)
        self.activate(self.active, self.freeze_backbone)

    def keep_statistics(self) -> None:
        """Let BatchNorm in the backbone normalise by the statistics that it has, in training too, and keep them."""
        for name, part in self.backbone.named_modules(prefix="backbone"):
            if isinstance(part, _BatchNorm):
                self._still.add(name)
        self.train(self.training)

    def train(self, mode: bool = True) -> Network:
        """Training mode for all but the frozen parts."""
        super().train(mode)
        for part in self._frozen():
            part.eval()
        if self._still:
            parts = dict(self.named_modules())
            for name in self._still:
                parts[name].eval()
        return self

    def _frozen(self) -> list[nn.Module]:
        inactive = [head for name, head in self.heads.items() if name not in self.active]
        return [*inactive, self.backbone] if self.freeze_backbone else inactive

    def set_memory_format(self, memory_format: Literal["contiguous", "channels_last"]) -> None:
        """Convert the weights to this memory format, and from now on the images of every pass."""
        formats = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
        self._memory_format = formats[memory_format]
        self.to(memory_format=self._memory_format)

    def compile_backbone(self) -> None:
        """Compile the backbone for training; the names in the state dict stay. A deep copy is not compiled.

        The heads are small, and evaluation has batches of many sizes, each of which would be compiled again.
        """
        self.backbone.compile()
        self._compiled = True

    def forward(self, images: Tensor) -> Outputs:
        """images: `[N, C, H, W]`, uint8 or float in [0, 1], with C = len(mean).

        Raises ValueError for another C, and when a head reads a field that no head before it has written.
        """
        if images.shape[1] != len(self.mean):  # it would broadcast
            raise ValueError(f"The network reads {len(self.mean)} channels, not {images.shape[1]}.")
        if self.training:
            self.key.begin(len(images))
        if self.training and self._compiled:
            self.key.prepare(images.device)
        plain = self._compiled and not self.training
        backbone = self.backbone.forward if plain else self.backbone
        features = self.dropout(backbone(self._normalise(images)))
        if features.shape[1] != self.dim:
            raise ValueError(
                f"The backbone gives {list(features.shape)}, not pooled features [N, {self.dim}]; a model of timm does "
                "with num_classes=0."
            )
        fields: dict[str, Tensor | None] = {
            "features": features,
            "embedding": features,
            "projection": None,
            "logits": None,
            "scale_bias": None,
        }
        for name in self.active:
            reads, writes = self._slots[name]
            source = fields[reads]
            if source is None:
                raise ValueError(
                    f"The head {name} reads {reads}, which no active head before it writes."
                )
            fields[writes] = self.heads[name](source)
        return Outputs(**fields)  # type: ignore[arg-type]  # features and embedding are never None

    def _normalise(self, images: Tensor) -> Tensor:
        images = images.contiguous(memory_format=self._memory_format)
        if images.is_floating_point():
            return (images.to(self.mean.dtype) - self.mean) / self.std
        if self._memory_format != torch.channels_last:
            # In place: fresh memory for each operation costs more than the operation.
            return images.to(self.mean.dtype).div_(255).sub_(self.mean).div_(self.std)
        # Whole rows, since three values at a time take three times as long; on a CPU two images at a time, which stay
        # in its cache between the two passes. Without this, loading from a cache takes twice as long.
        scale, shift = 1 / (255 * self.std), -self.mean / self.std
        scale, shift = (each.flatten().repeat(images.shape[-1]) for each in (scale, shift))
        pixels = torch.empty_like(images, dtype=self.mean.dtype)
        together = max(1, len(images)) if images.is_cuda else 2
        rows = [each.permute(0, 2, 3, 1).flatten(2) for each in (pixels, images)]
        for out, given in zip(*(torch.split(each, together) for each in rows), strict=True):
            torch.addcmul(shift, out.copy_(given), scale, out=out)
        return pixels
