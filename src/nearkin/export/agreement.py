"""Compares an exported model with nearkin's own numbers, on the images of a split and on made-up ones."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from nearkin.data.dataset import Split
from nearkin.data.transforms import EvalSpec, eval_transform
from nearkin.errors import ExportError, counted, printable
from nearkin.evaluation.calibration import scaled
from nearkin.evaluation.evaluator import mean_probabilities
from nearkin.evaluation.model import Bundle
from nearkin.export.formats import Runner
from nearkin.export.manifest import CHECK, Checked, Manifest
from nearkin.export.module import temperature
from nearkin.network import read_safetensors

BATCH = 16
TOLERANCE = 1e-3  # of a probability; of a logit relative to the largest where that exceeds 1
TIE = 1e-5  # two classes that are as close are equally probable up to rounding


class Compared(NamedTuple):
    """Rows compared, rows with another most probable class, and the largest difference between two outputs."""

    rows: int
    wrong: int
    largest: float

    def __add__(self, other: Compared) -> Compared:  # type: ignore[override]  # of two results, not two tuples
        return Compared(
            self.rows + other.rows, self.wrong + other.wrong, max(self.largest, other.largest)
        )


NOTHING = Compared(0, 0, 0.0)


def compare(given: Tensor, expected: Tensor) -> Compared:
    """`[N, K]` outputs of an exported model and of nearkin. A difference that is not a number counts as infinite.

    A class counts as the same where nearkin's own output for it is within TIE of its largest.
    """
    if given.shape != expected.shape:
        return Compared(len(expected), len(expected), float("inf"))
    scale = max(1.0, float(expected.abs().max()))
    chosen = expected.gather(1, given.argmax(1, keepdim=True))[:, 0]
    wrong = int((chosen < expected.max(1).values - TIE * scale).sum())
    largest = float((given - expected).abs().nan_to_num(torch.inf).max())
    return Compared(len(expected), wrong, largest)


def require(found: Compared, expected_scale: float, what: str) -> None:
    """Raises ExportError unless all most probable classes are the same and the outputs within TOLERANCE."""
    if found.wrong:
        raise ExportError(
            f"The {what} gives another class than nearkin in {found.wrong} of {counted(found.rows, 'comparison')} "
            f"(largest difference {found.largest:.2g})."
        )
    if not found.largest <= TOLERANCE * max(1.0, expected_scale):
        raise ExportError(
            f"The outputs of the {what} differ from nearkin's by up to {found.largest:.2g}, which is no rounding."
        )


class Expected:
    """nearkin's own outputs for images, in the unit of an exported model."""

    def __init__(self, bundle: Bundle, *, raw: bool, logits: bool) -> None:
        self._bundle, self._raw, self._logits = bundle, raw, logits
        self.spec: EvalSpec = bundle.description.transform
        self.transform = eval_transform(self.spec)

    @torch.no_grad()
    def outputs(self, prepared: Tensor) -> Tensor:
        """uint8 `[N, C, S, S]` after the evaluation transform -> `[N, K]`, as `predict` computes them."""
        logits: Tensor = self._bundle.network(prepared).logits
        if self._logits:
            return logits.float()
        return scaled(mean_probabilities(logits, len(prepared)), temperature(self._bundle)).float()

    def inputs(self, prepared: Tensor) -> Tensor:
        """The same images as an exported model takes them."""
        if not self._raw:
            return self._framed(prepared).permute(0, 2, 3, 1).contiguous()
        network = self._bundle.network
        return ((prepared.float() / 255 - network.mean) / network.std).float()

    def _framed(self, prepared: Tensor) -> Tensor:
        """With a black frame that makes the short side `resize`, so that preparing them again only cuts it off."""
        wide = self.spec.resize - self.spec.image_size
        before = round(wide / 2)
        frame = (before, wide - before, before, wide - before)
        return torch.nn.functional.pad(prepared, frame)


@torch.no_grad()
def agree_on(split: Split, run: Runner, expected: Expected, *, raw: bool) -> Checked:
    """Compares a model with nearkin on all images of a split: in batches of BATCH, and one at a time.

    Without `raw` the single images go in as they were decoded, of any size. The last batch is filled up with copies.

    Raises ExportError when they disagree.
    """
    found, scale = NOTHING, 0.0
    for decoded in _chunks(split):
        prepared = torch.stack([expected.transform(image) for image in decoded])
        wanted = expected.outputs(prepared)
        inputs = expected.inputs(prepared)
        filled = torch.cat([inputs, inputs[-1:].expand(BATCH - len(inputs), *inputs.shape[1:])])
        found += compare(run(filled)[: len(wanted)], wanted)
        singles = inputs if raw else [image.permute(1, 2, 0).contiguous() for image in decoded]
        for row, image in enumerate(singles):
            found += compare(run(image[None]), wanted[row : row + 1])
        scale = max(scale, float(wanted.abs().max()))
    require(found, scale, "exported model")
    return Checked(
        split=split.name,
        images=found.rows // 2,
        batch_sizes=(1, BATCH),
        largest_difference=found.largest,
    )


def _chunks(split: Split) -> Iterator[list[Tensor]]:
    count = len(split.labels)
    for start in range(0, count, BATCH):
        yield [split.images.read(row) for row in range(start, min(start + BATCH, count))]


def check_tensors(expected: Expected, *, raw: bool) -> dict[str, Tensor]:
    """Made-up images and nearkin's outputs for them, for `check_bundle`: two batches of different size.

    No image of the user's is in them, since bundles are passed on. Smooth noise; without `raw` the second batch has
    another height and width.
    """
    generator, spec = torch.Generator().manual_seed(0), expected.spec

    def made(number: int, high: int, wide: int) -> Tensor:
        coarse = torch.rand(number, spec.channels, 7, 7, generator=generator) * 255
        smooth = torch.nn.functional.interpolate(coarse, (high, wide), mode="bicubic")
        return (smooth + 20 * torch.rand(smooth.shape, generator=generator)).clamp(0, 255).byte()

    tensors: dict[str, Tensor] = {}
    sizes = [(3, spec.resize, spec.resize), (1, spec.resize * 3 // 2, spec.resize * 2 + 1)]
    for place, (number, high, wide) in enumerate(sizes):
        images = made(number, high, wide)
        prepared = torch.stack([expected.transform(image) for image in images])
        inputs = expected.inputs(prepared) if raw else images.permute(0, 2, 3, 1)
        tensors[f"inputs.{place}"] = inputs.contiguous()
        tensors[f"outputs.{place}"] = expected.outputs(prepared).contiguous()
    return tensors


@torch.no_grad()
def check_bundle(folder: Path, manifest: Manifest, run: Runner) -> float:
    """Runs the check inputs of a bundle and returns the largest difference from the outputs stored with them.

    Raises ExportError when they differ.
    """
    tensors = read_safetensors(folder / CHECK)
    places = sorted(name.removeprefix("inputs.") for name in tensors if name.startswith("inputs."))
    found, scale = NOTHING, 0.0
    for place in places:
        expected = tensors.get(f"outputs.{place}")
        if expected is None or expected.shape[1:] != (len(manifest.classes),):
            raise ExportError(
                f"{printable(str(folder / CHECK))} does not fit the manifest; export the run anew."
            )
        found += compare(run(tensors[f"inputs.{place}"]), expected)
        scale = max(scale, float(expected.abs().max()))
    if not found.rows:
        raise ExportError(
            f"{printable(str(folder / CHECK))} holds no check inputs; export the run anew."
        )
    require(found, scale, f"{manifest.kind} model in {printable(str(folder))}")
    return found.largest
