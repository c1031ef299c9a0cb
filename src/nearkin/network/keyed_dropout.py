"""Dropout and stochastic depth whose masks depend on the sample, not on the rank or micro-batch that holds it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nearkin.errors import ConfigError
from nearkin.network.batchnorm import swap_modules

_INCREMENT = 0x9E3779B97F4A7C15 - (1 << 64)
_FACTORS = (0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64))

# Random modules without a keyed version, and the attribute with their rate. By name: not every timm has them all.
UNKEYED = {
    "AlphaDropout": "p",
    "DropBlock2d": "drop_prob",
    "FeatureAlphaDropout": "p",
    "MultiheadAttention": "dropout",
    "PatchDropout": "prob",
    "PatchDropoutWithIndices": "prob",
    "ResidualDrop": "drop",
}


class RandomKey:
    """Key of the masks of a forward pass; one object for all modules of a network. Without a key torch's generator
    draws one for each pass, and equal runs need its seed.

    A row is identified by (seed, step, view, position in the global batch); row v * b + i of a forward pass over
    `rows` images is view v of position offset + i, where b = rows / views.
    """

    def __init__(self) -> None:
        self._key: tuple[int, int, int, int] | None = None
        self._rows = 0
        self._state: tuple[Tensor, Tensor] | None = None

    def set(self, seed: int, step: int, offset: int, views: int) -> None:
        """Call before each forward pass in training. offset: position of the first image in the global batch."""
        self._key, self._state = (seed, step, offset, views), None

    def begin(self, rows: int) -> None:
        """Start a forward pass over `rows` images (all views)."""
        self._rows, self._state = rows, None

    def prepare(self, device: torch.device) -> None:
        """Compute the words of the rows before the first draw. Compiled code then reads a tensor; the numbers of the
        key differ in each step and would cause a new compilation."""
        self._words(device)

    def draw(
        self, number: int, shape: Sequence[int], device: torch.device, *, shared: bool = False
    ) -> Tensor:
        """Uniform int64 of `shape` for module `number`.

        shape[0] is a multiple of the rows of the pass, and the entries of one image are contiguous, as in windowed
        attention. shared: of a tensor that all images share, of any shape. Raises ValueError for another shape[0].
        """
        rows = 1 if shared else self._rows
        if rows == 0 or shape[0] % rows:
            raise ValueError(f"A mask of {tuple(shape)} does not divide among {rows} images.")
        of_rows, of_all = self._words(device)
        elements = torch.arange(math.prod(shape) // rows, device=device) + (number << 32)
        return _absorb((of_all if shared else of_rows)[:, None], elements).view(*shape)

    def _words(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Mixed 64-bit words: `[rows]`, one per row, and `[1]` for all of them; computed once per pass."""
        if self._state is not None:
            return self._state
        row = torch.arange(self._rows, device=device)
        if self._key is None:
            drawn = torch.randint(1 << 62, (1,), device=device)
            self._state = _absorb(drawn, row), drawn
            return self._state
        seed, step, offset, views = self._key
        if self._rows % views:
            raise ValueError(f"{self._rows} images are not {views} views of the same number.")
        size = self._rows // views
        state = row.new_zeros(1)
        for number in (seed, step):
            state = _absorb(state, torch.full_like(state, number))
        of_rows = _absorb(_absorb(state, row // size), row % size + offset)
        self._state = of_rows, state
        return self._state


class KeyedDropout(nn.Module):
    """x * keep / (1 - p), keep ~ Bernoulli(1 - p) per element, or per channel with `channels`; evaluation: x.

    p: in [0, 1]. number: index of the module in the network, unique. shared: x is no batch, but the same for all
    images.
    """

    def __init__(
        self,
        p: float,
        key: RandomKey,
        number: int,
        *,
        channels: bool = False,
        shared: bool = False,
    ) -> None:
        super().__init__()
        self.p, self.key, self.number = p, key, number
        self.channels, self.shared = channels, shared

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape[:2] if self.channels else x.shape
        return _dropped(self, x, shape, self.p, 1.0 - self.p, shared=self.shared)


class KeyedDropPath(nn.Module):
    """Stochastic depth (Huang et al., 2016): x * keep / (1 - p), keep ~ Bernoulli(1 - p) per row; evaluation: x.

    p: in [0, 1]. number: as in `KeyedDropout`. scale_by_keep: False omits the division.
    """

    def __init__(self, p: float, key: RandomKey, number: int, scale_by_keep: bool = True) -> None:
        super().__init__()
        self.drop_prob, self.key, self.number, self.scale_by_keep = p, key, number, scale_by_keep

    def forward(self, x: Tensor) -> Tensor:
        share = 1.0 - self.drop_prob if self.scale_by_keep else 1.0
        return _dropped(self, x, x.shape[:1], self.drop_prob, share)


def key_randomness(module: nn.Module, key: RandomKey) -> nn.Module:
    """Replace dropout and stochastic depth of torch and timm by keyed versions, in place; returns `module`.

    They are numbered in the order of `module.modules()`. Attention with dropout takes the path that is not fused, since
    the fused kernel draws its own masks. Raises ConfigError for active random modules without a keyed version.
    """
    from timm.layers.drop import DropPath

    replacements: dict[nn.Module, nn.Module] = {}
    tables = _of_tables(module)
    for part in module.modules():
        kind, number = type(part).__name__, len(replacements)
        rate = getattr(part, UNKEYED.get(kind, ""), None)
        if isinstance(rate, float) and rate > 0.0:
            raise ConfigError(
                f"{kind} draws numbers that depend on how the batch is split; set its {UNKEYED[kind]} to 0."
            )
        if isinstance(part, nn.modules.dropout._DropoutNd):
            channels = isinstance(part, nn.Dropout1d | nn.Dropout2d | nn.Dropout3d)
            replacements[part] = KeyedDropout(
                part.p, key, number, channels=channels, shared=part in tables
            )
        elif isinstance(part, DropPath):
            by_keep = bool(part.scale_by_keep)
            replacements[part] = KeyedDropPath(float(part.drop_prob), key, number, by_keep)
        attention_dropout = getattr(part, "attn_drop", None)
        if hasattr(part, "fused_attn") and getattr(attention_dropout, "p", 0.0) > 0.0:
            part.fused_attn = False  # type: ignore[assignment]
    for part, keyed in replacements.items():
        keyed.train(part.training)
    return swap_modules(module, replacements)


def _of_tables(module: nn.Module) -> set[nn.Module]:
    """The parts of timm's networks of a few layers that compute a table of relative positions, the same for all images:
    those of `RelPosMlp`, and of Swin V2's `meta_mlp`."""
    found: set[nn.Module] = set()
    for name, part in module.named_modules():
        if type(part).__name__ == "RelPosMlp" or name.rpartition(".")[2] == "meta_mlp":
            found.update(part.modules())
    return found


def _dropped(
    module: KeyedDropout | KeyedDropPath,
    x: Tensor,
    shape: Sequence[int],
    p: float,
    share: float,
    *,
    shared: bool = False,
) -> Tensor:
    if not module.training or p == 0.0:
        return x
    if p >= 1.0:
        return x * 0.0
    threshold = min(round(p * 2**64) - 2**63, 2**63 - 1)
    keep = module.key.draw(module.number, shape, x.device, shared=shared) >= threshold
    scale = keep.to(x.dtype) / share
    return x * scale.view(*shape, *[1] * (x.dim() - len(shape)))


def _absorb(state: Tensor, word: Tensor) -> Tensor:
    """A new state from a mixed one and the next word: the finaliser of splitmix64 on state xor word.

    Integer arithmetic modulo 2^64. The map is a bijection of `word`, so different words never collide. Source:
    Steele, Lea and Flood, Fast splittable pseudorandom number generators, OOPSLA 2014 (variant 13 of Stafford).
    """
    mixed = (state ^ word) + _INCREMENT
    mixed = (mixed ^ _shift_right(mixed, 30)) * _FACTORS[0]
    mixed = (mixed ^ _shift_right(mixed, 27)) * _FACTORS[1]
    return mixed ^ _shift_right(mixed, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift; torch's operator repeats the sign bit."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
