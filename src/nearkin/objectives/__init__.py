"""The objectives, one file each. Every file in this package is imported; a new file is a new objective."""

from __future__ import annotations

import importlib
import pkgutil
from importlib.metadata import entry_points

from nearkin.catalogue import ENTRY_POINTS, unknown_objective
from nearkin.network import Head
from nearkin.objectives.base import Objective, Stage

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

from nearkin.objectives.arcface import ArcFace  # noqa: E402 - the loop above decides the order
from nearkin.objectives.attract_repulse import AttractRepulse  # noqa: E402
from nearkin.objectives.ce import CrossEntropy  # noqa: E402
from nearkin.objectives.cone import CoNe  # noqa: E402
from nearkin.objectives.cosface import CosFace  # noqa: E402
from nearkin.objectives.gpaco import GPaCo  # noqa: E402
from nearkin.objectives.opl import OrthogonalProjection  # noqa: E402
from nearkin.objectives.sce import SymmetricCE  # noqa: E402
from nearkin.objectives.schane import SCHaNe  # noqa: E402
from nearkin.objectives.sincere import Sincere  # noqa: E402
from nearkin.objectives.supcon import SupCon  # noqa: E402
from nearkin.objectives.triplet import Triplet  # noqa: E402
from nearkin.objectives.varcon import VarCon  # noqa: E402


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
    "Sincere",
    "Stage",
    "SupCon",
    "SymmetricCE",
    "Triplet",
    "VarCon",
    "get",
]
