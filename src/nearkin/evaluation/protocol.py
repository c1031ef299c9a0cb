"""The options of few-shot episodes. No torch: the command line shows them at once."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field


def _option(default: Any, description: str) -> Any:
    return Field(default, description=description)


class Protocol(BaseModel):
    """What an episode is, how many there are, and where they are computed. Source of the defaults: SCHaNe's code."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ways: Annotated[int, Field(ge=2)] = _option(5, "classes in an episode")
    shots: Annotated[int, Field(ge=1)] = _option(1, "labelled images of each class")
    queries: Annotated[int, Field(ge=1)] = _option(15, "images of each class to classify")
    episodes: Annotated[int, Field(ge=2)] = _option(3000, "episodes to average")
    copies: Annotated[int, Field(ge=0)] = _option(
        5, "augmented copies of a labelled image; 0 = the image itself, once"
    )
    split: str | None = _option(None, "train, val or test; default test, else val, else all")
    seed: Annotated[int, Field(ge=0, lt=1 << 62)] = _option(0, "seed of episodes and copies")
    bad_images: Literal["error", "skip"] = _option(
        "error", "unreadable images stop or go (RUN's own data: as in its training)"
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = _option("auto", "where to compute features")
    workers: Annotated[int, Field(ge=0)] = _option(0, "processes that load images")

    @property
    def needed(self) -> int:
        """Images that a class must have: those of its support and its queries."""
        return self.shots + self.queries
