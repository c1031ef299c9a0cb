"""Images to the network: nearkin's loaders beside timm's on one core, and their share of a step on small images."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import nn

from benchmarks.bench import MOST, Call, Row, Table, alternate, ratio
from benchmarks.training_steps import Case, prepared
from nearkin.config import RunConfig
from nearkin.data.cache import Contents, make_pack, packed
from nearkin.data.dataset import Split, load_dataset
from nearkin.data.images import Arrays, Files
from nearkin.data.loader import eval_loader, train_loader
from nearkin.data.sampling import TrainOrder
from nearkin.data.transforms import EvalSpec, Pipeline, TrainSpec, train_transform
from nearkin.distributed import Runtime
from nearkin.evaluation.tta import tta_views
from nearkin.network import Network
from nearkin.process import keep_freed_memory
from nearkin.training.defaults import DataFacts, resolve_data, side_of_scaled

IMAGES, BATCH, SIDE, CACHED_SIDE = 128, 64, 224, 256
SCALE = 0.35  # least share of the area in a crop, of both loaders
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Goal = tuple[float, float | None]
SMALL = (("resnet10t", 32, 5.0), ("test_resnet", 32, 8.0))  # model, side, per cent of a step


def pictures(root: Path) -> Path:
    """JPEGs of 500 x 375 in two classes: random parts of the photographs that come with scikit-learn."""
    from PIL import Image
    from sklearn.datasets import load_sample_image

    draw = np.random.default_rng(0)
    for number in range(IMAGES):
        photo = Image.fromarray(load_sample_image(("china.jpg", "flower.jpg")[number % 2]))
        left, top = int(draw.integers(80)), int(draw.integers(7))
        path = root / "train" / str(number % 2) / f"{number:04}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        part = photo.crop((left, top, left + 560, top + 420)).resize((500, 375))
        part.save(path, quality=92)
    return root


def photographs(root: Path) -> Path:
    """Two JPEGs of 4000 x 3000: the photographs that come with scikit-learn side by side, mirrored at the seams."""
    from PIL import Image
    from sklearn.datasets import load_sample_image

    for name in ("china.jpg", "flower.jpg"):
        photo = load_sample_image(name)
        wide = np.concatenate([photo, photo[:, ::-1]], 1)
        whole = np.tile(np.concatenate([wide, wide[::-1]], 0), (4, 4, 1))[:3000, :4000]
        path = root / "train" / name[:-4] / name
        path.parent.mkdir(parents=True)
        Image.fromarray(whole).save(path, quality=92)
    return root


def normalising() -> Network:
    """What the network does before its backbone, in the layout that decoded images have."""
    network = Network(nn.Identity(), {}, dim=3, mean=MEAN, std=STD)
    network.set_memory_format("channels_last")
    return network


def augmentation() -> Pipeline:
    spec = TrainSpec.of("light", image_size=SIDE, channels=3, flip=True)
    return train_transform(spec.model_copy(update={"crop_scale": SCALE}))


def training(split: Split) -> Call:
    transform = augmentation()
    normalise = normalising()
    order = TrainOrder(IMAGES, seed=0, batch_size=BATCH, first=0, last=IMAGES // BATCH)

    def epoch() -> None:
        for batch in train_loader(split, transform, order, views=1, seed=0, workers=0):
            normalise(batch.images[0])

    return epoch


def evaluation(split: Split) -> Call:
    normalise = normalising()
    views = tta_views("none", EvalSpec.for_size(SIDE, 3, SIDE / CACHED_SIDE))

    def epoch() -> None:
        for batch in eval_loader(split, views, range(IMAGES), batch_size=BATCH, workers=0):
            normalise(batch.images[0])

    return epoch


def timms(root: Path, train: bool) -> Call:
    """timm's loader with its prefetcher, which normalises: the same crops, mirrored in half of the cases."""
    from timm.data.dataset_factory import create_dataset
    from timm.data.loader import create_loader

    options = {"scale": (SCALE, 1.0), "color_jitter": 0.0} if train else {"crop_pct": 0.875}
    loader = create_loader(
        create_dataset("", root=str(root), split="train", is_training=train),
        (3, SIDE, SIDE),
        BATCH,
        is_training=train,
        num_workers=0,
        interpolation="bilinear",
        mean=MEAN,
        std=STD,
        pin_memory=False,
        persistent_workers=False,
        device=torch.device("cpu"),
        **options,
    )
    return partial(_through, loader)


