"""The objectives, one file per family. Every file in this package is imported; a new file is a new objective."""

from __future__ import annotations

import importlib
import pkgutil
from importlib.metadata import entry_points

from nearkin.catalogue import ENTRY_POINTS, unknown_objective
from nearkin.network import Head
from nearkin.objectives.attract_repulse import AttractRepulse
from nearkin.objectives.base import Objective, Stage
from nearkin.objectives.classification import CrossEntropy, SymmetricCE
from nearkin.objectives.cone import CoNe
from nearkin.objectives.contrast import Sincere, SupCon, VarCon
from nearkin.objectives.gpaco import GPaCo
from nearkin.objectives.margin import ArcFace, CosFace
from nearkin.objectives.metric import OrthogonalProjection, Triplet
from nearkin.objectives.schane import SCHaNe
from nearkin.objectives.sigsup import SigSup

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")


def get(name: str) -> type[Objective]:
    """The objective of that name, built in or from an installed package's `nearkin.objectives` entry point.

    Raises ConfigError for an unknown name.
    """
    if name not in Objective.registry:
        for point in entry_points(group=ENTRY_POINTS):
            point.load()
    if name not in Objective.registry:
        raise unknown_objective(name, Objective.registry)
    return Objective.registry[name]


__all__ = [
    "ArcFace",
    "AttractRepulse",
    "CoNe",
    "CosFace",
    "CrossEntropy",
    "GPaCo",
    "Head",
    "Objective",
    "OrthogonalProjection",
    "SCHaNe",
    "SigSup",
    "Sincere",
    "Stage",
    "SupCon",
    "SymmetricCE",
    "Triplet",
    "VarCon",
    "get",
]
