"""The kin of a run: what is stored, who is nearest, and that a damaged file is refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import normalize

import nearkin
from nearkin.bank import NeighbourBank
from nearkin.data.dataset import load_dataset
from nearkin.errors import ModelError
from nearkin.evaluation import kin as module
from nearkin.evaluation.kin import FILE, Kin, distance, nearest, read_kin, unlike, write_kin
from nearkin.functional import neighbour_nll
from nearkin.objectives import get


def random_kin(n=40, e=6, classes=4, temperature=0.1, neighbours=9):
    generator = torch.Generator().manual_seed(0)
    return Kin(
        normalize(torch.randn(n, e, generator=generator), dim=1).half().float(),
        torch.randint(classes, (n,), generator=generator),
        tuple(f"class/{row}.jpg" for row in range(n)),
        temperature,
        neighbours,
        torch.tensor([0.1, 0.2, 0.3, 0.4]),
        torch.tensor([0.0, 0.5]),
    )


def test_nearest_by_a_loop():
    kin = random_kin()
    queries = 5 * torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    found = nearest(kin, queries)
    for row, query in enumerate(queries):
        cosines = [float(query @ key / query.norm()) for key in kin.embeddings]
        order = sorted(range(len(cosines)), key=lambda k: -cosines[k])[:9]
        assert found.index[row].tolist() == order
        powers = [2.718281828459045 ** (cosines[k] / 0.1) for k in order]
        assert found.weight[row].tolist() == pytest.approx([p / sum(powers) for p in powers], 1e-4)
        assert float(distance(found)[row]) == pytest.approx(
            1 - sum(cosines[k] for k in order[:5]) / 5, abs=1e-5
        )
    assert nearest(kin, queries, most=100).index.shape == (3, 40)


def test_no_image_is_more_similar_than_equal():
    """The stored keys are rounded, and may be a little longer than 1."""
    kin = random_kin()
    long = kin._replace(embeddings=kin.embeddings * 1.001)
    found = nearest(long, long.embeddings)
    assert found.similarity.max() == 1
    assert distance(found).min() >= 0


def test_the_weights_are_the_attention_of_cones_loss():
    kin = random_kin()
    queries = normalize(torch.randn(5, 6, generator=torch.Generator().manual_seed(2)), dim=1)
    labels = torch.tensor([0, 1, 2, 3, 0])
    bank = NeighbourBank(40, 6, 0)
    bank.write(kin.embeddings, kin.labels, None, torch.arange(100, 140))
    loss = neighbour_nll(
        queries, labels, bank.keys, bank.labels[:, 0], temperature=kin.temperature, topk=9
    )
    found = nearest(kin, queries)
    own = (found.weight * (kin.labels[found.index] == labels[:, None])).sum(1)
    some = own > 0  # without a neighbour of its class an anchor counts with loss 0
    assert some.tolist() == [True, True, False, True, True]
    assert torch.allclose(-own.log()[some], loss.value[some], atol=1e-5)


def test_unlike_is_a_share_of_validation():
    shares = unlike(random_kin(), torch.tensor([0.0, 0.25, 9.0]))
    assert shares.tolist() == [0.0, 0.5, 1.0]
    assert unlike(random_kin()._replace(typical=torch.empty(0)), torch.tensor([1.0])) is None


def test_a_file_gives_back_what_was_written(tmp_path):
    kin = random_kin()._replace(names=("a\udcff.jpg", *random_kin().names[1:]))
    write_kin(tmp_path, kin)
    again = read_kin(tmp_path, 4)
    assert again.names == kin.names
    for mine, theirs in zip(kin, again, strict=True):
        assert torch.equal(mine, theirs) if isinstance(mine, torch.Tensor) else mine == theirs


@pytest.mark.parametrize(
    "change",
    [
        {"labels": torch.full((40,), 4)},
        {"labels": torch.zeros(39, dtype=torch.long)},
        {"labels": torch.zeros(40)},
        {"names": torch.frombuffer(bytearray(b"[1]"), dtype=torch.uint8)},
        {"names": torch.frombuffer(bytearray(json.dumps([1] * 40).encode()), dtype=torch.uint8)},
        {"names": torch.frombuffer(bytearray(b"[[[["), dtype=torch.uint8)},
        {"attention": torch.tensor([0.0, 5.0])},
        {"attention": torch.tensor([float("nan"), 5.0])},
        {"attention": torch.tensor([0.1])},
        {"embeddings": torch.full((40, 6), float("inf"))},
        {"embeddings": torch.zeros(40)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_damage_is_refused(tmp_path, change):
    write_kin(tmp_path, random_kin())
    tensors = load_file(tmp_path / FILE)
    save_file(tensors | change, tmp_path / FILE)
    with pytest.raises(ModelError, match="damaged"):
        read_kin(tmp_path, 4)


def test_a_missing_file_is_said(tmp_path):
    with pytest.raises(ModelError, match="is missing"):
        read_kin(tmp_path, 4)


def test_of_many_training_images_each_one_kept_has_its_own_label(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MOST_KEYS", 50)
    options = {"model": "test_resnet", "images_per_class": 20, "threads": 1, "workers": 0}
    run = nearkin.train("digits", "ce", epochs=0, out=tmp_path / "run", **options).run
    kin, train = read_kin(run, 10), load_dataset("digits", images_per_class=20).splits["train"]
    names = [train.images.name(row) for row in range(200)]
    known = dict(zip(names, train.labels.tolist(), strict=True))
    assert kin.labels.tolist() == [known[name] for name in kin.names]
    assert kin.labels.bincount().tolist() == [5] * 10


@pytest.mark.parametrize("objective", ["ce", "cone"])
def test_a_run_keeps_its_training_images(tmp_path, objective):
    run = nearkin.train(
        "digits", objective, epochs=1, images_per_class=20, threads=1, workers=0, out=tmp_path / "r"
    ).run
    kin = read_kin(run, 10)
    assert len(kin.names) == 200
    assert torch.allclose(kin.embeddings.norm(dim=1), torch.ones(200), atol=1e-3)
    validation = load_dataset("digits", images_per_class=20).splits["val"]
    assert len(kin.typical) == len(kin.scores) == len(validation.labels)
    assert kin.typical.tolist() == sorted(kin.typical.tolist())
    kind = get(objective)
    config = kind(dim=8, classes=10, images=200, batch_size=100).config
    assert kin.temperature == getattr(config, "neighbour_temperature", 0.1)
    assert json.loads((run / "model.json").read_text())["temperature"] > 0
