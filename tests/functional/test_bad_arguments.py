"""The public names, their imports, and arguments that cannot be meant."""

import ast
from pathlib import Path

import jaxtyping
import pytest
import torch
from functional_cases import make

from nearkin import functional as F

X = make([0, 0, 1, 1])
NAMES = """PerAnchor SoftPairs arcface_logits arcface_margin binary_cross_entropy consistency_kl cosface_logits
cosface_margin cosine_logits cross_entropy gpaco instance_nce instance_nce_bank mean_valid
neighbour_nll neighbour_target orthogonal_projection schane sigsup sincere soft_pairs supcon_in supcon_out
symmetric_ce triplet_batch_hard varcon""".split()


def bank(**changes):
    return {"temperature": 0.1, "topk": 3} | changes


def neighbours(mask):
    return F.neighbour_nll(X.features, X.labels, X.bank, X.bank_labels, mask=mask, **bank())


def margin(function, **settings):
    return function(X.features, X.weight, X.labels, **settings)


def gpaco(**changes):
    settings = {"alpha": 0.1, "temperature": 0.1, "smoothing": 0.0} | changes
    return F.gpaco(X.features, X.labels, X.logits, X.bank, X.bank_labels, **settings)


def test_public_names():
    assert sorted(F.__all__) == sorted(NAMES)
    for name in F.__all__:
        assert getattr(F, name).__doc__


def test_imports_torch_and_jaxtyping_only():
    allowed = {"torch", "jaxtyping", "nearkin"}
    standard = {"__future__", "collections", "functools", "itertools", "inspect", "math", "typing"}
    for path in Path(F.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [each.name for each in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                assert name.split(".")[0] in allowed | standard
                assert name.startswith("nearkin.functional") or not name.startswith("nearkin")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: F.supcon_out(X.features, X.labels, temperature=0.0), "temperature is 0.0"),
        (lambda: F.supcon_in(X.features, X.labels, temperature=-1.0), "temperature is -1.0"),
        (lambda: F.sincere(X.features, X.labels, temperature=float("nan")), "temperature is nan"),
        (lambda: F.varcon(X.features, X.labels, temperature=0.0, epsilon=0.0), "temperature is 0"),
        (lambda: F.varcon(X.features, X.labels, temperature=0.1, epsilon=-0.1), "epsilon is -0.1"),
        (lambda: gpaco(temperature=0.0), "temperature is 0.0"),
        (lambda: gpaco(alpha=-0.1), "alpha is -0.1"),
        (
            lambda: F.schane(X.features, X.labels, temperature=0.1, hardness=float("nan")),
            "hardness is nan",
        ),
        (lambda: F.triplet_batch_hard(X.features, X.labels, margin=float("nan")), "margin is nan"),
        (lambda: gpaco(smoothing=1.0), "smoothing is 1.0"),
        (lambda: F.cross_entropy(X.logits, X.labels, smoothing=-0.1), "smoothing is -0.1"),
        (
            lambda: F.neighbour_nll(X.features, X.labels, X.bank, X.bank_labels, **bank(topk=0)),
            "topk is 0",
        ),
        (
            lambda: F.neighbour_target(X.features, X.bank, X.bank_probs, temperature=0.0),
            "temperature is 0.0",
        ),
        (
            lambda: F.supcon_out(X.features, X.labels, temperature=float("inf")),
            "temperature is inf",
        ),
        (lambda: F.symmetric_ce(X.logits, X.labels, alpha=-1.0, beta=0.0), "alpha is -1.0"),
        (lambda: F.symmetric_ce(X.logits, X.labels, alpha=1.0, beta=float("nan")), "beta is nan"),
        (lambda: F.orthogonal_projection(X.features, X.labels, gamma=-1.0), "gamma is -1.0"),
        (lambda: margin(F.cosface_logits, margin=float("nan"), scale=1.0), "margin is nan"),
        (lambda: margin(F.arcface_logits, margin=-0.1, scale=1.0), "margin is -0.1"),
        (lambda: margin(F.arcface_logits, margin=0.1, scale=-16.0), "scale is -16.0"),
        (lambda: F.cosine_logits(X.features, X.weight, scale=0.0), "scale is 0.0"),
    ],
)
def test_a_setting_out_of_range(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    "call",
    [
        lambda: F.supcon_out(X.features, X.labels[:, None], temperature=0.1),
        lambda: F.supcon_out(X.features[:, 0], X.labels, temperature=0.1),
        lambda: F.varcon(X.features, X.labels.double(), temperature=0.1, epsilon=0.0),
        lambda: F.consistency_kl(X.logits, X.logits[:, :2]),
        lambda: F.neighbour_nll(X.features, X.labels, X.bank[:, :3], X.bank_labels, **bank()),
        lambda: F.cosface_logits(X.features, X.weight.T, X.labels, margin=0.1, scale=1.0),
        lambda: F.instance_nce(X.features, X.features[:2], temperature=0.1),
        lambda: F.sigsup(X.features, X.labels, log_scale=torch.zeros(4), bias=0.0),
    ],
)
def test_shapes_in_the_signatures_are_enforced_here(call):
    with pytest.raises(jaxtyping.TypeCheckError):
        call()


