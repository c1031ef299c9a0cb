"""What can be compared, and what is refused."""

from __future__ import annotations

import pytest

from nearkin.comparison.entries import parse
from nearkin.errors import ConfigError


def test_cross_entropy_comes_first_and_is_added():
    assert [entry.name for entry in parse(["supcon", "ce"])] == ["ce", "supcon"]
    assert [entry.name for entry in parse(["cone"])] == ["ce", "cone"]


def test_options_of_the_objective_and_of_the_run():
    entry = parse(["supcon:weight=1:lr=1e-3:head-lr=2"])[1]
    assert entry.objective == "supcon"
    assert entry.options == {"objective.weight": "1", "lr": "1e-3", "head_lr": "2"}
    assert entry.folder == "supcon-weight-1-lr-1e-3-head-lr-2"


def test_rivals_of_cross_entropy():
    smooth, averaged = parse(["ce", "ce+ls", "ce+ema"])[1:]
    assert smooth.options == {"objective.smoothing": 0.1}
    assert (averaged.objective, averaged.rival) == ("ce", "ema")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("kone", "Did you mean cone"),
        ("ce+sl", "rivals of ce are ce\\+ls"),
        ("supcon+ls", "rivals of ce"),
        ("supcon:weigth=1", "Did you mean weight"),
        ("supcon:weight", "OPTION=VALUE"),
        ("supcon:epochs=3", "not fair: --epochs is the same for all"),
        ("supcon:data=x", "not fair"),
        ("supcon:autotune=true", "not fair"),
        ("ce", "nothing to compare"),
        ("", "nothing to compare"),
        ("supcon,supcon", "given twice"),
    ],
)
def test_what_is_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        parse(words.split(","))
