"""CoNe's two terms and the update of its bank, in units of one product queries @ bank.T."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import kl_div, normalize

from benchmarks.bench import Call, Row, Table, alternate, extra_memory, ratio
from nearkin import functional as F
from nearkin.bank import NeighbourBank
from nearkin.functional._bank_attention import bank_attention, multiplies_bf16
from nearkin.process import keep_freed_memory

ENTRIES, CLASSES, DIM, BATCH, TOPK = 65_536, 1000, 256, 64, 512
# Products in one run of the unit, so that it takes as long as the loss: on a busy machine short runs are disturbed less
# often than long ones.
PRODUCTS = 2
LONGEST = 20  # times the usual number of rounds, until the minima of all calls are stable


class Given(NamedTuple):
    """The outputs of the network for a batch."""

    query: Tensor
    key: Tensor
    logits: Tensor
    labels: Tensor
    ids: Tensor
    probabilities: Tensor


def given() -> Given:
    draw = torch.Generator().manual_seed(0)
    query = normalize(torch.randn(BATCH, DIM, generator=draw), dim=1)
    key = normalize(query + 0.1 * torch.randn(BATCH, DIM, generator=draw), dim=1)
    logits = torch.randn(BATCH, CLASSES, generator=draw)
    labels = torch.randint(CLASSES, (BATCH,), generator=draw)
    return Given(query, key, logits, labels, torch.arange(BATCH), logits.softmax(1))


def filled(storage: torch.dtype) -> NeighbourBank:
    draw = torch.Generator().manual_seed(1)
    bank = NeighbourBank(ENTRIES, DIM, CLASSES, storage)
    few = 256  # at a time: making the entries must not take more memory than using them
    for start in range(0, ENTRIES, few):
        labels = torch.randint(CLASSES, (few,), generator=draw)
        keys = normalize(torch.randn(few, DIM, generator=draw), dim=1)
        probabilities = torch.rand(few, CLASSES, generator=draw).softmax(1)
        bank.write(keys, labels, probabilities, BATCH + start + torch.arange(few))
    return bank


def ours(bank: NeighbourBank, x: Given) -> None:
    query, logits = x.query.clone().requires_grad_(), x.logits.clone().requires_grad_()
    near, target = bank_attention(
        query,
        x.key,
        x.labels,
        x.ids,
        bank.memory,
        query_temperature=0.10,
        key_temperature=0.07,
        topk=TOPK,
    )
    total = 0.7 * F.mean_valid(near) + 0.4 * F.mean_valid(F.consistency_kl(logits, target))
    torch.autograd.backward(total)
    bank.write(x.key, x.labels, x.probabilities, x.ids)


def plain(bank: NeighbourBank, x: Given) -> None:
    """The same loss from the two public functions."""
    query, logits = x.query.clone().requires_grad_(), x.logits.clone().requires_grad_()
    mask = bank.usable(x.ids)
    near = F.neighbour_nll(
        query,
        x.labels,
        bank.keys,
        bank.pairs,
        temperature=0.10,
        topk=TOPK,
        mask=mask,
        validate=False,
    )
    probabilities = bank.probabilities.T
    target = F.neighbour_target(
        x.key, bank.keys, probabilities, temperature=0.07, mask=mask, validate=False
    )
    consistency = F.consistency_kl(logits, target, validate=False)
    torch.autograd.backward(0.7 * F.mean_valid(near) + 0.4 * F.mean_valid(consistency))
    bank.write(x.key, x.labels, x.probabilities, x.ids)


class Published(NamedTuple):
    """The published structure from its description: float32 queues [d, K] and [K, C], cloned on every step."""

    keys: Tensor
    labels: Tensor
    probabilities: Tensor

    def step(self, x: Given) -> None:
        query, logits = x.query.clone().requires_grad_(), x.logits.clone().requires_grad_()
        similarity = query @ self.keys.clone().detach()
        values, index = similarity.topk(TOPK, dim=1)
        attention = (values / 0.10).softmax(1)
        mass = torch.zeros_like(logits).scatter_add(1, self.labels[index], attention)
        own = mass.gather(1, x.labels[:, None]).squeeze(1)
        neighbour = -own[own > 1e-8].log().sum() / BATCH
        with torch.no_grad():
            weights = (x.key @ self.keys.clone() / 0.07).softmax(1)
            target = weights @ self.probabilities.clone()
        consistency = kl_div(logits.log_softmax(1), target, reduction="batchmean")
        torch.autograd.backward(0.7 * neighbour + 0.4 * consistency)
        self.keys[:, :BATCH], self.labels[:BATCH] = x.key.T, x.labels
        self.probabilities[:BATCH] = x.probabilities


def published() -> Published:
    bank = filled(torch.float32)
    return Published(
        bank.keys.T.contiguous(), bank.labels[:, 0].clone(), bank.probabilities.T.contiguous()
    )


def _prepared(storage: torch.dtype) -> Callable[[], Call]:
    return lambda: partial(ours, filled(storage), given())


PEAK: dict[str, Callable[[], Call]] = {
    "bf16": _prepared(torch.bfloat16),
    "exact": _prepared(torch.float32),
}


def table() -> Table:
    keep_freed_memory()  # as every run does, and good for the peers as well
    x, half, exact, peer = given(), filled(torch.bfloat16), filled(torch.float32), published()
    keys = exact.keys.clone()
    calls: dict[str, Call] = {
        "product": lambda: [x.query @ keys.T for _ in range(PRODUCTS)],
        "bf16": partial(ours, half, x),
        "exact": partial(ours, exact, x),
        "plain": partial(plain, exact, x),
        "published": partial(peer.step, x),
    }
    seconds = alternate(calls, most=LONGEST)
    seconds["product"] = [run / PRODUCTS for run in seconds["product"]]
    size = sum(b.numel() * b.element_size() for b in half.buffers()) / 2**20
    fast = multiplies_bf16(x.query.device)
    # Without bf16 products the default is exact.
    how, target, limit = ("bf16", 2.2, 1.8) if fast else ("fp32", None, None)
    rows = [
        ratio(
            seconds, "bf16", "product", f"stored in bf16, multiplied in {how}", target, limit=limit
        ),
        ratio(seconds, "exact", "product", "exact fp32", 5.5, limit=4.8),
        ratio(seconds, "plain", "product", "neighbour_nll + neighbour_target, exact"),
        ratio(
            seconds,
            "published",
            "product",
            "published structure (clones, [B, K] topk, dense reads)",
        ),
        Row("the bank in bf16", size, None, 160, False, "MiB"),
        extra_memory("bank", "bf16", "stored in bf16, memory beyond the bank", 100),
        extra_memory("bank", "exact", "exact, memory beyond the bank", 100),
    ]
    if not fast:
        rows.append(Row("multiplied in bf16: no avx512_bf16 or AMX here", float("nan")))
    setting = (
        f"K = {ENTRIES}, C = {CLASSES}, d = {DIM}, B = {BATCH}, top {TOPK}, {torch.get_num_threads()} threads; "
        "product = queries @ bank.T, two in a run; both terms, forward + backward, and the bank's update"
    )
    return Table("CoNe's bank", setting, rows)