def _through(batches: Iterable[object]) -> None:
    for _ in batches:
        pass


def loaders() -> list[Row]:
    """On one core and one thread."""
    with tempfile.TemporaryDirectory() as folder:
        root = pictures(Path(folder))
        dataset = load_dataset(str(root), val_split=0, check=None)
        contents = Contents(dataset.files, CACHED_SIDE)
        pack = make_pack(contents, "ram", 1).pack
        plain, cached = dataset.splits["train"], packed(dataset, contents, pack).splits["train"]
        size = sum(path.stat().st_size for path in root.rglob("*.jpg")) / IMAGES / 1000
        rows = []
        # Targets and limits, from JPEG and from the cache.
        kinds: tuple[tuple[str, Callable[[Split], Call], bool, Goal, Goal], ...] = (
            ("train", training, True, (1.8, 2.07), (8.0, 10.6)),
            ("evaluation", evaluation, False, (1.5, None), (15.0, 23.0)),
        )
        for name, make, train, goal, cached_goal in kinds:
            calls = {"ours": make(plain), "cached": make(cached), "timm": timms(root, train)}
            seconds = alternate(calls, most=MOST)
            what = f"{name}, 500 x 375 JPEG of {size:.0f} kB to {SIDE}"
            for ours, title, (target, limit) in (
                ("ours", what, goal),
                ("cached", f"{name}, cached", cached_goal),
            ):
                rows.append(ratio(seconds, ours, "timm", title, target, True, limit))
    return rows


def scaled() -> Row:
    """Large JPEGs to training crops with `--decode scaled` and without."""
    given = RunConfig(data="", image_size=SIDE, crop_scale=SCALE)
    config = resolve_data(given, DataFacts(images=1000, side=SIDE, channels=3))
    transform = augmentation()
    with tempfile.TemporaryDirectory() as folder:
        dataset = load_dataset(str(photographs(Path(folder))), val_split=0, check=None)
        files = cast("Files", dataset.splits["train"].images)
        least = side_of_scaled(config)
        sources = {"full": files, "scaled": files.scaled(least)}
        calls: dict[str, Call] = {
            name: partial(_crops, each, transform) for name, each in sources.items()
        }
        seconds = alternate(calls)
    what = f"train, 4000 x 3000 JPEG: --decode scaled ({least} px or more) against full"
    return ratio(seconds, "scaled", "full", what, higher=True)


def _crops(files: Files, transform: Pipeline) -> None:
    for row in range(len(files)):
        transform(files.read(row))


def share(runtime: Runtime, model: str, side: int, target: float) -> Row:
    """Loading, augmentation and normalisation of a batch of small images in per cent of a step, which normalises."""
    array = np.random.default_rng(0).integers(0, 256, (4096, side, side, 3), dtype=np.uint8)
    split = Split("train", Arrays(array, "x"), np.arange(4096) % 10)
    transform = train_transform(TrainSpec.of("light", image_size=side, channels=3, flip=True))
    order = TrainOrder(4096, seed=0, batch_size=128, first=0, last=1 << 30)
    batches = iter(train_loader(split, transform, order, views=1, seed=0, workers=0))
    normalise = Network(nn.Identity(), {}, dim=3, mean=MEAN, std=STD)
    step, _ = prepared(Case(model, side, 128, 10, "ce", 0), runtime)
    calls: dict[str, Call] = {"load": lambda: normalise(next(batches).images[0]), "step": step}
    seconds = alternate(calls, most=MOST)
    what = f"{model}, {side} px, 128 images: loading in per cent of a step"
    found = ratio(seconds, "load", "step", what)
    median = 100 * (found.median or 0)
    return replace(found, ratio=100 * found.ratio, median=median, target=target, unit="%")


def table() -> Table:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    keep_freed_memory()
    runtime = Runtime(device="cpu", precision="fp32")
    rows = [*loaders(), scaled()] + [share(runtime, *each) for each in SMALL]
    runtime.close()
    torch.set_num_threads(threads)
    setting = (
        f"one core, no workers, {IMAGES} images in batches of {BATCH}, crops from {SCALE:g} of the area, "
        f"mirrored, bilinear, normalised float32; timm with its prefetcher; the cache has a short side of {CACHED_SIDE}"
    )
    return Table("Data", setting, rows)
