"""The page of one run: what it says first, its pictures, and the data of its map and its neighbour browser."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from nearkin.errors import counted
from nearkin.evaluation.results import wilson
from nearkin.report import charts, svg, words
from nearkin.report.axes import Svg, shown
from nearkin.report.browser import cards, page_data, percent, plain
from nearkin.report.matrix import matrix
from nearkin.report.page import TEMPLATES, Picture, render

if TYPE_CHECKING:
    from nearkin.evaluation.report_data import ReportData

COLOURS = 10
MOST_BARS = 40
PER_CHART = 20


class Before(NamedTuple):
    """An earlier run on the same images, and whether it recognised each of them."""

    run: str
    right: dict[words.Image, bool]


class Facts(NamedTuple):
    """What the files of a run say. lines: of metrics.jsonl. right: as in `Before`. options: all, flat. images: equal
    for runs on equal images; None where not known. root: the folder of the images' names; where that is not known, a
    text that runs on the same folder share."""

    run: str
    lines: tuple[dict[str, Any], ...]
    right: dict[words.Image, bool]
    options: dict[str, Any]
    environment: dict[str, Any]
    images: str | None = None
    root: str = ""
    before: Before | None = None


def run_page(data: ReportData, facts: Facts) -> str:
    """One HTML file with one script of our own and without anything from elsewhere."""
    script = (TEMPLATES / "report.js").read_text(encoding="utf-8")
    # Browsers hash the text between the tags.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    worst, uncertain = cards(data, data.worst), cards(data, data.uncertain)
    top = matrix(data.metrics.confusion, data.classes)
    return render(
        "report.html",
        script=Svg(script),
        script_hash=Svg(f"sha256-{digest}"),
        data=Svg(page_data(data, facts.run)),
        sprite=Svg(base64.b64encode(data.sprite.data).decode()),
        side=data.sprite.side,
        columns=data.sprite.columns,
        rows=data.sprite.rows,
        title=f"{facts.run}: report by nearkin",
        subject=_subject(facts),
        headline=words.headline(data),
        extent=words.extent(data),
        tiles=_tiles(data, facts),
        first=words.look_first(data),
        first_place=(worst or uncertain)[0]["place"],
        tsne=data.images.other_places is not None,
        classes=data.classes,
        legend=data.classes if len(data.classes) <= COLOURS else (),
        map_note=_map_note(data),
        worst=worst,
        uncertain=uncertain,
        suspicious=cards(data, data.suspicious),
        matrix=top,
        matrix_note=_matrix_note(len(top.names), top.total),
        pairs=_pairs(data),
        class_bars=_class_bars(data),
        calibration_note=_calibration_note(data),
        calibration=_calibration(data),
        curves=_curves(facts.lines),
        command=facts.environment.get("command", "not known"),
        environment=_environment(facts),
        options=sorted((name, plain(value)) for name, value in facts.options.items()),
        reading=_reading(data),
    )


def _subject(facts: Facts) -> str:
    options = facts.options
    return f"{options.get('objective')} on {options.get('model')}, trained on {options.get('data')}, in {facts.run}"


def _tiles(data: ReportData, facts: Facts) -> list[words.Tile]:
    found = [words.probe_tile(facts.lines)]
    if facts.before is not None:
        found.append(words.before_tile(facts.right, *facts.before))
    balanced, log_loss = data.metrics.macro.recall, data.metrics.log_loss
    found.append(
        words.Tile(
            "Mean over the classes",
            f"{shown(100 * balanced, 1)} %",
            "recall, with each class counting the same.",
        )
    )
    confidence = data.confidence if data.calibrated is None else data.calibrated
    found.append(
        words.Tile(
            "Confidence, on average",
            f"{shown(100 * float(confidence.mean()), 1)} %",
            f"where {shown(100 * data.metrics.top1, 1)} % are right; log loss {shown(log_loss, 3)} "
            "as trained.",
        )
    )
    return [tile for tile in found if tile is not None]


def _map_note(data: ReportData) -> str:
    shares = f"PCA shows {percent(data.variance)} of the variance."
    repeat = (
        f" Ten colours repeat over {len(data.classes)} classes; choose one class to see it alone."
        if len(data.classes) > COLOURS
        else ""
    )
    tsne = ""
    if data.images.other_places is not None:
        tsne = " t-SNE keeps near images near, and distances between groups mean little."
        there = int(np.isfinite(data.images.other_places[:, 0]).sum())
        if there < len(data.images.names):
            tsne += f" It shows {there} of the {len(data.images.names)} images, PCA all of them."
    return (
        f"Squares are training images, circles images of {data.split}.{repeat} {shares}{tsne} "
        "After a click on the map the wheel zooms."
    )


def _matrix_note(kept: int, total: int) -> str:
    some = f"The {kept} most confused of {total} classes. " if kept < total else ""
    return (
        f"{some}Rows are labels, columns what the model said. Classes that are confused stand together. "
        "Choose a cell to see its images."
    )


def _pairs(data: ReportData) -> list[dict[str, Any]]:
    numbers = {name: number for number, name in enumerate(data.classes)}
    support = {each.name: each.support for each in data.metrics.per_class}
    return [
        {
            "true": pair.true,
            "predicted": pair.predicted,
            "pair": f"{numbers[pair.true]},{numbers[pair.predicted]}",
            "images": pair.images,
            "text": f"{pair.images} of {counted(support[pair.true], 'image')}",
            "cards": cards(data, pair.examples),
        }
        for pair in data.pairs
    ]


def _class_bars(data: ReportData) -> list[Picture]:
    """Recall of the worst classes, in as many pictures as are readable."""
    known = [each for each in data.metrics.per_class if each.support]
    named = words.weakest(data.metrics)
    known.sort(key=lambda each: (each is not named, each.recall, each.name))
    rows = []
    for each in known[:MOST_BARS]:
        low, high = wilson(each.recall, each.support)
        right = round(each.recall * each.support)
        text = f"{percent(each.recall)} ({right} of {each.support}), precision {percent(each.precision)}"
        rows.append(charts.Share(each.name, each.recall, low, high, text))
    found = []
    size = PER_CHART if len(rows) > PER_CHART else -(-len(rows) // 2)
    for start in range(0, len(rows), size):
        some = rows[start : start + size]
        title = f"{start + 1} to {start + len(some)} of {len(known)}"
        drawn = charts.shares(
            some,
            title=f"Recall of the classes {title}, the worst first",
            description="; ".join(f"{row.name} {row.text}" for row in some),
            label="recall in %, with its 95 % interval",
        )
        found.append(
            Picture(
                title,
                drawn,
                "Recall: share of the images of a class that are recognised. Precision: share of the images taken for "
                "it that are.",
            )
        )
    return found


def _calibration_note(data: ReportData) -> str:
    sample = (
        f" The pictures are of {len(data.confidence)} evenly spread images."
        if len(data.confidence) < data.metrics.n
        else ""
    )
    if data.temperature is None:
        return f"There were no validation images, so the probabilities are as trained.{sample}"
    if data.temperature > 1.05:
        effect = "the model was too sure of itself"
    else:
        effect = (
            "the model was not sure enough" if data.temperature < 0.95 else "little had to change"
        )
    return (
        f"Temperature {shown(data.temperature, 2)}, fitted on validation: {effect}. "
        f"Probabilities in this page have it, and so have those of nearkin predict.{sample}"
        f"{' It was fitted on these very images, which flatters it.' if data.split == 'val' else ''}"
    )


def _calibration(data: ReportData) -> list[Picture]:
    before = charts.Reliability("as trained", charts.bins(data.confidence, data.correct), 2)
    found = [before]
    if data.calibrated is not None:
        found.append(
            charts.Reliability("calibrated", charts.bins(data.calibrated, data.correct), 1)
        )
    drawn = charts.reliability(
        found,
        title="Reliability: accuracy against confidence",
        description="; ".join(
            f"{one.name}: "
            + ", ".join(
                f"{shown(100 * b.accuracy, 0)} % at {shown(100 * b.confidence, 0)} %"
                for b in one.bins
            )
            for one in found
        ),
    )
    confidence = data.confidence if data.calibrated is None else data.calibrated
    points = charts.covered(confidence, data.correct)
    most = max(1, round(0.8 * len(confidence)))
    sure = float(data.correct[np.argsort(-confidence, kind="stable")[:most]].mean())
    kept = charts.coverage(
        points,
        title="Accuracy against coverage",
        description="; ".join(
            f"{shown(y, 1)} % of the {shown(x, 0)} % most confident" for x, y in points[::6]
        ),
    )
    return [
        Picture(
            "Reliability",
            drawn,
            "On the dashed line, what the model says is how often it is right. Larger marks stand for more images.",
        ),
        Picture(
            "Coverage",
            kept,
            f"Of the 80 % most confident images, {shown(100 * sure, 1)} % are right.",
        ),
    ]


def _curves(lines: Sequence[Mapping[str, Any]]) -> list[Picture]:
    """Validation, and the loss with its terms, each from metrics.jsonl."""
    found = []
    accuracy = [
        (float(line["step"]), 100 * float(line["top1"])) for line in words.validations(lines)
    ]
    if len(accuracy) > 1:
        drawn = svg.curves(
            [svg.Curve("validation", [accuracy], 0)],
            title="Validation accuracy",
            description=f"from {shown(accuracy[0][1], 1)} % to {shown(accuracy[-1][1], 1)} %",
            x_label="steps",
            y_label="accuracy in %",
        )
        best = 100 * max(words.candidates(lines))
        note = f"The best is {shown(best, 1)} %; its weights were kept."
        fitted = words.refitted(lines)
        if fitted is not None:
            note += f" Then the classifier was fitted anew: {shown(100 * fitted, 1)} %."
        found.append(Picture("Validation accuracy", drawn, note))
    terms: dict[str, list[tuple[float, float]]] = {}
    for line in lines:
        if line.get("kind") == "train":
            for name, value in line.items():
                if name not in ("step", "epoch", "lr") and isinstance(value, int | float):
                    terms.setdefault(name, []).append((float(line["step"]), float(value)))
    drawn_terms = [name for name, points in terms.items() if len(points) > 1]
    if drawn_terms:
        curves = [svg.Curve(name, [terms[name]], k) for k, name in enumerate(drawn_terms)]
        drawn = svg.curves(
            curves,
            title="Loss and its terms",
            description=f"Curves of {', '.join(drawn_terms)} over the steps of the training",
            x_label="steps",
            y_label="loss",
        )
        found.append(
            Picture(
                "Loss and its terms",
                drawn,
                "On training images, with augmentation.",
            )
        )
    return found


def _environment(facts: Facts) -> list[tuple[str, str]]:
    environment = facts.environment
    packages = environment.get("packages")
    listed = (
        ", ".join(f"{name} {version}" for name, version in packages.items())
        if isinstance(packages, dict)
        else "not known"
    )
    return [
        ("run folder", facts.run),
        ("packages", listed),
        ("Python", str(environment.get("python", "not known"))),
        (
            "machine",
            f"{environment.get('platform', 'not known')}, {environment.get('cores', '?')} cores",
        ),
        ("GPU", str(environment.get("cuda") or "none")),
    ]


def _reading(data: ReportData) -> list[str]:
    return [
        "Kin are the training images whose embeddings are nearest to that of an image, by cosine. Their weights are "
        f"the softmax of similarity / temperature over the {data.attended} nearest; for CoNe this is the attention of "
        "its neighbour loss.",
        "The vote adds up the weights of each class. Without the ten nearest, the next ones vote with the network as "
        "it is. Where the vote then changes, the prediction rests on a few training images: look whether their labels "
        "are right.",
        "The twenty nearest training images vote on each label; it is listed where one other label has at least half "
        "of the votes more than its own. A weak embedding makes good labels suspicious, and a network that has "
        "learned a wrong label by heart hides it: look before you believe.",
        "The browser remembers marks if it keeps anything for pages opened from disk. A wrong label can be given the "
        "right one beside the kin. Save marks gives a table; nearkin doctor DATA --marks marks.csv --write-table "
        "clean.csv makes of it a table to train with.",
    ]
