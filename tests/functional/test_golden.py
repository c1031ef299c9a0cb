"""Every published reference number, value and gradient, in float64 and in float32."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from nearkin import functional as F

DATA = np.load(Path(__file__).parents[1] / "golden" / "objectives.npz")
NAMES = sorted({name.split("/")[0] for name in DATA.files} - {"in"})


def given(name, dtype):
    value = torch.from_numpy(DATA[f"in/{name}"])
    return value.to(dtype) if value.is_floating_point() else value


def number(name, letter):
    """The setting in a row's name, as in `schane_beta0.5_t0.1`."""
    return float(re.search(rf"(?:_|^){letter}([0-9.]+)(?:_|$)", name)[1])


def two_views(function, **settings):
    def run(get, first, second):
        labels = get("labels").repeat(2)
        return F.mean_valid(function(torch.cat([first, second]), labels, **settings))

    return run, ["z", "z_view2"]


def of_rows(function, **settings):
    return lambda get, z: F.mean_valid(function(z, get("labels"), **settings)), ["z"]


def of_unit_rows(function, **settings):
    def run(get, z):
        result = function(normalize(z, dim=1), get("labels"), **settings)
        return F.mean_valid(result) if isinstance(result, F.PerAnchor) else result

    return run, ["z"]


def margin_head(function, **settings):
    def run(get, z):
        weight, labels = get("margin_W").T, get("labels")
        logits = function(normalize(z, dim=1), weight, labels, **settings)
        return F.mean_valid(F.cross_entropy(logits, labels))

    return run, ["z"]


def neighbour(get, query):
    labels, bank, bank_labels = get("labels"), get("cone_bank"), get("cone_bank_labels")
    topk = int(get("cone_topk"))
    return F.mean_valid(
        F.neighbour_nll(query, labels, bank, bank_labels, temperature=0.1, topk=topk)
    )


def consistency(get, logits):
    target = F.neighbour_target(
        get("cone_key"), get("cone_bank"), get("cone_bank_probs"), temperature=0.07
    )
    return F.mean_valid(F.consistency_kl(logits, target))


def gpaco(get, z, logits):
    bank, bank_labels = get("cone_bank"), get("cone_bank_labels")
    settings = {"alpha": 0.05, "temperature": 0.2, "smoothing": 0.1}
    return F.mean_valid(F.gpaco(z, get("labels"), logits, bank, bank_labels, **settings))


def simclr(**settings):
    def run(get, first, second):
        return F.mean_valid(F.instance_nce(first, second, **settings))

    return run, ["z", "z_view2"]


def symmetric_ce(**settings):
    return lambda get, x: F.mean_valid(F.symmetric_ce(x, get("labels"), **settings)), ["logits"]


def row(name):
    """The function that must reproduce a row, and the inputs that its gradients belong to."""
    match name.split("_")[:2]:
        case ["cone", "neighbour"]:
            return neighbour, ["cone_query"]
        case ["cone", "consistency"]:
            return consistency, ["logits"]
        case ["schane", kind]:
            hardness = 0.0 if kind == "easy" else number(name, "beta")
            return two_views(F.schane, temperature=number(name, "t"), hardness=hardness)
        case ["supcon", "out"]:
            return two_views(F.supcon_out, temperature=number(name, "t"))
        case ["sincere", _]:
            return two_views(F.sincere, temperature=number(name, "t"))
        case ["simclr", _]:
            return simclr(temperature=number(name, "t"))
        case ["orthogonal", _]:
            return of_unit_rows(F.orthogonal_projection, gamma=number(name, "gamma"))
        case ["triplet", _]:
            return of_unit_rows(F.triplet_batch_hard, margin=number(name, "margin"))
        case ["symmetric", _]:
            return symmetric_ce(alpha=number(name, "alpha"), beta=number(name, "beta"))
        case ["varcon", _]:
            return of_rows(F.varcon, temperature=number(name, "t"), epsilon=number(name, "eps"))
        case ["gpaco", _]:
            return gpaco, ["z", "logits"]
        case ["cosface", _]:
            return margin_head(F.cosface_logits, margin=number(name, "m"), scale=number(name, "s"))
        case ["arcface", _]:
            margin = math.radians(number(name, "m"))
            return margin_head(F.arcface_logits, margin=margin, scale=number(name, "s"))


def distance(value, reference):
    reference = torch.from_numpy(np.asarray(reference))
    return float((value.double() - reference).norm() / reference.norm())


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-6), (torch.float32, 1e-4)])
@pytest.mark.parametrize("name", NAMES)
def test_value_and_gradients(name, dtype, bound):
    run, inputs = row(name)
    leaves = [given(each, dtype).requires_grad_() for each in inputs]
    value = run(lambda each: given(each, dtype), *leaves)
    gradients = torch.autograd.grad(value, leaves)

    assert value.dtype == dtype
    assert distance(value.detach(), DATA[f"{name}/value"]) <= bound
    for position, gradient in enumerate(gradients):
        assert distance(gradient, DATA[f"{name}/grad{position}"]) <= bound
    assert f"{name}/grad{len(leaves)}" not in DATA.files


def test_every_row_has_its_reference():
    assert len(NAMES) == 27
    assert all(f"{name}/value" in DATA.files for name in NAMES)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-6), (torch.float32, 1e-4)])
def test_mass_of_the_neighbours(dtype, bound):
    result = F.neighbour_nll(
        given("cone_query", dtype),
        given("labels", dtype),
        given("cone_bank", dtype),
        given("cone_bank_labels", dtype),
        temperature=0.1,
        topk=int(DATA["in/cone_topk"]),
    )
    assert result.valid.all()
    assert distance((-result.value).exp(), DATA["cone_neighbour_t0.1/mass"]) <= bound


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-6), (torch.float32, 1e-4)])
def test_target_of_the_neighbours(dtype, bound):
    target = F.neighbour_target(
        given("cone_key", dtype),
        given("cone_bank", dtype),
        given("cone_bank_probs", dtype),
        temperature=0.07,
    )
    assert distance(target, DATA["cone_consistency_t0.07/target"]) <= bound
