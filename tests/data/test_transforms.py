"""Pixels in, pixels out: sizes, strengths, and what each may change."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from pydantic import ValidationError

from nearkin.data import EvalSpec, eval_transform, train_transform

SIZES = [(8, 8), (1, 1), (1, 9), (40, 3), (64, 64), (90, 131), (300, 200), (2, 3000)]


def picture(height: int, width: int, channels: int = 3, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (channels, height, width), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("strength", ["none", "light", "medium", "strong"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("image_size", [8, 72])
def test_any_size_becomes_the_size_asked_for(strength, channels, image_size):
    transform = train_transform(strength, image_size=image_size, channels=channels, flip=True)
    transform = pickle.loads(pickle.dumps(transform))  # workers get a copy
    for number, (height, width) in enumerate(SIZES):
        torch.manual_seed(number)
        image = picture(height, width, channels)
        before = image.clone()
        made = transform(image)
        assert made.shape == (channels, image_size, image_size)
        assert made.dtype == torch.uint8
        assert torch.equal(image, before)
        torch.manual_seed(number)
        assert torch.equal(transform(image), made)


@pytest.mark.parametrize(("size", "resize"), [(8, 8), (64, 64), (65, 74), (96, 110), (224, 256)])
def test_the_evaluation_spec_travels(size, resize):
    spec = EvalSpec.for_size(size, 3)
    assert (spec.image_size, spec.resize, spec.channels) == (size, resize, 3)
    assert EvalSpec(**json.loads(json.dumps(spec.model_dump(mode="json")))) == spec
    with pytest.raises(ValidationError, match="smaller than image_size"):
        EvalSpec(image_size=8, resize=7, channels=3)
    with pytest.raises(ValidationError, match="frozen"):
        spec.resize = 1


def test_evaluation_leaves_images_of_the_right_size_alone():
    image = picture(8, 8, 1)
    assert torch.equal(eval_transform(EvalSpec.for_size(8, 1))(image), image)


def test_evaluation_equals_torchvisions_resize_and_centre_crop():
    from torchvision.transforms import v2

    for height, width in [(90, 131), (300, 200), (71, 500), (224, 224)]:
        image = picture(height, width)
        expected = v2.Compose([v2.Resize(82, antialias=True), v2.CenterCrop(72)])(image)
        assert torch.equal(eval_transform(EvalSpec.for_size(72, 3))(image), expected)


def test_a_long_strip_does_not_fill_the_memory():
    made = eval_transform(EvalSpec.for_size(224, 1))(
        picture(1, 60_000, 1)
    )  # 15 000 megapixels if resized whole
    assert made.shape == (1, 224, 224)


def test_the_ends_that_are_cut_are_not_the_centre():
    strip = torch.zeros(1, 10, 1000, dtype=torch.uint8)
    strip[..., 490:510] = 200
    assert (eval_transform(EvalSpec.for_size(10, 1))(strip) == 200).all()


def test_none_is_the_same_for_every_seed():
    transform = train_transform("none", image_size=32, channels=3, flip=True)
    made = []
    for seed in range(5):
        torch.manual_seed(seed)
        made.append(transform(picture(50, 70)))
    assert all(torch.equal(image, made[0]) for image in made)


def test_light_at_small_sizes_is_a_crop_of_the_padded_image():
    image = picture(16, 16, 1)
    padded = torch.nn.functional.pad(image, [2] * 4)
    crops = [padded[:, i : i + 16, j : j + 16] for i in range(5) for j in range(5)]
    transform = train_transform("light", image_size=16, channels=1, flip=False)
    seen = set()
    for seed in range(400):
        torch.manual_seed(seed)
        made = transform(image)
        seen |= {place for place, crop in enumerate(crops) if torch.equal(crop, made)}
        assert any(torch.equal(crop, made) for crop in crops)
    assert seen == set(range(25))


def test_the_padding_is_at_least_one_pixel():
    image = torch.full((1, 4, 4), 9, dtype=torch.uint8)
    transform = train_transform("light", image_size=4, channels=1, flip=False)
    torch.manual_seed(0)
    assert any((transform(image) == 0).any() for _ in range(20))


def test_half_are_mirrored_only_if_asked():
    image = torch.zeros(1, 8, 8, dtype=torch.uint8)
    image[..., 5:] = 255  # brighter on the right, wherever it is cropped
    for flip, share in ((True, 0.5), (False, 0.0)):
        transform = train_transform("light", image_size=8, channels=1, flip=flip)
        torch.manual_seed(0)
        made = [transform(image).float() for _ in range(400)]
        mirrored = sum(bool(m[..., :4].sum() > m[..., 4:].sum()) for m in made) / 400
        assert abs(mirrored - share) < 0.1


def test_light_above_64_pixels_shows_at_least_a_third_of_the_area():
    ramp = torch.linspace(0, 255, 100).byte().expand(3, 100, 100)
    transform = train_transform("light", image_size=65, channels=3, flip=False)
    torch.manual_seed(0)
    widths = torch.stack(
        [transform(ramp)[0, 0, [0, -1]].float().diff()[0] / 255 for _ in range(300)]
    )
    narrowest = (0.35 * 3 / 4) ** 0.5  # of the width, at the tallest ratio
    assert widths.min() > narrowest - 0.08
    assert widths.min() < 0.65
    assert widths.max() > 0.9


def is_grey(image: torch.Tensor) -> bool:
    return bool((image == image[:1]).all())


def test_medium_changes_colours_and_makes_a_tenth_grey():
    image = torch.tensor([200, 120, 60], dtype=torch.uint8)[:, None, None].expand(3, 8, 8)
    transform = train_transform("medium", image_size=8, channels=3, flip=False)
    torch.manual_seed(0)
    made = [transform(image) for _ in range(500)]
    assert abs(sum(is_grey(m) for m in made) / 500 - 0.1) < 0.06
    colours = {tuple(m[:, 4, 4].tolist()) for m in made}
    assert len(colours) > 300


def test_strong_erases_in_a_quarter_of_the_cases():
    image = torch.full((3, 32, 32), 128, dtype=torch.uint8)
    strong = train_transform("strong", image_size=32, channels=3, flip=False)
    erase = strong.steps[-1]
    torch.manual_seed(0)
    erased = sum(bool((erase(image) == 0).any()) for _ in range(800)) / 800
    assert abs(erased - 0.25) < 0.08
    names = [type(step).__name__ for step in strong.steps]
    assert names == ["RandomPaddedCrop", "RandAugment", "ColorJitter", "RandomErasing"]
    assert (strong.steps[1].num_ops, strong.steps[1].magnitude) == (2, 9)
