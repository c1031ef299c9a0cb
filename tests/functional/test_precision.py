"""Precision, devices and side effects: what the functions do to their surroundings, which is nothing."""

import pytest
import torch
from functional_cases import ALL, SOFT, differentiated, make, mixed
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from nearkin import functional as F

LABELS = [0, 0, 1, 1, 2, 3]
SOFT_LABELS = mixed(LABELS, [1, 2, 3, 4, 5, 0], 0.7)
every = pytest.mark.parametrize("name", ALL)


def under_autocast(run):
    """`run` within autocast; the backward pass comes after, as it should."""

    def inside(sample, temperature):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return run(sample, temperature)

    return inside


def samples(name, dtype):
    return [make(LABELS, dtype)] + ([make(SOFT_LABELS, dtype)] if name in SOFT else [])


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_float32_on_the_rounded_rows(name, dtype):
    for x in samples(name, dtype):
        wide = x._replace(
            **{
                field: value.float()
                for field, value in x._asdict().items()
                if torch.is_tensor(value) and value.is_floating_point()
            }
        )
        result, gradients = differentiated(ALL[name], x, 0.1)
        expected, wide_gradients = differentiated(ALL[name], wide, 0.1)
        assert torch.equal(result.value, expected.value)
        for gradient, wide_gradient in zip(gradients, wide_gradients, strict=True):
            torch.testing.assert_close(gradient, wide_gradient.to(dtype))


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_autocast_changes_nothing(name, dtype):
    for x in samples(name, dtype):
        result, gradients = differentiated(ALL[name], x, 0.1)
        cast_result, cast_gradients = differentiated(under_autocast(ALL[name]), x, 0.1)
        assert torch.equal(result.value, cast_result.value)
        for gradient, cast_gradient in zip(gradients, cast_gradients, strict=True):
            assert torch.equal(gradient, cast_gradient)


def test_the_logits_and_targets_too_are_in_full_precision():
    x = make(LABELS, torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        target = F.neighbour_target(x.features, x.bank, x.bank_probs, temperature=0.1)
        cosface = F.cosface_logits(x.features, x.weight, x.labels, margin=0.2, scale=8.0)
        arcface = F.arcface_logits(x.features, x.weight, x.labels, margin=0.2, scale=8.0)
    assert {target.dtype, cosface.dtype, arcface.dtype} == {torch.float32}


def test_the_first_argument_decides_between_the_precisions():
    x, wide = make(LABELS, torch.float32), make(LABELS, torch.float64)
    bank = {"temperature": 0.1, "topk": 4}
    narrow = F.neighbour_nll(x.features, x.labels, wide.bank, x.bank_labels, **bank)
    named = F.supcon_out(temperature=0.1, labels=x.labels, features=wide.features)
    pairs = F.soft_pairs(x.bank_labels)._replace(
        weights=torch.tensor([[0.7, 0.3]], dtype=torch.float64).expand(len(x.bank), 2)
    )
    mixed_bank = F.neighbour_nll(x.features, x.labels, x.bank, pairs, **bank)
    assert narrow.value.dtype == torch.float32
    assert mixed_bank.value.dtype == torch.float32
    assert named.value.dtype == torch.float64


@every
def test_the_inputs_stay_as_they_are(name):
    for x in samples(name, torch.float32):
        copy = [value.clone() for value in x]
        differentiated(ALL[name], x, 0.1)
        assert all(torch.equal(value, before) for value, before in zip(x, copy, strict=True))


@every
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_value_is_asked_of_the_device(name, device, dtype):
    """On tensors without values a Python `if`, an .item() or a boolean index raises."""
    real_samples = samples(name, dtype)
    with FakeTensorMode() as mode:
        for real in real_samples:
            x = type(real)(*(mode.from_tensor(value).to(device) for value in real))
            result = ALL[name](x, 0.1, device == "cuda")  # on a CPU only the checks look at values
            assert result.value.device.type == device
            assert result.value.dtype == torch.float32


def test_that_check_would_notice():
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        bool(torch.ones(3).any())
