"""The geometry of embeddings against loops over pairs."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

import nearkin
from nearkin.errors import DivergedError
from nearkin.evaluation import geometry as module
from nearkin.evaluation.geometry import geometry


def rows(count, width, seed=0):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def by_loops(embeddings, labels):
    z = embeddings.double().numpy()
    z = z / np.linalg.norm(z, axis=1, keepdims=True)
    pairs = [(i, j) for i in range(len(z)) for j in range(len(z)) if i != j]
    distance = {(i, j): float(((z[i] - z[j]) ** 2).sum()) for i, j in pairs}
    within = [p for p in pairs if labels[p[0]] == labels[p[1]]]
    between = [p for p in pairs if labels[p[0]] != labels[p[1]]]
    values = np.linalg.svd(z - z.mean(0), compute_uv=False)
    share = [v / values.sum() for v in values if v > 1e-12]
    eigenvalues, vectors = np.linalg.eigh(z.T @ z)
    sums = [
        np.exp(sign * z @ vectors[:, k]).sum() for k in range(len(eigenvalues)) for sign in (1, -1)
    ]

    def mean(values):
        return sum(values) / len(values) if values else None

    return {
        "alignment": mean([distance[p] for p in within]),
        "uniformity": math.log(mean([math.exp(-2 * distance[p]) for p in pairs])),
        "effective_rank": math.exp(-sum(s * math.log(s) for s in share)),
        "intra_cosine": mean([1 - distance[p] / 2 for p in within]),
        "inter_cosine": mean([1 - distance[p] / 2 for p in between]),
        "isotropy": min(sums) / max(sums),
    }


@pytest.mark.parametrize("labels", [[0, 1, 2] * 4, [0] * 12, list(range(12)), [0] * 11 + [5]])
@pytest.mark.parametrize("width", [3, 30])
def test_every_number_is_that_of_the_loops(labels, width):
    embeddings = 7 * rows(12, width) + 1
    found, expected = geometry(embeddings, torch.tensor(labels)), by_loops(embeddings, labels)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        wanted = None if value is None else pytest.approx(value, rel=1e-9, abs=1e-12)
        assert found[name] == wanted, name


def test_a_collapsed_network_is_seen():
    found = geometry(torch.ones(9, 4), torch.tensor([0, 1, 2] * 3))
    assert found["effective_rank"] == 0.0
    assert found["uniformity"] == pytest.approx(0.0, abs=1e-9)
    assert found["intra_cosine"] == pytest.approx(1.0)
    assert found["inter_cosine"] == pytest.approx(1.0)
    assert found["isotropy"] == pytest.approx(math.exp(-2))


def test_classes_at_right_angles():
    found = geometry(torch.eye(3).repeat(4, 1), torch.tensor([0, 1, 2] * 4))
    assert found["alignment"] == pytest.approx(0.0, abs=1e-12)
    assert found["inter_cosine"] == pytest.approx(0.0, abs=1e-12)
    assert found["effective_rank"] == pytest.approx(2.0)  # three points span a plane


def test_a_row_of_zeros_has_no_direction():
    embeddings = torch.tensor([[0.0, 0.0], [0.0, 0.0], [3.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
    found = geometry(embeddings, torch.tensor([0, 0, 1, 1, 0]))
    z = [(0, 0), (0, 0), (1, 0), (1, 0), (0, 1)]
    same = [(0, 1), (0, 4), (1, 4), (2, 3)]
    apart = [sum((a - b) ** 2 for a, b in zip(z[i], z[j], strict=True)) for i, j in same]
    assert found["alignment"] == pytest.approx(sum(apart) / 4)
    assert found["intra_cosine"] == pytest.approx(1 / 4)


def test_equal_images_of_one_class():
    found = geometry(torch.ones(6, 3), torch.zeros(6, dtype=torch.int64))
    assert found["alignment"] == pytest.approx(0.0, abs=1e-12)
    assert found["inter_cosine"] is None
    assert all(value is None or math.isfinite(value) for value in found.values())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_refused(value):
    embeddings = rows(5, 4)
    embeddings[2, 1] = value
    with pytest.raises(DivergedError, match="not finite"):
        geometry(embeddings, torch.arange(5))


def test_wide_embeddings_have_their_spectrum_from_fewer_rows(monkeypatch):
    embeddings, labels = rows(40, 12), torch.arange(40) % 4
    whole = geometry(embeddings, labels)
    monkeypatch.setattr(module, "SPECTRUM", 12)
    assert geometry(embeddings, labels) == whole
    monkeypatch.setattr(module, "SPECTRUM", 10)
    fewer = geometry(embeddings, labels)
    thinned = geometry(embeddings[::4], labels[::4])
    for name in whole:
        expected = thinned if name in ("effective_rank", "isotropy") else whole
        assert fewer[name] == pytest.approx(expected[name], rel=1e-9), name


def test_one_image_has_no_pairs():
    found = geometry(rows(1, 4), torch.tensor([3]))
    assert found["alignment"] is found["uniformity"] is found["inter_cosine"] is None
    assert all(value is None or math.isfinite(value) for value in found.values())


def test_a_large_split_is_thinned_evenly(monkeypatch):
    monkeypatch.setattr(module, "ROWS", 10)
    embeddings, labels = rows(95, 5), torch.arange(95) % 4
    assert geometry(embeddings, labels) == geometry(embeddings[::10], labels[::10])


@pytest.mark.parametrize("options", [{}, {"mode": "two-stage", "contrast_share": 0.5}])
def test_training_logs_it_every_epoch(tmp_path, options):
    result = nearkin.train(
        "digits",
        "supcon",
        objective_options=options,
        images_per_class=8,
        epochs=2,
        batch_size=16,
        model="test_resnet",
        threads=1,
        out=tmp_path / "run",
    )
    lines = (result.run / "metrics.jsonl").read_text().splitlines()
    found = [r for r in map(json.loads, lines) if r["kind"] == "validation"]
    assert len(found) == 2
    for record in found:
        assert -1 <= record["inter_cosine"] <= record["intra_cosine"] <= 1
        assert record["alignment"] == pytest.approx(2 - 2 * record["intra_cosine"])
        assert 1 <= record["effective_rank"] <= 96
