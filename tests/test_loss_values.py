"""docs/loss-values.md: its table is what the code computes, and what the equations give."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
from benchmarks import loss_values

from nearkin.training.checks import NEAR

PAGE = (Path(__file__).parents[1] / "docs" / "loss-values.md").read_text()
ROWS = re.findall(r"^\| `([\w-]+)` \| `(\w+)` \| ([\d.]+) \| ([\d.]+) \| (.*) \|$", PAGE, re.M)
C, B, N = 10, 80, 160  # classes, images, crops where there are two of each image
LN = math.log(C)


def varcon(own):
    """KL(target || p) - log p of the own class, from the cosine to the own centre; other centres have `other`."""
    own, other = own
    exp = [math.exp(own / 0.1), *[math.exp(other / 0.1)] * (C - 1)]
    p = [e / sum(exp) for e in exp]
    temperature = 0.1 - 0.02 + 2 * 0.02 * p[0]
    exp = [math.exp(1 / temperature), *[1.0] * (C - 1)]
    q = [e / sum(exp) for e in exp]
    return sum(a * math.log(a / b) for a, b in zip(q, p, strict=True)) - math.log(p[0])


def softplus(x):
    return math.log1p(math.exp(x))


SCE = -math.log(1e-4) * (1 - 1 / C)
KIN = 7 + 8 + 8  # of an anchor of gpaco: crops of the batch, keys of the batch, entries of the bank
OTHERS = 79 + 80 + 80
# objective, term: at chance (cosines 0), at collapse (cosines 1); from the equations of docs/methods.
EXPECTED = {
    ("arcface", "ce"): [math.log(1 + (C - 1) * math.exp(16 * math.sin(0.2)))] * 2,
    ("attract-repulse", "sce"): [LN + 0.0167 * SCE] * 2,
    ("attract-repulse", "repulse"): [math.log(N - 1)] * 2,
    ("cone", "neighbour"): [LN] * 2,
    ("cone", "consistency"): [0.0] * 2,
    ("cosface", "ce"): [math.log(1 + (C - 1) * math.exp(16 * 0.2))] * 2,
    ("gpaco", "gpaco"): [
        math.log(C + OTHERS * math.exp(cosine / 0.2)) - 0.05 * KIN * cosine / 0.2 / (1 + 0.05 * KIN)
        for cosine in (0, 1)
    ],
    ("opl", "opl"): [1.0, 0.5],
    ("sce", "sce"): [0.1 * LN + SCE] * 2,
    ("schane", "schane"): [math.log(1 + 144)] * 2,
    ("sigsup", "sigsup"): [
        softplus(10) + 144 * softplus(-10) / 15,
        159 * math.log(2) / 15,
    ],
    ("sincere", "sincere"): [math.log(1 + 144)] * 2,
    ("supcon", "supcon"): [math.log(N - 1)] * 2,
    ("triplet", "triplet"): [0.2] * 2,
    # The own centre holds the anchor itself: of 16 rows at right angles, a cosine of 1/4.
    ("varcon", "varcon"): [varcon((0.25, 0.0)), varcon((1.0, 1.0))],
}
EXPECTED |= {(name, "ce"): [LN] * 2 for name, *_ in ROWS if (name, "ce") not in EXPECTED}


@pytest.mark.parametrize(("name", "term", "chance", "collapse"), [row[:4] for row in ROWS])
def test_the_numbers_of_the_table(name, term, chance, collapse):
    shown = [float(chance), float(collapse)]
    assert shown == pytest.approx(EXPECTED[name, term], abs=6e-4)
    assert shown == pytest.approx(loss_values.values(name)[term], abs=6e-4)


def test_every_term_of_every_objective_is_in_the_table():
    rows = [" | ".join(f"| `{n}` | `{t}` | {a} | {b} |".split(" | ")) for n, t, a, b, _ in ROWS]
    assert rows == loss_values.table()


def test_the_numbers_of_the_text():
    sizes = dict(re.findall(r"^\| (\d+) \| ([\d.]+) \|$", PAGE, re.M))
    assert len(sizes) >= 4
    for batch, value in sizes.items():
        assert float(value) == pytest.approx(math.log(2 * int(batch) - 1), abs=6e-4)
    own = 0.9 + 0.1 / C
    entropy = -own * math.log(own) - (1 - own) * math.log((1 - own) / (C - 1))
    assert f"{entropy:.3f}" in PAGE
    assert f"within {100 * NEAR:g} %" in PAGE
