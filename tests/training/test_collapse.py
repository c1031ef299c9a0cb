"""When a run says that its embeddings have collapsed."""

from __future__ import annotations

import json

import torch

from nearkin.objectives import SupCon
from nearkin.training.checks import CollapseWatch

COLLAPSED = {"ce": 2.0, "supcon": 4.0, "consistency": 0.0}
LEARNING = {"ce": 1.0, "supcon": 3.5, "consistency": 0.0}
STUCK = LEARNING | {"supcon": 4.03}


def told(*epochs, stage="joint"):
    watch = CollapseWatch()
    return [watch.check(stage, n, means, COLLAPSED) for n, means in enumerate(epochs)]


def test_two_epochs_in_a_row_after_the_first_give_one_warning():
    texts = told(STUCK, STUCK, STUCK, STUCK)
    assert [text is not None for text in texts] == [False, False, True, False]
    assert "supcon is 4.0300" in texts[2]
    assert "gives 4.0000" in texts[2]
    assert "--lr" in texts[2]


def test_a_run_that_learns_gets_no_warning():
    assert told(*[LEARNING] * 9) == [None] * 9
    assert told(STUCK, STUCK, LEARNING, STUCK, LEARNING) == [None] * 5
    away = LEARNING | {"supcon": 4.05}
    assert told(*[away] * 5) == [None] * 5


def test_each_stage_is_watched_anew():
    watch = CollapseWatch()
    for stage in ("contrast", "linear"):
        texts = [watch.check(stage, n, STUCK, COLLAPSED) for n in range(4)]
        assert [text is not None for text in texts] == [False, False, True, False], stage


def test_a_restored_watch_goes_on_where_it_was():
    whole = CollapseWatch()
    texts = [whole.check("joint", n, STUCK, COLLAPSED) for n in range(5)]
    for stop in range(5):
        watch = CollapseWatch()
        for n in range(stop):
            watch.check("joint", n, STUCK, COLLAPSED)
        state = json.loads(json.dumps(watch.state()))
        watch = CollapseWatch()
        watch.load(state)
        assert [watch.check("joint", n, STUCK, COLLAPSED) for n in range(stop, 5)] == texts[stop:]


def test_train_says_so(tmp_path, monkeypatch, capfd):
    """A real run whose projection gives the same row for everything."""
    import nearkin

    unbent = SupCon.contrast

    def bent(self, features, labels):
        return unbent(
            self, features * 0 + torch.ones_like(features) / features.shape[1] ** 0.5, labels
        )

    monkeypatch.setattr(SupCon, "contrast", bent)
    nearkin.train(
        "digits",
        "supcon",
        quiet=False,
        images_per_class=8,
        epochs=3,
        batch_size=32,
        model="test_resnet",
        threads=1,
        out=tmp_path / "run",
    )
    warnings = [line for line in capfd.readouterr().err.splitlines() if "collapsed" in line]
    assert len(warnings) == 1
    assert warnings[0].startswith("warning: In epoch 3 of joint the term supcon is 4.14")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    epochs = [r for r in map(json.loads, lines) if r["kind"] == "epoch"]
    assert [record["without_positive"] for record in epochs] == [0, 0, 0]