@pytest.fixture
def unchecked():
    """Without the enforcement of the tests, as users run it."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


SOFT_LABELS = torch.full((4, 4), 0.25)
ONE_ROW = torch.tensor([0])


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: F.supcon_out(X.features, ONE_ROW, temperature=0.1), "labels .* 4 rows"),
        (lambda: F.supcon_in(X.features, X.labels.double(), temperature=0.1), "float64 of shape"),
        (lambda: F.schane(X.features, SOFT_LABELS.long(), temperature=0.1, hardness=1.0), "int64"),
        (lambda: F.orthogonal_projection(X.features, ONE_ROW, gamma=0.5), "labels .* 4 rows"),
        (lambda: F.varcon(X.features, SOFT_LABELS, temperature=0.1, epsilon=0.0), "two labels"),
        (lambda: F.triplet_batch_hard(X.features, SOFT_LABELS, margin=0.1), "two labels"),
        (lambda: F.triplet_batch_hard(X.features, ONE_ROW, margin=0.1), "labels .* 4 rows"),
        (
            lambda: F.cosface_logits(X.features, X.weight, SOFT_LABELS, margin=0.1, scale=1.0),
            "two labels",
        ),
        (lambda: F.cross_entropy(X.logits, SOFT_LABELS[:, :1]), "1 columns .* 4"),
        (lambda: F.symmetric_ce(X.logits, ONE_ROW, alpha=1.0, beta=1.0), "labels .* 4 rows"),
        (lambda: F.instance_nce(X.features, X.features[:1], temperature=0.1), "view2 has shape"),
        (lambda: F.consistency_kl(X.logits, X.logits[:1]), "target has shape"),
        (lambda: F.consistency_kl(X.logits, X.logits[:, :1]), "target has shape"),
        (
            lambda: F.neighbour_target(X.features, X.bank, X.bank_probs[:3], temperature=0.1),
            "bank_probs .* 12 rows",
        ),
        (
            lambda: F.neighbour_nll(X.features, X.labels, X.bank, ONE_ROW, **bank()),
            "bank_labels .* 12 rows",
        ),
        (lambda: neighbours(mask=X.mask[:1]), "mask has shape"),
        (lambda: neighbours(mask=X.mask[:, :1]), "mask has shape"),
        (lambda: neighbours(mask=X.mask[0, :3]), "mask has shape"),
        (lambda: gpaco(mask=X.mask[:1]), "mask has shape"),
        (
            lambda: F.schane(
                X.features, X.labels, temperature=0.1, hardness=1.0, positives="median"
            ),
            "positives is 'median'",
        ),
        (
            lambda: F.sigsup(X.features, X.labels, log_scale=1.0, bias=0.0, normalise="mean"),
            "normalise is 'mean'",
        ),
        (lambda: F.sigsup(X.features, ONE_ROW, log_scale=1.0, bias=0.0), "labels .* 4 rows"),
        (
            lambda: F.sigsup(X.features, X.labels, log_scale=torch.zeros(4), bias=0.0),
            "log_scale has shape",
        ),
        (lambda: F.supcon_out(X.features[:, 0], X.labels, temperature=0.1), "must be rows"),
        (
            lambda: F.binary_cross_entropy(X.logits, X.labels, class_weights=torch.ones(1)),
            "class_weights .* 4 rows",
        ),
        (
            lambda: F.supcon_out(X.features, X.labels, temperature=torch.tensor(0.1)),
            "temperature is a tensor",
        ),
        (
            lambda: F.schane(X.features, X.labels, temperature=0.1, hardness=torch.tensor(1.0)),
            "hardness is a tensor",
        ),
        (lambda: F.soft_pairs(torch.tensor([[0.4, 0.3, 0.3]])), "two largest of labels"),
    ],
)
def test_a_mistake_that_broadcasting_would_hide(call, message):
    with pytest.raises(ValueError, match=message):
        call()
