"""What the margin-softmax objectives share: cosines as logits, and a margin on one's own class in training."""

from __future__ import annotations

from torch import Tensor

from nearkin.config import option
from nearkin.functional import PerAnchor
from nearkin.network import CosineClassifier, Head
from nearkin.objectives.base import Objective, combine, per_class, required
from nearkin.types import Batch, Loss, Outputs, Progress


class MarginSoftmax(Objective):
    """total = CE(scale * (cosines with the margin on one's own class)).

    A subclass gives `with_margin`. The head emits scale * cosine, so that evaluation uses the softmax
    without the margin (docs/decisions/008). A mixed image is computed for both of its classes.
    """

    class Config(Objective.Config):
        """Scale 16 suits few classes, 30 to 64 many (docs/methods)."""

        scale: float = option(16.0, "of the cosines, before the softmax", gt=0)

    config: Config

    def with_margin(self, cosine: Tensor, labels: Tensor) -> Tensor:
        """Logits `[N, C]` from cosines `[N, C]`, the margin applied at integer labels `[N]`."""
        raise NotImplementedError

    def build(self, dim: int, classes: int) -> dict[str, Head]:
        classifier = CosineClassifier(dim, classes, self.config.scale)
        return {"classifier": Head(classifier, reads="features", writes="logits")}

    def forward(
        self,
        batch: Batch,
        student: Outputs,
        teacher: Outputs | None,  # noqa: ARG002
        progress: Progress,  # noqa: ARG002
    ) -> Loss:
        cosine = required(student.logits) / self.config.scale

        def against(classes: Tensor) -> PerAnchor:
            return self.classify(self.with_margin(cosine, classes), classes)

        return combine(ce=(1.0, per_class(against, batch.labels)))
