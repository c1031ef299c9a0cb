"""NeighbourBank: first in, first out, whatever the sizes; one's own copies masked; exact across a checkpoint."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load, save

from nearkin.bank import EMPTY, NeighbourBank
from nearkin.objectives import CoNe
from nearkin.types import Facts


def rows(first, count, dim=4, classes=3):
    """Entries that can be recognised: entry i has key i, class i % classes, id i."""
    number = torch.arange(first, first + count)
    keys = number[:, None].float().expand(-1, dim)
    probabilities = torch.full((count, classes), 1.0) * number[:, None]
    return keys, number % classes, probabilities, number


class Reference:
    """The same memory as a plain Python list."""

    def __init__(self, size):
        self.slots, self.pointer = [None] * size, 0

    def write(self, numbers):
        for number in list(numbers)[-len(self.slots) :]:
            self.slots[self.pointer] = number
            self.pointer = (self.pointer + 1) % len(self.slots)


@pytest.mark.parametrize("size", [1, 3, 7, 8, 20])
@pytest.mark.parametrize("batches", [[3, 3, 3], [1], [8, 8], [5, 30, 2], [7] * 9])
def test_any_batch_into_any_size(size, batches):
    bank, reference, first = NeighbourBank(size, 4, 3), Reference(size), 0
    for count in batches:
        bank.write(*rows(first, count))
        reference.write(range(first, first + count))
        first += count
    for slot, number in enumerate(reference.slots):
        if number is None:
            assert bank.labels[slot].tolist() == [EMPTY, EMPTY]
        else:
            assert bank.keys[slot].tolist() == [number] * 4
            assert bank.labels[slot, 0] == number % 3
            assert bank.ids[slot].tolist() == [number, EMPTY]
            assert bank.probabilities[:, slot].tolist() == [number] * 3
            assert bank.weights[slot].tolist() == [1.0, 0.0]
    assert bank.filled == sum(slot is not None for slot in reference.slots)


def test_empty_slots_and_own_copies_are_not_usable():
    bank = NeighbourBank(6, 4, 3)
    bank.write(*rows(0, 4))
    usable = bank.usable(torch.tensor([2, 9]))
    assert usable.tolist() == [
        [True, True, False, True, False, False],
        [True, True, True, True, False, False],
    ]


def test_mixed_images_keep_both_labels_and_any_shared_id_is_an_own_copy():
    bank = NeighbourBank(3, 4, 3)
    soft = torch.tensor([[0.7, 0.3, 0.0], [0.0, 0.0, 1.0]])
    keys, _, probabilities, _ = rows(0, 2)
    bank.write(keys, soft, probabilities, torch.tensor([[5, 8], [6, 9]]))
    assert bank.labels[0].tolist() == [0, 1]
    assert torch.allclose(bank.weights[0], torch.tensor([0.7, 0.3]))
    assert bank.weights[1].tolist() == [1.0, 0.0]
    assert bank.usable(torch.tensor([[8, 1], [1, 2]])).tolist() == [
        [False, True, False],
        [True, True, False],
    ]
    # An id of -1 means "none": two entries without a partner share nothing.
    assert bank.usable(torch.tensor([7])).tolist() == [[True, True, False]]


def test_a_checkpoint_restores_everything(tmp_path):
    bank = NeighbourBank(5, 4, 3)
    bank.write(*rows(0, 7))
    other = NeighbourBank(5, 4, 3)
    other.load_state_dict(load(save({k: v.contiguous() for k, v in bank.state_dict().items()})))
    for again in (bank, other):
        again.write(*rows(7, 3))
    for name, value in bank.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    assert set(bank.state_dict()) == {n for n, _ in bank.named_buffers()}


def test_nothing_keeps_the_graph():
    bank = NeighbourBank(4, 4, 3)
    keys, labels, probabilities, ids = rows(0, 2)
    bank.write(keys.requires_grad_(), labels, probabilities.requires_grad_(), ids)
    assert not any(value.requires_grad for value in bank.buffers())


def test_half_precision_stays_half_but_in_float64():
    """A run's precision says nothing about its memory's; a comparison in float64 wants all of it."""
    bank = NeighbourBank(5, 4, 3, torch.bfloat16)
    assert bank.to(torch.float32).keys.dtype == torch.bfloat16
    assert bank.half().probabilities.dtype == torch.bfloat16
    assert bank.weights.dtype == torch.float16
    assert bank.double().keys.dtype == torch.float64
    assert NeighbourBank(5, 4, 3).half().keys.dtype == torch.float32


def test_half_the_bytes():
    size, dim, classes = 65_536, 256, 1000
    with torch.device("meta"):
        bank = NeighbourBank(size, dim, classes, torch.bfloat16)
    large = sum(b.numel() * b.element_size() for b in (bank.keys, bank.probabilities))
    assert large == size * (dim + classes) * 2
    assert sum(b.numel() * b.element_size() for b in bank.buffers()) <= 160 * 2**20


def bank_precision(device):
    facts = Facts(dim=8, classes=3, images=100, batch_size=10, device=device)
    return CoNe.Config().resolve(facts).bank_precision


@pytest.mark.parametrize("native", [True, False])
def test_the_precision_that_auto_means_on_a_cpu(native, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert bank_precision("cpu") == ("bf16" if native else "exact")


@pytest.mark.parametrize(("capability", "precision"), [((7, 5), "exact"), ((8, 0), "bf16")])
def test_the_precision_that_auto_means_on_a_gpu(capability, precision, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert bank_precision("cuda") == precision
    assert bank_precision("mps") == "exact"


def test_smaller_integers_are_stored_and_probabilities_are_not_forgotten():
    bank = NeighbourBank(4, 4, 3)
    keys, labels, probabilities, ids = rows(0, 3)
    bank.write(keys, labels.int(), probabilities, ids.int())
    assert bank.labels[:3, 0].tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="keeps class probabilities"):
        bank.write(keys, labels, None, ids)
