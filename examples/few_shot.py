"""Few-shot: train on seven digits, then tell the other three apart from five images of each (under a minute)."""

from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image
from sklearn.datasets import load_digits

import nearkin


def write(folder: Path, digits: range, each: int) -> None:
    """`folder/DIGIT/NUMBER.png`, `each` images of each digit."""
    pixels, labels = load_digits(return_X_y=True)
    for digit in digits:
        (folder / str(digit)).mkdir(parents=True)
        for number, row in enumerate(pixels[labels == digit][:each]):
            image = Image.fromarray((row.reshape(8, 8) * 15).astype("uint8"))
            image.save(folder / str(digit) / f"{number}.png")


if __name__ == "__main__":
    with TemporaryDirectory() as place:
        write(Path(place, "known"), range(7), each=120)
        write(Path(place, "new"), range(7, 10), each=40)
        options = {"model": "test_resnet", "image_size": 16, "channels": 1, "epochs": 6}
        result = nearkin.train(
            Path(place, "known"), "supcon", from_scratch=True, out=Path(place, "run"), **options
        )
        found = nearkin.fewshot(result.run, Path(place, "new"), ways=3, shots=5, episodes=300)
    spread = f"{found.mean:.3f} ± {found.interval:.3f}"
    print(f"digits 7, 8 and 9 from five images of each: test top-1 {spread}")  # noqa: T201
