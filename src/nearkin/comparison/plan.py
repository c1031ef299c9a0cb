"""Equal terms for all entries: the same split, images, order, augmentation, first weights and budget."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

from nearkin.comparison.entries import BASELINE, Entry
from nearkin.comparison.statistics import LEAST_IMAGES
from nearkin.config import RunConfig, merge, validate
from nearkin.distributed import Runtime
from nearkin.errors import ConfigError, DataError, counted, printable
from nearkin.evaluation.model import Built
from nearkin.objectives import Stage
from nearkin.settings import Settings
from nearkin.training.console import say
from nearkin.training.loop import legs
from nearkin.training.prepare import Prepared, origin, prepare

Budget = Literal["crops", "minutes"]
UNLIMITED = 100_000  # epochs; the minutes decide
UNEQUAL = 0.05  # share of crops from which a note says that they are not equal
MEMORY = 20  # an averaged copy remembers a twentieth of the steps
# Where `auto` depends on the objective, on the machine or on a stopwatch, the value of the baseline holds for all: with
# the options of the run that an entry names.
ALIKE = (
    *("model", "model_options", "pretrained", "stem", "image_size", "channels", "blocks"),
    *("freeze_batchnorm", "batch_size", "augment", "crop_scale", "randaugment", "jitter"),
    *("jitter_prob", "grey_prob", "erasing", "flip", "mixup", "cutmix", "eval_size", "eval_crop"),
    *("decode", "per_class", "repeats", "probe_images"),
)


class Job(NamedTuple):
    """One run of the comparison."""

    entry: Entry
    seed: int
    config: RunConfig

    @property
    def name(self) -> str:
        """The name of its run folder."""
        return f"{self.entry.folder}-seed{self.seed}"


class Terms(NamedTuple):
    """What an entry gets. options: its own, and those that make it equal to the others. epochs: those that fit the
    budget; None where minutes are equal. weights: parameters that inference needs. settings, images: of the first seed;
    images is the fingerprint of its data set."""

    entry: Entry
    options: dict[str, Any]
    epochs: int | None
    stages: tuple[Stage, ...]
    steps_per_epoch: int
    weights: int
    settings: Settings
    images: str

    def crops(self, epochs: int, step: int | None = None) -> int:
        """Crops that pass through the student in so many epochs, up to a step: two crops of an image count twice, a
        teacher's own crop does not count."""
        batch, parts = self.settings.batch_size, legs(self.stages, epochs, self.steps_per_epoch)
        return batch * sum(
            max(0, (leg.last if step is None else min(step, leg.last)) - leg.first)
            * leg.stage.student_views
            for leg in parts
        )


def terms(
    entries: Sequence[Entry],
    options: Mapping[str, Any],
    *,
    budget: Budget,
    seeds: Sequence[int],
    runtime: Runtime,
    quiet: bool,
) -> tuple[tuple[Terms, ...], tuple[str, ...]]:
    """Resolve every entry, cross-entropy first, and make equal what is not the entry's own; and notes for a person. An
    entry that is the same as cross-entropy here is left out with a note.

    The images are looked at and the probe's features computed before the runs, so that none of equal minutes pays for
    all. seeds: of the runs and trials that will train. Raises what `prepare` raises.
    """
    free = {"minutes": 0.0}  # what a stopwatch says is no term: each run plans its own minutes
    seed = seeds[0]
    with _named(entries[0]):
        config = _config(entries[0], options, free, seed)
        first = prepare(config, runtime, look=True, quiet=quiet)
    _check_enough(first)
    limited = first.settings.images_per_class is not None
    if budget == "minutes" and first.settings.probe and limited:
        for other in seeds[1:]:  # each has training images of its own
            prepare(_config(entries[0], options, free, other), runtime, look=True, quiet=quiet)
    resolved = list(_resolved(entries, first, options, free, seed, runtime))
    grouped = any(
        found.settings.sampler == "balanced" and "sampler" not in entry.options
        for entry, found, _ in resolved
    )
    base = _own(entries[0], first, first.settings, grouped)
    made: list[Terms] = []
    notes: list[str] = []
    for entry, found, alike_settings in resolved:
        _check_average(entry, budget)
        own = _own(entry, first, alike_settings, grouped)
        if entry != entries[0] and _same(entry, found, first, own, base):
            notes.append(f"{entry.name} is {BASELINE} here, and is left out")
            say(f"note: {notes[-1]}", quiet)
            continue
        _check_order(entry, own)
        one = _without_epochs(entry, own, found, first)
        if budget == "minutes":
            alike = {"cache": first.settings.cache}  # decoding takes time
            made.append(one._replace(options=alike | own | {"epochs": UNLIMITED}))
        else:
            made.append(_with_epochs(one, (made or [one])[0], first))
    if len(made) < 2:
        raise ConfigError(f"There is nothing to compare {printable(entries[0].name)} with.")
    return tuple(made), tuple(notes)


