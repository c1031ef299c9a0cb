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

    A subclass gives `lowered`. The head emits scale * cosine, so that what is judged and used later is the softmax
    without the margin (docs/decisions/008). Of a mixed image both classes are taken in turn.
    """

    class Config(Objective.Config):
        """Scale for few classes: our choice (docs/methods); 30 to 64 suit many."""

        scale: float = option(16.0, "of the cosines, before the softmax", gt=0)

    config: Config

    def lowered(self, cosine: Tensor, labels: Tensor) -> Tensor:
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
            return self.classify(self.lowered(cosine, classes), classes)

        return combine(ce=(1.0, per_class(against, batch.labels)))
