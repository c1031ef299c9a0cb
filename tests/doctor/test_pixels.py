"""Hashes, scores, pairs and votes beside independent computations."""

from __future__ import annotations

import imagehash
import numpy as np
import pytest
import torch
from PIL import Image
from tests.doctor.photos import blurred, faint, one_colour, photo

from nearkin.data.sources.resolve import resolve
from nearkin.doctor.duplicates import near_pairs
from nearkin.doctor.scan import measure, perceptual_hashes, reduced
from nearkin.evaluation.suspects import suspects


def pixels(image):
    return reduced(torch.from_numpy(np.array(image)).permute(2, 0, 1))


def bits(hashed):
    return int("".join("1" if bit else "0" for bit in hashed.hash.ravel()), 2)


def test_hashes_are_those_of_imagehash():
    tiny = np.random.default_rng(0).integers(0, 256, (20, 32, 32), dtype=np.uint8)
    expected = [bits(imagehash.phash(Image.fromarray(each))) for each in tiny]
    assert perceptual_hashes(tiny).tolist() == expected


@pytest.mark.parametrize("size", [(96, 80), (200, 200), (500, 375), (900, 1200), (40, 50)])
def test_hashes_of_whole_images_are_near_those_of_imagehash(size):
    for seed in range(3):
        image = photo(seed, size)
        ours = int(measure([pixels(image)]).phash[0])
        assert (ours ^ bits(imagehash.phash(image))).bit_count() <= 6


def test_images_measured_together_have_their_own_numbers():
    together = measure([pixels(image) for image in CASES.values()])
    for place, image in enumerate(CASES.values()):
        alone = measure([pixels(image)])
        assert [column[place] for column in together] == [column[0] for column in alone]


CASES = {
    "photo": photo(0, (200, 160)),
    "large": photo(1, (500, 400)),
    "small": photo(2, (50, 60)),
    "blank": one_colour(130),
    "dark": faint(0, 40),
    "bright": faint(247, 256),
    "blurred": blurred(0),
    "grey": photo(3).convert("L").convert("RGB"),
}


@pytest.mark.parametrize("name", CASES)
def test_scores_are_near_those_of_cleanvision(name):
    from cleanvision.issue_managers import image_property as theirs

    image = CASES[name]
    found = measure([pixels(image)])
    raw = theirs.BrightnessProperty("dark").calculate(image)
    raw |= theirs.EntropyProperty().calculate(image) | theirs.BlurrinessProperty().calculate(image)
    edges, colours = (
        1 - np.exp(-0.01 * raw[key]) for key in ("blurriness", "blurriness_grayscale_std")
    )
    expected = {
        "dark": raw["brightness_perc_99"],
        "light": 1 - raw["brightness_perc_5"],
        "low_information": min(1, 0.1 * raw["entropy"]),
        "blurry": min(1, edges + (colours if colours > 0.18 else 0)),
    }
    for key, value in expected.items():
        assert float(getattr(found, key)[0]) == pytest.approx(value, abs=0.1), key


def test_pairs_are_those_of_a_plain_loop(monkeypatch):
    monkeypatch.setattr("nearkin.doctor.duplicates.CHUNK", 70)  # several blocks
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**63, 60, dtype=np.uint64)
    for changed in range(1, 11):  # copies of the first hash with more and more other bits
        mask = sum(1 << int(bit) for bit in rng.choice(64, changed, replace=False))
        hashes[changed * 5] = hashes[0] ^ np.uint64(mask)
    expected = {
        (i, j)
        for i in range(60)
        for j in range(i + 1, 60)
        if (int(hashes[i]) ^ int(hashes[j])).bit_count() <= 8
    }
    pairs, cut = near_pairs(hashes, 8)
    assert {tuple(pair) for pair in pairs.tolist()} == expected
    assert len(expected) >= 8
    assert not cut


def test_too_many_pairs_are_cut_and_told(monkeypatch):
    monkeypatch.setattr("nearkin.doctor.duplicates.MOST_PAIRS", 100)
    pairs, cut = near_pairs(np.zeros(50, np.uint64), 8)
    assert len(pairs) == 100
    assert cut


def naive_votes(features, labels, classes, k=20, temperature=0.05):
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    shares = []
    for row in range(len(labels)):
        cosines = unit @ unit[row]
        cosines[row] = -np.inf
        nearest = np.argsort(-cosines)[:k]
        weights = np.exp(cosines[nearest] / temperature)
        votes = np.zeros(classes)
        for place, weight in zip(nearest, weights, strict=True):
            votes[labels[place]] += weight
        shares.append(votes / weights.sum())
    return np.array(shares)


def test_votes_are_those_of_a_plain_loop(monkeypatch):
    monkeypatch.setattr("nearkin.evaluation.suspects.CHUNK", 500)  # several chunks
    rng = np.random.default_rng(1)
    features, labels = rng.normal(size=(90, 7)).astype(np.float32), rng.integers(0, 4, 90)
    shares = naive_votes(features.astype(np.float64), labels, 4)
    found = suspects(torch.from_numpy(features), labels, 4)
    np.testing.assert_allclose(found.own, shares[np.arange(90), labels], atol=1e-5)
    others = shares.copy()
    others[np.arange(90), labels] = -1
    np.testing.assert_allclose(found.votes, others.max(1), atol=1e-5)
    assert (found.other == others.argmax(1)).all()
    margins = found.own - found.votes
    assert (np.diff(margins[found.ranking]) >= 0).all()


def flipped(labels, share=0.1, classes=10):
    """Labels of which a share is wrong, and which."""
    rng = np.random.default_rng(0)
    wrong = rng.choice(len(labels), int(share * len(labels)), replace=False)
    changed = labels.copy()
    changed[wrong] = (labels[wrong] + rng.integers(1, classes, len(wrong))) % classes
    mask = np.zeros(len(labels), bool)
    mask[wrong] = True
    return changed, mask


@pytest.fixture(scope="module")
def digits():
    part = resolve("digits").parts["train"]
    rows = part.images.array.reshape(len(part.labels), -1).astype(np.float32)
    return torch.from_numpy(rows - rows.mean(1, keepdims=True)), part.labels


def test_wrong_labels_of_digits_come_first(digits):
    features, labels = digits
    given, wrong = flipped(labels)
    found = suspects(features, given, 10)
    first = found.ranking[: wrong.sum()]
    assert wrong[first].mean() >= 0.9
    assert wrong[found.suspicious].mean() >= 0.95
    assert wrong[found.suspicious].sum() >= 0.6 * wrong.sum()


def test_cleanlab_finds_the_same_wrong_labels(digits):
    from cleanlab.rank import get_label_quality_scores

    features, labels = digits
    given, wrong = flipped(labels)
    shares = naive_votes(features.numpy().astype(np.float64), given, 10)
    scores = get_label_quality_scores(given, shares, method="normalized_margin")
    count = wrong.sum()
    theirs = np.argsort(scores)[:count]
    ours = suspects(features, given, 10).ranking[:count]
    assert abs(wrong[theirs].mean() - wrong[ours].mean()) < 0.02
    assert len(np.intersect1d(theirs, ours)) >= 0.95 * count


def test_few_labels_of_clean_digits_are_suspicious(digits):
    features, labels = digits
    assert suspects(features, labels, 10).suspicious.mean() < 0.003