def _resolved(
    entries: Sequence[Entry],
    first: Prepared,
    options: Mapping[str, Any],
    free: Mapping[str, Any],
    seed: int,
    runtime: Runtime,
) -> Iterator[_Resolved]:
    """Every entry by itself, and the baseline with the options of the run that it names."""
    yield _Resolved(entries[0], first, first.settings)
    for entry in entries[1:]:
        with _named(entry):
            found = prepare(_config(entry, options, free, seed), runtime, look=False, quiet=True)
            alike = first
            if own := entry.of_the_run:
                config = _config(Entry(BASELINE, BASELINE, "", own), options, free, seed)
                alike = prepare(config, runtime, look=False, quiet=True)
            yield _Resolved(entry, found, alike.settings)


def _without_epochs(entry: Entry, own: dict[str, Any], found: Prepared, first: Prepared) -> Terms:
    """The terms but for the epochs. The batch is that which its runs have."""
    stages, batch = found.built.objective.stages(), own["batch_size"]
    settings = found.settings.model_copy(update={"batch_size": batch})
    steps = len(first.dataset.splits["train"].labels) // batch
    weights, images = _needed(found.built), first.identity["data"]
    return Terms(entry, own, None, stages, steps, weights, settings, images)


def _check_average(entry: Entry, budget: Budget) -> None:
    if budget == "minutes" and entry.rival == "ema":
        raise ConfigError(
            f"{printable(entry.name)} remembers a twentieth of the steps, and equal minutes do not tell how many there "
            "will be; leave it out, or give ce:ema=X."
        )


def _check_order(entry: Entry, own: Mapping[str, Any]) -> None:
    if own["sampler"] == "balanced" and int(own["repeats"]) > 1 and "sampler" not in entry.options:
        raise ConfigError(
            f"{printable(entry.name)}: --repeats needs --sampler shuffle, and another objective needs balanced "
            "batches, which all get; leave one of them out."
        )


def _check_enough(found: Prepared) -> None:
    splits = found.dataset.splits
    judged = splits.get("test", splits.get("val"))
    tested = 0 if judged is None else len(judged.labels)
    if tested < LEAST_IMAGES:
        raise DataError(
            f"There are {counted(tested, 'test image')}, and {LEAST_IMAGES} are the least to compare with; give more."
        )


def unequal(found: Sequence[Terms]) -> list[str]:
    """Notes about entries whose whole epochs are no equal crops."""
    wanted = found[0].crops(found[0].epochs or 0)
    notes = []
    for each in found[1:]:
        share = each.crops(each.epochs or 0) / wanted - 1 if wanted else 0.0
        if abs(share) > UNEQUAL:
            many = (
                f"{abs(100 * share):.0f} % {'more' if share > 0 else 'fewer'} crops than {BASELINE}"
            )
            notes.append(f"{each.entry.name} gets {many}, in whole epochs; give more --epochs")
    return notes


@contextmanager
def _named(entry: Entry) -> Iterator[None]:
    """An error in the options of an entry begins with its name, where it has options."""
    try:
        yield
    except ConfigError as error:
        if not entry.options:
            raise
        raise ConfigError(f"{printable(entry.name)}: {error}") from None


class _Resolved(NamedTuple):
    """alike: the settings of the baseline with the options of the run that the entry names."""

    entry: Entry
    found: Prepared
    alike: Settings


