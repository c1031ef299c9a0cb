"""nearkin trains image classifiers from folders of photos, and shows the training images nearest to each prediction.

The names below load what they need when they are first used, so that importing nearkin costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nearkin.comparison.api import compare
    from nearkin.comparison.results import Comparison
    from nearkin.errors import (
        ConfigError,
        DataError,
        DivergedError,
        ExportError,
        ModelError,
        NearkinError,
        ResumableError,
        Stopped,
    )
    from nearkin.evaluation.classifier import Classifier
    from nearkin.evaluation.evaluate import evaluate
    from nearkin.evaluation.fewshot import fewshot
    from nearkin.evaluation.predict import load, predict
    from nearkin.evaluation.results import Evaluation, FewShot, Prediction
    from nearkin.training.api import Result, train

__version__ = "0.1.0"

_NAMES = {
    "nearkin.comparison.api": ("compare",),
    "nearkin.comparison.results": ("Comparison",),
    "nearkin.training.api": ("train", "Result"),
    "nearkin.evaluation.evaluate": ("evaluate",),
    "nearkin.evaluation.classifier": ("Classifier",),
    "nearkin.evaluation.predict": ("load", "predict"),
    "nearkin.evaluation.fewshot": ("fewshot",),
    "nearkin.evaluation.results": ("Evaluation", "FewShot", "Prediction"),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}

__all__ = [
    "Classifier",
    "Comparison",
    "ConfigError",
    "DataError",
    "DivergedError",
    "Evaluation",
    "ExportError",
    "FewShot",
    "ModelError",
    "NearkinError",
    "Prediction",
    "Result",
    "ResumableError",
    "Stopped",
    "__version__",
    "compare",
    "evaluate",
    "fewshot",
    "load",
    "predict",
    "train",
]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'nearkin' has no attribute {name!r}")
    return getattr(import_module(_HOME.get(name, "nearkin.errors")), name)


def __dir__() -> list[str]:
    return __all__
