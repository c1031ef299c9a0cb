"""nearkin fewshot RUN DATA"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nearkin.cli import show
from nearkin.cli.arguments import Parser
from nearkin.config import EpisodeOptions
from nearkin.errors import ConfigError

if TYPE_CHECKING:
    from nearkin.evaluation.results import FewShot

USAGE = "nearkin fewshot RUN DATA [--ways 5] [--shots 1] [--json]"
ABOUT = "Few-shot accuracy of the model's features: new classes, learned from a few images of each."


def parser() -> Parser:
    parser = Parser(USAGE, ABOUT)
    parser.add_argument("run", nargs="?", metavar="RUN", help="the folder that train printed")
    parser.add_argument("data", nargs="?", metavar="DATA", help="images outside RUN's training")
    parser.options(EpisodeOptions)
    parser.flag("json", "one JSON object on stdout")
    return parser


def main(given: dict[str, Any]) -> int:
    run, data = given.pop("run", None), given.pop("data", None)
    as_json = given.pop("json", False)
    if run is None or data is None:
        raise ConfigError("Give the folder that train printed, then the images to draw from.")
    from nearkin.evaluation.fewshot import fewshot

    result = fewshot(run, data, **given)
    show(result.to_dict(), line(result), as_json=as_json, notes=result.notes, kind="warning")
    return 0


def line(result: FewShot) -> str:
    """The mean with its interval, in percent, and what it is the mean of."""
    return (
        f"{result.ways}-way {result.shots}-shot: "
        f"{100 * result.mean:.2f} ± {100 * result.interval:.2f} % "
        f"({result.episodes} episodes, {result.queries} queries a class, 95 % interval; "
        f"{result.eligible} of {result.classes} classes have {result.shots + result.queries} images)\n"
    )
