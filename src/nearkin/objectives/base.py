"""The interface of every objective. A new objective is one new file in this package."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, ClassVar, Literal, NamedTuple, Self, overload

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from nearkin.bank import NeighbourBank
from nearkin.config import AutoShare, option
from nearkin.functional import PerAnchor, cross_entropy, mean_valid, soft_pairs
from nearkin.functional._checks import check_classes, check_labels
from nearkin.functional._common import class_rows
from nearkin.network import Head
from nearkin.teacher import TeacherPolicy
from nearkin.types import Batch, Facts, Loss, Outputs, Progress

Start = Literal["continue", "best"]
Attach = Literal["auto", "features", "projection"]
Pairs = Literal["none", "class", "crops", "bank"]
USUAL_TEMPERATURE = 0.1  # of objectives without one
SHOWN_NEIGHBOURS = 50


class Stage(NamedTuple):
    """A stage of training.

    name: shown in the journal and in checkpoints. share: of the epochs; the shares of all stages sum to 1.
    heads: the active ones; the others are frozen and not run.
    start: `continue` with the last weights, or the `best` so far.
    views: crops loaded per image, the teacher's own crop included.
    teacher: how the teacher is updated, or None for no teacher.
    coupled: whether an anchor's value depends on the other samples of the batch. positives: whether an anchor needs
    another image of its class in the batch. freeze_backbone: the backbone gets no gradient and runs in eval mode.
    lr: the stage's peak learning rate as a share of the run's.
    final: whether student or teacher is evaluated and saved.
    pairs: the positives of a crop: every other crop of its class in the batch, other crops of the same image, or other
    images of its class in a bank. within: they are in the same block of so many images; None: in the whole batch.
    """

    name: str
    share: float
    heads: tuple[str, ...]
    start: Start = "continue"
    views: int = 1
    teacher: TeacherPolicy | None = None
    coupled: bool = False
    positives: bool = False
    freeze_backbone: bool = False
    lr: float = 1.0
    final: Literal["student", "teacher"] = "student"
    pairs: Pairs = "none"
    within: int | None = None

    @property
    def student_views(self) -> int:
        """How many of the views the student reads: all but a crop of the teacher's own."""
        return self.views - int(self.teacher is not None and self.teacher.crop == "own")


class Attention(NamedTuple):
    """Weights of the `neighbours` nearest images: the softmax of their cosines / `temperature`."""

    temperature: float
    neighbours: int


