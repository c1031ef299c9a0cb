"""Every public function on one common sample, so that a property can be asked of all of them."""

from typing import NamedTuple

import torch
from torch.nn.functional import normalize, one_hot

from nearkin import functional as F

CLASSES, DIM, ENTRIES = 4, 5, 12


class Sample(NamedTuple):
    """One batch and one bank. labels: `[N]` or `[N, C]`; the bank's last two slots are empty."""

    features: torch.Tensor
    view2: torch.Tensor
    logits: torch.Tensor
    labels: torch.Tensor
    bank: torch.Tensor
    bank_labels: torch.Tensor | F.SoftPairs
    bank_probs: torch.Tensor
    mask: torch.Tensor
    weight: torch.Tensor


def make(labels, dtype=torch.float64, seed=0):
    """A random sample with these labels, drawn in float64 and then rounded to `dtype`."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.as_tensor(labels)
    count = len(labels)

    def normal(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    bank_labels = torch.randint(CLASSES, (ENTRIES,), generator=draw)
    bank_labels[-2:] = -1
    mask = torch.rand(count, ENTRIES, generator=draw) < 0.8
    mask[:, -2:] = False
    mask[:, 0] = True
    return Sample(
        normalize(normal(count, DIM), dim=1).to(dtype),
        normalize(normal(count, DIM), dim=1).to(dtype),
        (3 * normal(count, CLASSES)).to(dtype),
        labels.to(dtype) if labels.is_floating_point() else labels,
        normalize(normal(ENTRIES, DIM), dim=1).to(dtype),
        bank_labels,
        normal(ENTRIES, CLASSES).softmax(1).to(dtype),
        mask,
        normal(CLASSES, DIM).to(dtype),
    )


def mixed(labels, partners, share):
    """Soft labels of images mixed with the images at `partners`."""
    rows = one_hot(torch.as_tensor(labels), CLASSES).double()
    return share * rows + (1 - share) * rows[torch.as_tensor(partners)]


def _consistency(x, t):
    target = F.neighbour_target(x.features, x.bank, x.bank_probs, temperature=t, mask=x.mask)
    return F.consistency_kl(x.logits, target)


def _opl(x, t):
    value = F.orthogonal_projection(x.features, x.labels, gamma=0.5)
    return F.PerAnchor(value[None], torch.ones(1, dtype=torch.bool, device=value.device))


def _margin(function):
    def run(x, t):
        logits = function(x.features, x.weight, x.labels, margin=0.3, scale=1 / t)
        return F.cross_entropy(logits, x.labels)

    return run


SOFT = {
    "supcon_out": lambda x, t: F.supcon_out(x.features, x.labels, temperature=t),
    "supcon_in": lambda x, t: F.supcon_in(x.features, x.labels, temperature=t),
    "sincere": lambda x, t: F.sincere(x.features, x.labels, temperature=t),
    "schane": lambda x, t: F.schane(x.features, x.labels, temperature=t, hardness=1.0),
    "schane_sum": lambda x, t: F.schane(
        x.features, x.labels, temperature=t, hardness=0.5, positives="sum"
    ),
    "neighbour_nll": lambda x, t: F.neighbour_nll(
        x.features, x.labels, x.bank, x.bank_labels, temperature=t, topk=6, mask=x.mask
    ),
    "gpaco": lambda x, t: F.gpaco(
        x.features,
        x.labels,
        x.logits,
        x.bank,
        x.bank_labels,
        alpha=0.3,
        temperature=t,
        smoothing=0.1,
        mask=x.mask,
    ),
    "orthogonal_projection": _opl,
    "symmetric_ce": lambda x, t: F.symmetric_ce(x.logits, x.labels, alpha=0.7, beta=1.3),
    "cross_entropy": lambda x, t: F.cross_entropy(x.logits, x.labels, smoothing=0.1),
    "binary_cross_entropy": lambda x, t: F.binary_cross_entropy(x.logits, x.labels, smoothing=0.1),
}
HARD = {
    "instance_nce": lambda x, t: F.instance_nce(x.features, x.view2, temperature=t),
    "instance_nce_bank": lambda x, t: F.instance_nce_bank(
        x.features, x.view2, x.bank, temperature=t, mask=x.mask
    ),
    "consistency_kl": _consistency,
    "triplet_batch_hard": lambda x, t: F.triplet_batch_hard(x.features, x.labels, margin=0.3),
    "varcon": lambda x, t: F.varcon(x.features, x.labels, temperature=t, epsilon=0.02),
    "cosface_logits": _margin(F.cosface_logits),
    "arcface_logits": _margin(F.arcface_logits),
}
ALL = SOFT | HARD
# The functions whose value for a sample does not exist without other samples.
PAIRED = ("supcon_out", "supcon_in", "sincere", "schane", "schane_sum", "triplet_batch_hard")


def differentiated(run, sample, temperature):
    """The result, and the gradients of its mean for features, second view and logits."""
    leaves = {
        name: getattr(sample, name).detach().clone().requires_grad_()
        for name in ("features", "view2", "logits")
    }
    result = run(sample._replace(**leaves), temperature)
    total = F.mean_valid(result)
    gradients = torch.autograd.grad(
        total, list(leaves.values()), allow_unused=True, materialize_grads=True
    )
    return result, gradients