def _own(entry: Entry, first: Prepared, alike: Settings, grouped: bool) -> dict[str, Any]:
    """The options of an entry, and all values that make it equal to the others, so that another machine gives the same.
    grouped: whether one entry needs the balanced sampler, which all get then."""
    equal = {name: getattr(alike, name) for name in ALIKE}
    equal["sampler"] = "balanced" if grouped else alike.sampler
    if entry.rival == "ema":
        steps = first.settings.epochs * _steps_per_epoch(first)
        equal["ema"] = round(1 - 1 / max(2, steps / MEMORY), 8)
    return equal | entry.options


def _steps_per_epoch(found: Prepared) -> int:
    return len(found.dataset.splits["train"].labels) // found.settings.batch_size


def _with_epochs(one: Terms, base: Terms, first: Prepared) -> Terms:
    """With the epochs whose crops are nearest to those of the baseline."""
    most = first.settings.epochs
    epochs = _fitting(one, base.crops(most), most)
    return one._replace(epochs=epochs, options=one.options | {"epochs": epochs, "minutes": 0.0})


def jobs(found: Sequence[Terms], options: Mapping[str, Any], seeds: Sequence[int]) -> list[Job]:
    """The runs in the order of their starts: seed after seed, so that a machine that slows down slows all alike."""
    return [
        Job(each.entry, seed, _config(each.entry, options, each.options, seed))
        for seed in seeds
        for each in found
    ]


def equal(terms: Sequence[Terms], budget: Budget, minutes: float | None) -> dict[str, str]:
    """What was the same for all, in words. minutes: of each run, where they are the budget."""
    first = terms[0].settings
    if budget == "crops":
        epochs = terms[0].epochs or 0
        amount = f"{terms[0].crops(epochs):,} crops through the network ({counted(epochs, 'epoch')} of ce)"
    else:
        amount = f"{minutes} minutes"
    sampler = terms[0].options.get("sampler", first.sampler)
    given = dict[str, str]()
    for each in terms:
        if named := each.entry.of_the_run:
            words = ", ".join(f"{name} {value}" for name, value in named.items())
            given[f"except {each.entry.name}"] = words
    if first.images_per_class is not None:
        given["training images"] = f"{first.images_per_class} of each class, others at another seed"
    return given | {
        "budget": amount,
        "network": f"{first.model}, {origin(first)}, the same weights at the same seed",
        "images": f"{first.image_size} px to train, {first.eval_size} px to evaluate, batches of {first.batch_size}",
        "augmentation": f"{first.augment}, the same draws at the same seed",
        "order": f"{sampler}, the same at the same seed",
        "test": "never looked at before the end of a run",
        "validation": "chose the best epoch of each run"
        if first.val_split > 0
        else "as in the data, if there is any",
    }


def _config(
    entry: Entry, options: Mapping[str, Any], own: Mapping[str, Any], seed: int
) -> RunConfig:
    layers = {"objective": entry.objective}, entry.options, own, {"seed": seed}
    config: RunConfig = validate(RunConfig, merge(options, *layers))
    return config


def _same(
    entry: Entry, found: Prepared, first: Prepared, own: Mapping[str, Any], base: Mapping[str, Any]
) -> bool:
    """Whether nothing tells the entry from cross-entropy. own, base: the options of their runs."""
    alike = (*ALIKE, "sampler")
    other = [name for name in own if not name.startswith("objective.") and name not in alike]
    named = any(
        name in alike and getattr(found.settings, name) != base[name] for name in entry.options
    )
    configs = found.built.objective.config, first.built.objective.config
    return entry.objective == BASELINE and not other and not named and configs[0] == configs[1]


def _fitting(found: Terms, wanted: int, most: int) -> int:
    """The epochs whose crops are nearest to `wanted`, at least one for each stage. After a probe alone there are
    none."""
    if wanted == 0:
        return 0
    least = len(found.stages)
    about = math.floor(wanted * most / max(1, found.crops(most)))
    tried = range(max(least, about - 1), max(least, about + 2) + 1)
    return min(tried, key=lambda epochs: abs(found.crops(epochs) - wanted))


def _needed(built: Built) -> int:
    """Parameters of the backbone and of the heads that the logits follow from."""
    total = sum(p.numel() for p in built.network.backbone.parameters())
    wanted = {"logits"}
    for head in reversed(list(built.objective.heads.values())):
        if head.writes in wanted:
            wanted.add(head.reads)
            total += sum(p.numel() for p in head.module.parameters())
    return total
