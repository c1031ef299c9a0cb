"""What an objective will meet: positives, bank and the loss of a collapsed network."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from nearkin.data.sources.resolve import resolve
from nearkin.distributed import Runtime
from nearkin.doctor.outlook import checked_forecast, objective_findings, outlook
from nearkin.training.prepare import prepare


def forecast(**options):
    config = checked_forecast("digits", {"device": "cpu", **options})
    found = objective_findings(resolve("digits"), config)
    return {finding.code: finding for finding in found}


def test_supcon():
    options = {"objective": "supcon", "batch_size": 64, "objective.views": 2}
    found = forecast(**options)
    assert "a batch of 64 and the sampler shuffle" in found["positives"].text
    # Two views of 64 images: constant embeddings are equally like all 127 others.
    assert f"{math.log(127):.4f}" in found["collapse"].text
    # 64 images, of which one in ten is of the class.
    number = float(found["positives"].text.split("meets ")[1].split()[0])
    assert number == pytest.approx(63 / 10, abs=0.15)
    assert all(finding.level == "ok" for finding in found.values())


def test_balanced_batches_have_more_positives():
    found = forecast(objective="supcon", batch_size=32, sampler="balanced", per_class=8)
    number = float(found["positives"].text.split("meets ")[1].split()[0])
    assert number >= 7


def test_a_bank_has_its_memory_and_its_kin():
    options = {"objective": "cone", "batch_size": 32, "objective.bank": 640}
    found = forecast(**options)
    assert "in a bank of 640 entries" in found["positives"].text
    kin = float(found["positives"].text.split(", and ")[1].split()[0])
    assert kin == pytest.approx(64, abs=0.5)
    assert "bank" in found["memory"].text
    # A collapsed network chooses among all entries alike: -log of the share of the class.
    neighbour = float(found["collapse"].text.split("neighbour ")[1].split(",")[0])
    assert neighbour == pytest.approx(math.log(10), abs=0.05)


def test_too_few_positives_are_a_warning():
    found = forecast(objective="supcon", batch_size=8, **{"objective.views": 1})
    assert found["no-positives"].level == "warning"
    assert "find no other image of their class" in found["no-positives"].text


def test_positives_are_looked_for_where_the_objective_looks():
    """Within blocks of 8, as training warns; batches that are balanced by themselves are the best there is."""
    options = {"batch_size": 64, "objective.views": 1}
    blocks = forecast(objective="schane", **options, **{"objective.within": 8})
    assert "among the 8 that they are compared with" in blocks["no-positives"].text
    assert "no-positives" not in forecast(objective="schane", **options)


def test_every_objective_has_a_forecast():
    from nearkin.catalogue import objectives

    for name in objectives():
        found = forecast(objective=name, batch_size=16)
        assert {"positives", "memory", "collapse"} <= set(found), name
        values = [word.strip(",") for word in found["collapse"].text.split()]
        numbers = [float(word) for word in values if word.replace(".", "").isdigit()]
        assert numbers
        assert np.isfinite(numbers).all()


@pytest.mark.parametrize("option", ["drop_rate", "drop_path"])
def test_dropout_has_a_forecast(option):
    assert "memory" in forecast(objective="ce", batch_size=16, **{option: 0.1})


@pytest.mark.parametrize("views", [1, 2])
def test_the_memory_of_activations_is_that_of_a_whole_batch(views):
    """What autograd keeps of all images of a step, beside the forecast from two of them."""
    options = {"device": "cpu", "objective": "supcon", "batch_size": 64, "objective.views": views}
    config = checked_forecast("digits", options)
    with Runtime(device="cpu", precision="fp32") as runtime:
        prepared = prepare(config, runtime, begun=True, look=False)
        forecast = outlook(prepared).memory["activations"]
        network = prepared.built.network.train()
        own = {p.untyped_storage().data_ptr() for p in network.parameters()}
        kept = {}

        def keep(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        images = torch.zeros(64 * views, 1, 8, 8, dtype=torch.uint8)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            outputs = network(images)
    assert outputs.logits is not None
    assert forecast == pytest.approx(sum(kept.values()), rel=0.1)
