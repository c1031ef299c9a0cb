"""Every objective learns with its default options: three epochs of a full-width resnet10t on real digits."""

from __future__ import annotations

import pytest
from tests.processes import finish, start

from nearkin.objectives import Objective


def learns(name, folder):
    import nearkin

    options = {"model": "resnet10t", "epochs": 3, "threads": 1}
    result = nearkin.train("digits", name, out=folder / "run", **options)
    (folder / "accuracy").write_text(str(result.test_top1))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(Objective.registry))
def test_three_epochs_on_digits_reach_90_percent(name, tmp_path):
    log = tmp_path / "log"
    assert finish(start(learns, name, tmp_path, log=log)) == [0], log.read_text()
    assert float((tmp_path / "accuracy").read_text()) >= 0.9
