"""Pixels in, pixels out: sizes, strengths, and what each may change."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from pydantic import ValidationError

from nearkin.data import colour
from nearkin.data.transforms import (
    EvalSpec,
    RandomRegion,
    TrainSpec,
    eval_transform,
    train_transform,
)

SIZES = [(8, 8), (1, 1), (1, 9), (40, 3), (64, 64), (90, 131), (300, 200), (2, 3000)]


def picture(height: int, width: int, channels: int = 3, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (channels, height, width), generator=generator, dtype=torch.uint8)


def made_by(strength, image_size, channels, flip=False, **parts):
    spec = TrainSpec.of(strength, image_size=image_size, channels=channels, flip=flip)
    return train_transform(spec.model_copy(update=parts))


@pytest.mark.parametrize("strength", ["none", "light", "medium", "strong"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("image_size", [8, 72])
def test_any_size_becomes_the_size_asked_for(strength, channels, image_size):
    transform = made_by(strength, image_size, channels, flip=True)
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


@pytest.mark.parametrize(
    ("size", "crop", "resize"),
    [(8, 1.0, 8), (65, 0.875, 74), (96, 0.875, 110), (224, 0.875, 256), (224, 0.95, 236)],
)
def test_the_evaluation_spec_travels(size, crop, resize):
    spec = EvalSpec.for_size(size, 3, crop)
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
        assert torch.equal(eval_transform(EvalSpec.for_size(72, 3, 0.875))(image), expected)


def test_a_long_strip_does_not_fill_the_memory():
    made = eval_transform(EvalSpec.for_size(224, 1, 0.875))(
        picture(1, 60_000, 1)
    )  # 15 000 megapixels if resized whole
    assert made.shape == (1, 224, 224)


def test_the_ends_that_are_cut_are_not_the_centre():
    strip = torch.zeros(1, 10, 1000, dtype=torch.uint8)
    strip[..., 490:510] = 200
    assert (eval_transform(EvalSpec.for_size(10, 1))(strip) == 200).all()


def test_none_is_the_same_for_every_seed():
    transform = made_by("none", 32, 3)
    made = []
    for seed in range(5):
        torch.manual_seed(seed)
        made.append(transform(picture(50, 70)))
    assert all(torch.equal(image, made[0]) for image in made)


def test_light_at_small_sizes_is_a_crop_of_the_padded_image():
    image = picture(16, 16, 1)
    padded = torch.nn.functional.pad(image, [2] * 4)
    crops = [padded[:, i : i + 16, j : j + 16] for i in range(5) for j in range(5)]
    transform = made_by("light", 16, 1, flip=False)
    seen = set()
    for seed in range(400):
        torch.manual_seed(seed)
        made = transform(image)
        seen |= {place for place, crop in enumerate(crops) if torch.equal(crop, made)}
        assert any(torch.equal(crop, made) for crop in crops)
    assert seen == set(range(25))


def test_the_padding_is_at_least_one_pixel():
    image = torch.full((1, 4, 4), 9, dtype=torch.uint8)
    transform = made_by("light", 4, 1, flip=False)
    torch.manual_seed(0)
    assert any((transform(image) == 0).any() for _ in range(20))


def test_half_are_mirrored_only_if_asked():
    image = torch.zeros(1, 8, 8, dtype=torch.uint8)
    image[..., 5:] = 255  # brighter on the right, wherever it is cropped
    for flip, share in ((True, 0.5), (False, 0.0)):
        transform = made_by("light", 8, 1, flip=flip)
        torch.manual_seed(0)
        made = [transform(image).float() for _ in range(400)]
        mirrored = sum(bool(m[..., :4].sum() > m[..., 4:].sum()) for m in made) / 400
        assert abs(mirrored - share) < 0.1


def test_light_above_64_pixels_shows_at_least_a_third_of_the_area():
    ramp = torch.linspace(0, 255, 100).byte().expand(3, 100, 100)
    transform = made_by("light", 65, 3, flip=False)
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
    transform = made_by("medium", 8, 3, flip=False)
    torch.manual_seed(0)
    made = [transform(image) for _ in range(500)]
    assert abs(sum(is_grey(m) for m in made) / 500 - 0.1) < 0.06
    colours = {tuple(m[:, 4, 4].tolist()) for m in made}
    assert len(colours) > 300


def test_strong_erases_in_a_quarter_of_the_cases():
    image = torch.full((3, 32, 32), 128, dtype=torch.uint8)
    strong = made_by("strong", 32, 3, flip=False)
    erase = strong.steps[-1]
    torch.manual_seed(0)
    erased = sum(bool((erase(image) == 0).any()) for _ in range(800)) / 800
    assert abs(erased - 0.25) < 0.08
    names = [type(step).__name__ for step in strong.steps]
    assert names == ["RandomPaddedCrop", "RandAugment", "Jitter", "RandomErasing"]
    assert (strong.steps[1].count, strong.steps[1].magnitude) == (2, 9)


JITTER = (0.4, 0.4, 0.4, 0.1)


def assert_equal_but_for_hue(made, expected):
    """A shifted hue may round to the next grey level; three factors of up to 1.4 may follow."""
    apart = (made.int() - expected.int()).abs()
    assert (apart != 0).float().mean() < 2e-3
    assert apart.max() <= 3


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("strength", ["light", "medium", "strong"])
def test_strengths_draw_as_torchvision_would_in_this_order(strength, channels, flip):
    from torchvision.transforms import v2

    jitter = v2.ColorJitter(*(JITTER[:2] if channels == 1 else JITTER))
    medium = [jitter] if channels == 1 else [jitter, v2.RandomGrayscale(0.1)]
    strong = [v2.RandAugment(2, 9), jitter, v2.RandomErasing(0.25)]
    colours = {"light": [], "medium": medium, "strong": strong}[strength]
    crop = v2.RandomResizedCrop(72, scale=(0.35, 1.0), antialias=True)
    transform = made_by(strength, 72, channels, flip=flip)
    for seed in range(30):
        image = picture(90, 131, channels, seed)
        torch.manual_seed(seed)
        expected = crop(image)
        if flip and torch.rand(()) < 0.5:
            expected = expected.flip(-1)
        for step in colours:
            expected = step(expected)
        following = torch.rand(())
        torch.manual_seed(seed)
        made = transform(image)
        assert torch.rand(()) == following, "as many numbers are drawn"
        if channels == 3:
            assert_equal_but_for_hue(made, expected)
        else:
            assert torch.equal(made, expected)
        (keyed,) = transform.of_each([image], [seed])
        assert torch.equal(keyed, made)


@pytest.mark.parametrize("size", [(8, 8), (32, 32), (31, 50), (72, 72)])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("magnitude", [0, 9, 30])
def test_randaugment_has_the_pixels_of_torchvisions(magnitude, channels, size):
    from torchvision.transforms import v2

    ours, theirs = colour.RandAugment(magnitude), v2.RandAugment(2, magnitude)
    for seed in range(60):
        image = picture(*size, channels, seed)
        torch.manual_seed(seed)
        expected = theirs(image)
        torch.manual_seed(seed)
        assert torch.equal(ours(image), expected)


@pytest.mark.parametrize("name", colour.NAMES)
@pytest.mark.parametrize("sign", [-1, 1])
def test_each_operation_has_the_pixels_of_torchvisions(name, sign):
    from torchvision.transforms import v2

    theirs = {"color": "saturation"}
    spaces = v2.RandAugment._AUGMENTATION_SPACE
    (kind,) = [k for k in spaces if theirs.get(k.lower(), k.lower()) == name.replace(" ", "")]
    magnitudes, signed = spaces[kind]
    values = magnitudes(31, 20, 33)
    for place in (0, 9, 17, 30):
        image = picture(20, 33, 3, place)
        value = 0.0 if values is None else float(values[place])
        expected = v2.RandAugment()._apply_image_or_video_transform(
            image, kind, sign * value if signed else value, v2.InterpolationMode.NEAREST, {}
        )
        drawn = (colour.NAMES.index(name), sign if signed else 1)
        assert torch.equal(colour.RandAugment(place).apply(image, drawn), expected)


@pytest.mark.parametrize("turns", [-0.5, -0.1, 0.0, 0.03, 0.25, 0.5])
def test_hues_are_shifted_as_by_torchvision(turns):
    from torchvision.transforms.v2 import functional

    levels = torch.arange(0, 256, 5, dtype=torch.uint8)
    every = torch.cartesian_prod(levels, levels, levels).T.reshape(3, 52, -1)
    edges = torch.tensor([[0, 0, 0], [255, 255, 255], [255, 0, 0], [1, 0, 0], [9, 9, 8]])
    for image in (every, edges.to(torch.uint8).T[:, None], picture(64, 64)):
        made, expected = colour.shift_hue(image, turns), functional.adjust_hue(image, turns)
        apart = (made.int() - expected.int()).abs()
        assert apart.max() <= 1
        assert (apart != 0).float().mean() < 1e-3


@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.35, 1.0), (1.0, 1.0)])
@pytest.mark.parametrize("size", [*SIZES, (375, 500), (200, 151), (151, 200)])
def test_regions_are_drawn_as_torchvision_draws_them(size, scale):
    """From the global state or from a generator, with as many numbers taken: also where ten tries find nothing."""
    from torchvision.transforms import v2

    region, theirs = RandomRegion(72, scale), v2.RandomResizedCrop(72, scale=scale)
    image = torch.empty(3, *size, dtype=torch.uint8)
    for seed in range(100):
        torch.manual_seed(seed)
        expected, following = tuple(theirs.make_params([image]).values()), torch.rand(())
        torch.manual_seed(seed)
        assert region.draw(image.shape) == expected
        assert torch.rand(()) == following
        generator = torch.Generator().manual_seed(seed)
        assert region.draw(image.shape, generator) == expected
        assert torch.rand((), generator=generator) == following


def test_a_number_always_crops_a_region_and_the_two_words_never_do():
    ramp = torch.linspace(0, 255, 32).byte().expand(3, 32, 32)
    steps = {}
    for scale in (0.08, "padded", "centre"):
        torch.manual_seed(0)
        transform = made_by("light", 32, 3, crop_scale=scale)
        made = torch.stack([transform(ramp) for _ in range(200)])
        steps[scale] = (made[..., 0, 31].float() - made[..., 0, 0].float())[:, 0] / 255
    assert steps[0.08].min() < 0.4, "a twelfth of the area is about a third of the width"
    assert steps[0.08].max() > 0.9
    assert (steps["centre"] == 1).all()
    assert made_by("none", 32, 3, crop_scale=0.5).steps[0].scale == (0.5, 1.0)


def test_each_part_can_be_set_by_itself():
    def kinds(**parts):
        return [type(step).__name__ for step in made_by("none", 32, 3, **parts).steps[2:]]

    assert kinds() == []
    assert kinds(randaugment=7) == ["RandAugment"]
    assert kinds(jitter=0.4) == ["Jitter"]
    assert kinds(jitter=0.4, jitter_prob=0.8) == ["Jitter"]
    assert kinds(jitter=0.4, jitter_prob=0.0) == []
    assert kinds(grey_prob=0.2) == ["RandomGrey"]
    assert kinds(erasing=0.5) == ["RandomErasing"]
    assert kinds(flip=True) == ["RandomFlip"]
    assert kinds(erasing=1.0, randaugment=1, jitter=1.0, grey_prob=1.0, flip=True) == [
        "RandomFlip",
        "RandAugment",
        "Jitter",
        "RandomGrey",
        "RandomErasing",
    ]
    off = {"randaugment": 0, "jitter": 0.0, "erasing": 0.0}
    assert len(made_by("strong", 32, 3, **off).steps) == len(made_by("light", 32, 3).steps)


def test_jitter_is_as_strong_and_as_frequent_as_asked():
    (step,) = made_by("none", 8, 3, jitter=0.8).steps[2:]
    torch.manual_seed(0)
    drawn = [dict(step.draw(torch.Size((3, 8, 8)))) for _ in range(2000)]
    for part, ends in ((0, (0.2, 1.8)), (1, (0.2, 1.8)), (2, (0.2, 1.8)), (3, (-0.2, 0.2))):
        values = torch.tensor([one[part] for one in drawn])
        assert ends[0] <= values.min() < ends[0] + 0.02
        assert ends[1] - 0.02 < values.max() <= ends[1]
    image = torch.tensor([200, 120, 60], dtype=torch.uint8)[:, None, None].expand(3, 8, 8)
    transform = made_by("none", 8, 3, jitter=0.4, jitter_prob=0.8)
    torch.manual_seed(0)
    same = sum(torch.equal(transform(image), image) for _ in range(400)) / 400
    assert abs(same - 0.2) < 0.06


@pytest.mark.parametrize(("jitter", "prob"), [(2.0, 1.0), (0.4, 0.3)])
@pytest.mark.parametrize("channels", [1, 3])
def test_jitter_draws_as_torchvisions(jitter, prob, channels):
    from torchvision.transforms import v2

    strengths = (jitter, jitter) if channels == 1 else (jitter, jitter, jitter, jitter / 4)
    theirs = (
        v2.RandomApply([v2.ColorJitter(*strengths)], prob)
        if prob < 1
        else v2.ColorJitter(*strengths)
    )
    (ours,) = made_by("none", 8, channels, jitter=jitter, jitter_prob=prob).steps[2:]
    for seed in range(40):
        image = picture(16, 16, channels, seed)
        torch.manual_seed(seed)
        expected, following = theirs(image), torch.rand(())
        torch.manual_seed(seed)
        made = ours(image)
        assert torch.rand(()) == following
        assert (made.int() - expected.int()).abs().max() <= (0 if channels == 1 else 3)