class Objective(nn.Module):
    """One training objective: a loss of the network's outputs, and the heads that it trains.

    config: the options; every `auto` is resolved here. dim: width of the backbone's features. classes: C.
    images, batch_size: training images and images per step, from which `auto` sizes follow. Their defaults give a bank
    of 4096 entries. device: type of the device that trains, from which the precision of a bank follows. pretrained:
    whether the backbone is, from which follows what is contrasted.

    `heads` belong to the network (`Network(backbone, objective.heads, ...)`), and so do their weights. The objective
    itself has no state but its bank.

    A subclass registers itself: `class CoNe(Objective, name="cone")`; it may be defined again. Without a name it is a
    base class of others. The first line of its docstring is shown by `nearkin list objectives`. Its nested frozen
    `Config` declares the options with defaults, ranges and descriptions, from which the command line, YAML and docs are
    made. `two_classes`: whether its loss takes rows of labels of at most two classes only.
    """

    registry: ClassVar[dict[str, type[Objective]]] = {}
    name: ClassVar[str]
    heads: dict[str, Head]
    two_classes: ClassVar[bool] = False

    class Config(BaseModel):
        """Options that every objective has."""

        model_config = ConfigDict(frozen=True, extra="forbid")
        smoothing: AutoShare = option(
            "auto", "label smoothing of the cross-entropy; auto: 0.1 if pretrained, else 0"
        )

        def resolve(self, facts: Facts) -> Self:  # noqa: ARG002 - most objectives have nothing to resolve
            """The same options with every `auto` replaced by a number that follows from `facts`."""
            return self

        def fill(self, **values: object) -> Self:
            """The same options with `values` in place of `auto`."""
            auto = {name: v for name, v in values.items() if getattr(self, name) == "auto"}
            return self.model_copy(update=auto)

    class_weights: Tensor | None

    def __init_subclass__(cls, name: str = "", **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        if "heads" in cls.__dict__:
            raise TypeError(f"{cls.__name__}.heads would be overwritten: `build` makes the heads.")
        if not issubclass(cls.Config, Objective.Config):
            raise TypeError(f"{cls.__name__}.Config must be a subclass of Objective.Config.")
        if name:
            old = Objective.registry.get(name, cls)
            places = {old.__module__, cls.__module__} - {"__main__", "__mp_main__"}  # of one script
            if old.__qualname__ != cls.__qualname__ or len(places) > 1:
                raise TypeError(f"{name} is the name of {old.__qualname__} already; take another.")
            cls.name = name
            Objective.registry[name] = cls

    def __init__(
        self,
        config: Config | None = None,
        *,
        dim: int,
        classes: int,
        images: int = 8192,
        batch_size: int = 128,
        device: str = "cpu",
        pretrained: bool = False,
    ) -> None:
        super().__init__()
        facts = Facts(dim, classes, images, batch_size, device, pretrained)
        smoothing = 0.1 if pretrained else 0.0
        if not isinstance(config, self.Config | None):
            raise TypeError(
                f"The options of {type(self).__name__} must be a {type(self).__name__}.Config, not a "
                f"{type(config).__qualname__} of another class or of its earlier definition."
            )
        self.config = (config or self.Config()).fill(smoothing=smoothing).resolve(facts)
        self.classes = classes
        self.register_buffer("class_weights", None, persistent=False)
        self.heads = self.build(dim, classes)

    def attention(self) -> Attention:
        """How the nearest training images of an image are weighted when they are shown as evidence."""
        return Attention(getattr(self.config, "temperature", USUAL_TEMPERATURE), SHOWN_NEIGHBOURS)

    def weigh_classes(self, weights: Tensor | None) -> None:
        """Weigh every cross-entropy term by class. weights: `[C]`, or None for equal weights."""
        self.class_weights = weights

    def classify(self, logits: Tensor, labels: Tensor) -> PerAnchor:
        """The cross-entropy term, with label smoothing and class weights."""
        smoothing, weights = self.config.smoothing, self.class_weights
        return cross_entropy(
            logits, labels, smoothing=smoothing, class_weights=weights, validate=False
        )

    def weigh(self, losses: PerAnchor, labels: Tensor) -> PerAnchor:
        """Losses that replace a cross-entropy, each times the weight of its class; unchanged without weights."""
        if self.class_weights is None:
            return losses
        weights = self.class_weights.to(losses.value.dtype)
        own = weights[labels] if labels.ndim == 1 else labels.to(weights.dtype) @ weights
        return PerAnchor(losses.value * own, losses.valid)

    def build(self, dim: int, classes: int) -> dict[str, Head]:
        """The heads, in the order they run; an objective with a bank creates it here as well.

        Called once, by the constructor, with `config` resolved. Default: one linear classifier.
        """
        return {"classifier": Head(nn.Linear(dim, classes), reads="features", writes="logits")}

    def stages(self) -> tuple[Stage, ...]:
        """The stages of training, in order. Default: one that classifies one crop of each image."""
        return (Stage("classify", 1.0, heads=("classifier",)),)

    def __call__(
        self, batch: Batch, student: Outputs, teacher: Outputs | None, progress: Progress
    ) -> Loss:
        """`forward`, for labels in [0, C) or rows that sum to 1 (of at most two classes where `two_classes`), image
        numbers that are not negative, and a stage of `stages()`. Raises ValueError for others, from which a loss would
        follow that trains something else; on a GPU it is an assertion for tensors. A loop that knows its batches may
        call `forward`, which does not look at them."""
        check_labels(batch.labels, len(batch.labels), classes=self.classes, validate=True)
        if self.two_classes and batch.labels.ndim == 2:
            soft_pairs(batch.labels, validate=True)
        # Of two numbers, as of a mixed image, the second may be missing: -1.
        check_classes("index", batch.index.view(len(batch.labels), -1)[:, 0], None)
        names = [stage.name for stage in self.stages()]
        if progress.stage not in names:
            raise ValueError(
                f"{type(self).__name__} has no stage {progress.stage!r}; it has {', '.join(names)}."
            )
        loss: Loss = super().__call__(batch, student, teacher, progress)
        return loss

    def forward(
        self, batch: Batch, student: Outputs, teacher: Outputs | None, progress: Progress
    ) -> Loss:
        """The loss of a gathered global batch. Pure: changes no state. Called by `objective(...)`.

        batch.labels and batch.index have B rows, the outputs `student_views * B` (view after view).
        """
        raise NotImplementedError

    def update(self, batch: Batch, student: Outputs, teacher: Outputs | None) -> None:
        """Write the bank, once after each optimiser step. Most objectives have none."""

    @torch.no_grad()
    def at_collapse(
        self, batch: Batch, student: Outputs, teacher: Outputs | None, progress: Progress
    ) -> Loss:
        """The loss of this batch for constant embeddings, in a bank as well: that of a collapsed network."""
        with ExitStack() as stack:
            for module in self.modules():
                if isinstance(module, NeighbourBank):
                    stack.enter_context(module.collapsed())
            other = None if teacher is None else _collapsed(teacher)
            return self.forward(batch, _collapsed(student), other, progress)


def attach_option() -> Any:
    """The option of every contrastive objective that says which rows it contrasts."""
    return option(
        "auto", "what is contrasted: the backbone's features (auto if pretrained), or a projection"
    )


def default_attach(facts: Facts) -> Attach:
    """The value of an automatic `attach`: pretrained features are good, and a fresh projection hides them."""
    return "features" if facts.pretrained else "projection"


def default_views(facts: Facts) -> int:
    """The value of automatic `views`: from pretrained weights other images of the class are enough."""
    return 1 if facts.pretrained and facts.images >= 2 * facts.classes else 2


def attached(attach: Attach, projection: nn.Module) -> nn.Module:
    """The head whose output is contrasted: `projection`, or the features as they are."""
    return nn.Identity() if attach == "features" else projection


def combine(**terms: tuple[float | Tensor, PerAnchor | Tensor]) -> Loss:
    """total = sum of weight * mean over the valid anchors, for `name=(weight, losses)`; a Tensor is a mean already.
    Raises TypeError for losses without a weight."""
    bare = [name for name, term in terms.items() if isinstance(term, PerAnchor)]
    if bare:  # a pair as well, which would be taken for a weight and its losses
        raise TypeError(f"{bare[0]} has no weight; write {bare[0]}=(1.0, losses).")
    means = {n: x if isinstance(x, Tensor) else mean_valid(x) for n, (_, x) in terms.items()}
    total = torch.stack([weight * means[name] for name, (weight, _) in terms.items()]).sum()
    return Loss(total, {name: value.detach() for name, value in means.items()})


def lonely(losses: PerAnchor) -> dict[str, Tensor]:
    """For `Loss.counts`: the number of anchors without a positive, which give no gradient."""
    return {"without_positive": (~losses.valid).sum()}


def per_class(function: Callable[[Tensor], PerAnchor], labels: Tensor) -> PerAnchor:
    """`function` of integer labels, for soft ones too: lam L(a) + (1 - lam) L(b) over a sample's two classes.

    labels: `[N]`, or `[N, C]` rows of at most two classes. Valid if either part is; a missing part counts 0.
    """
    if labels.ndim == 1:
        return function(labels)
    pairs = soft_pairs(labels, validate=False)
    shares, counts = [], []
    for classes, weights in zip(pairs.labels.unbind(1), pairs.weights.unbind(1), strict=True):
        part = function(classes)
        counts.append(part.valid & (weights > 0))
        shares.append((weights.to(part.value.dtype) * part.value).where(counts[-1], 0))
    return PerAnchor(shares[0] + shares[1], counts[0] | counts[1])


def smoothed(labels: Tensor, classes: int, smoothing: float, dtype: torch.dtype) -> Tensor:
    """Labels as rows (1 - s) y + s / C, torch's form; as they are where s is 0."""
    if smoothing == 0:
        return labels
    wide = torch.promote_types(dtype, torch.float32)
    return (1 - smoothing) * class_rows(labels, classes, wide) + smoothing / classes


def _collapsed(outputs: Outputs) -> Outputs:
    """Constant embeddings, equal logits; learned numbers stay."""
    constant: dict[str, Any] = {
        name: None if value is None else torch.full_like(value, float(name != "logits"))
        for name, value in outputs._asdict().items()
    }
    return Outputs(**constant)._replace(scale_bias=outputs.scale_bias)


def unit(rows: Tensor) -> Tensor:
    """Rows of unit length, at least in float32; a zero row stays zero."""
    return nn.functional.normalize(rows.to(torch.promote_types(rows.dtype, torch.float32)), dim=1)


def repeat_views(rows: Tensor, outputs: Tensor) -> Tensor:
    """`rows` `[B, ...]` repeated view after view until they match `outputs` `[V * B, ...]`."""
    views = outputs.shape[0] // rows.shape[0]
    return torch.cat([rows] * views) if views > 1 else rows


@overload
def required(output: Tensor | None) -> Tensor: ...
@overload
def required(output: Outputs | None, field: str) -> Tensor: ...
def required(output: Tensor | Outputs | None, field: str = "") -> Tensor:
    """The output itself, or a field of a teacher's outputs. Raises ValueError where it is missing."""
    found = getattr(output, field) if field and output is not None else output
    if not isinstance(found, Tensor):
        raise ValueError(
            f"There is no output {field}; does the stage have a teacher, and a head that writes it?"
        )
    return found


def probabilities(logits: Tensor) -> Tensor:
    """Class probabilities of logits, at least in float32."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(1)


def default_bank(facts: Facts) -> int:
    """K = min(65 536, N / 2), at least one batch: an image's own earlier copy must not be its only neighbour."""
    return max(facts.batch_size, min(65_536, facts.images // 2), 1)
