"""Whether a running loss stands where a network stands that tells no images apart."""

from __future__ import annotations

from collections.abc import Mapping

NEAR = 0.01  # relative distance that counts as standing there
SMALL = 1e-3  # a term whose collapsed value is next to nothing says nothing
PATIENCE = 2  # epochs in a row


class CollapseWatch:
    """Warns once a stage when a term of the loss has stood at its collapsed value for two epochs in a row.

    The first epoch does not count: an untrained network stands there too. Source: our choice.
    """

    def __init__(self) -> None:
        self._stage, self._told = "", False
        self._since: dict[str, int] = {}

    def look(
        self, stage: str, epoch: int, means: Mapping[str, float], collapsed: Mapping[str, float]
    ) -> str | None:
        """means: of the terms over the epoch (from 0); collapsed: what equal embeddings give. A sentence, or None."""
        if stage != self._stage:
            self._stage, self._told, self._since = stage, False, {}
        if epoch == 0 or self._told:
            return None
        for term, value in collapsed.items():
            there = value > SMALL and abs(means[term] - value) <= NEAR * value
            self._since[term] = self._since.get(term, 0) + 1 if there else 0
        stuck = [term for term, epochs in self._since.items() if epochs >= PATIENCE]
        if not stuck:
            return None
        self._told = True
        return (
            f"In epoch {epoch + 1} of {stage} the term {stuck[0]} is {means[stuck[0]]:.4f}, and a network whose "
            f"embeddings are all alike gives {collapsed[stuck[0]]:.4f}: it has collapsed, or has not begun to learn. "
            "Try a lower --lr, a longer --warmup-epochs, or a higher temperature."
        )
