"""What a report shows, from synthetic predictions whose errors and wrong labels are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.report import reports
from tests.report.reports import report_data, small

from nearkin.evaluation import report_data as module
from nearkin.evaluation.suspects import suspects


def test_every_image_is_there_with_what_was_said():
    data = small()
    images = data.images
    assert images.evaluated == 40
    assert images.names[0] == "test/0.jpg"
    assert sorted(images.names[40:]) == sorted(f"train/{k}.jpg" for k in range(60))
    assert (images.predicted[40:] == -1).all()
    wrong = images.labels[:40] != images.predicted[:40]
    assert wrong.sum() == round(40 * (1 - data.metrics.top1)) > 2
    assert not np.isnan(images.own[:40]).any()
    assert np.isnan(images.own[40:]).all()
    assert np.isnan(images.suspicion[:40]).all()
    assert ((images.places >= 0) & (images.places <= 1)).all()


def test_the_lists_are_in_order():
    data = small()
    images = data.images
    wrong = np.flatnonzero(images.labels[:40] != images.predicted[:40])
    assert data.worst.tolist() == sorted(wrong, key=lambda place: -images.probability[place])
    assert len(data.uncertain) == 24
    assert (np.diff(images.probability[data.uncertain]) >= 0).all()
    assert data.mislabelled == 2
    assert {images.names[place] for place in data.suspicious} >= {"train/0.jpg", "train/1.jpg"}
    assert images.suspicion[data.suspicious].min() > 0.5
    assert (images.other[data.suspicious] != images.labels[data.suspicious]).all()


def test_pairs_hold_images_of_that_pair():
    data = small()
    assert data.pairs[0].images == max(pair.images for pair in data.pairs)
    assert sum(pair.images for pair in data.pairs) == len(data.worst)
    for pair in data.pairs:
        for place in pair.examples:
            assert data.classes[data.images.labels[place]] == pair.true
            assert data.classes[data.images.predicted[place]] == pair.predicted


def test_kin_are_training_images_by_their_place():
    data = small()
    assert data.kin.index.min() >= 40
    assert data.with_kin.tolist() == list(range(100))
    for row in range(40):
        near = data.kin.index[row]
        predicted = data.images.predicted[row]
        assert (data.images.labels[near] == predicted).mean() > 0.5  # they were drawn around it
    for row in range(40, 100):
        assert row not in data.kin.index[row]


def test_calibration_keeps_what_was_trained():
    data = small()
    assert data.temperature == 1.5
    assert (data.calibrated < data.confidence).all()
    plain = report_data(temperature=None)
    assert plain.calibrated is None
    assert plain.images.probability[:40] == pytest.approx(data.confidence)


def test_probabilities_are_calibrated_and_distances_are_ranks_among_validation(monkeypatch):
    given = []
    gather = reports.gather
    monkeypatch.setattr(reports, "gather", lambda *a, **k: given.extend(a) or gather(*a, **k))
    images = report_data().images
    _, seen, kin, _, temperature = given
    powers = seen.probabilities.double().numpy() ** (1 / temperature)
    calibrated = powers / powers.sum(1, keepdims=True)
    rows = np.arange(40)
    assert images.probability[:40] == pytest.approx(calibrated[rows, images.predicted[:40]])
    assert images.own[:40] == pytest.approx(calibrated[rows, images.labels[:40]])
    cosines = np.sort((seen.embeddings @ kin.embeddings.T).numpy())[:, -5:]
    nearer = kin.typical.numpy() < 1 - cosines.mean(1, keepdims=True)
    assert images.unlike[:40] == pytest.approx(nearer.mean(1))
    assert 0 < images.unlike[:40].min() < images.unlike[:40].max()
    assert np.isnan(images.unlike[40:]).all()


def test_of_many_images_errors_and_kin_are_kept(monkeypatch):
    monkeypatch.setattr(module, "MOST_IMAGES", 30)
    monkeypatch.setattr(module, "MOST_POINTS", 50)
    data = report_data(evaluated=100, trained=300)
    assert data.images.evaluated == 30
    assert len(data.correct) == 100  # the probabilities are judged by all
    wrong = data.images.labels[:30] != data.images.predicted[:30]
    assert wrong.sum() == 15
    assert data.metrics.n == 100
    places = data.kin.index[data.kin.index >= 0]
    assert set(range(30, len(data.images.names))) == set(places) | set(data.suspicious)
    assert data.with_kin.tolist() == [*range(30), *data.suspicious]


def test_of_many_errors_those_that_the_network_is_most_sure_of_are_kept(monkeypatch):
    monkeypatch.setattr(module, "MOST_IMAGES", 20)
    some, every = report_data(errors=0.8), module_of_all(errors=0.8)
    images = some.images
    kept = images.probability[:20][images.labels[:20] != images.predicted[:20]]
    assert len(kept) == 10
    assert sorted(kept) == sorted(every)[-10:]


def module_of_all(**options):
    """What the wrong classes of all errors got."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MOST_IMAGES", 1000)
        data = report_data(**options)
    count = data.images.evaluated
    wrong = data.images.labels[:count] != data.images.predicted[:count]
    return data.images.probability[:count][wrong].tolist()


def test_a_large_set_without_suspicious_labels(monkeypatch):
    monkeypatch.setattr(module, "MOST_POINTS", 50)
    data = report_data(flipped=0)
    assert (len(data.suspicious), data.mislabelled) == (0, 0)
    assert data.with_kin.tolist() == list(range(40))
    few = data.images.suspicion[40:] < 0.005
    assert few.any()
    assert ((data.images.other[40:] == -1) == few).all()


@pytest.mark.parametrize("trained", [1, 2, 12])  # of four classes: too few to vote on a label
def test_few_training_images_are_not_suspicious(trained):
    data = report_data(trained=trained)
    assert (len(data.suspicious), data.mislabelled) == (0, 0)


def test_an_image_that_is_alone_in_its_class_is_not_suspicious():
    rng = np.random.default_rng(0)
    features = torch.from_numpy(rng.normal(1, 0.1, (60, 8)))
    labels = np.zeros(60, np.int64)
    labels[7] = 1
    found = suspects(features, labels, 2)
    assert not found.suspicious.any()
    assert (found.own[7], found.votes[7]) == (0, 0)
    labels[8] = 1
    assert suspects(features, labels, 2).suspicious[[7, 8]].all()


def test_what_is_listed_has_a_picture_before_others():
    data = small()
    listed = {*data.worst, *data.uncertain, *data.suspicious}
    assert set(data.sprite.cells) >= set(range(100))
    few = report_data(pictures=len(listed))
    assert {place for place, cell in enumerate(few.sprite.cells) if cell >= 0} == listed


def test_a_second_map_by_tsne():
    pytest.importorskip("openTSNE")
    data = report_data(30, 30, with_tsne=True)
    assert data.images.other_places.shape == (60, 2)
    assert report_data(30, 30).images.other_places is None


def test_a_map_by_tsne_of_many_images_has_both_kinds_and_all_errors(monkeypatch):
    pytest.importorskip("openTSNE")
    monkeypatch.setattr(module, "MOST_TSNE", 60)
    data = report_data(100, 90, with_tsne=True)
    images = data.images
    there = np.isfinite(images.other_places[:, 0])
    assert there[:100].sum() == there[100:].sum() == 30
    assert there[:100][images.labels[:100] != images.predicted[:100]].all()
    assert there[data.suspicious].all()
    few = report_data(100, 20, with_tsne=True).images.other_places
    assert np.isfinite(few[:100, 0]).sum() == 40
    assert np.isfinite(few[100:]).all()
