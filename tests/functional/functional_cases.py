"""Every public function on one common sample, so that a property can be tested on all of them."""

import math
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


def _consistency(x, t, v=True):
    options = {"temperature": t, "mask": x.mask, "validate": v}
    target = F.neighbour_target(x.features, x.bank, x.bank_probs, **options)
    return F.consistency_kl(x.logits, target, validate=v)


def _opl(x, t, v=True):
    value = F.orthogonal_projection(x.features, x.labels, gamma=0.5, validate=v)
    return F.PerAnchor(value[None], torch.ones(1, dtype=torch.bool, device=value.device))


def _margin(function):
    def run(x, t, v=True):
        options = {"margin": 0.3, "scale": 1 / t, "validate": v}
        logits = function(x.features, x.weight, x.labels, **options)
        return F.cross_entropy(logits, x.labels, validate=v)

    return run


def _sigsup(normalise):
    def run(x, t, v=True):
        scale_bias = {"log_scale": -math.log(t), "bias": -0.5 / t}
        return F.sigsup(x.features, x.labels, **scale_bias, normalise=normalise, validate=v)

    return run


SOFT = {
    "supcon_out": lambda x, t, v=True: F.supcon_out(
        x.features, x.labels, temperature=t, validate=v
    ),
    "supcon_in": lambda x, t, v=True: F.supcon_in(x.features, x.labels, temperature=t, validate=v),
    "sincere": lambda x, t, v=True: F.sincere(x.features, x.labels, temperature=t, validate=v),
    "schane": lambda x, t, v=True: F.schane(
        x.features, x.labels, temperature=t, hardness=1.0, validate=v
    ),
    "schane_sum": lambda x, t, v=True: F.schane(
        x.features, x.labels, temperature=t, hardness=0.5, positives="sum", validate=v
    ),
    "sigsup": _sigsup("positives"),
    "sigsup_sum": _sigsup("none"),
    "neighbour_nll": lambda x, t, v=True: F.neighbour_nll(
        x.features, x.labels, x.bank, x.bank_labels, temperature=t, topk=6, mask=x.mask, validate=v
    ),
    "gpaco": lambda x, t, v=True: F.gpaco(
        x.features,
        x.labels,
        x.logits,
        x.bank,
        x.bank_labels,
        alpha=0.3,
        temperature=t,
        smoothing=0.1,
        mask=x.mask,
        validate=v,
    ),
    "orthogonal_projection": _opl,
    "symmetric_ce": lambda x, t, v=True: F.symmetric_ce(
        x.logits, x.labels, alpha=0.7, beta=1.3, validate=v
    ),
    "cross_entropy": lambda x, t, v=True: F.cross_entropy(
        x.logits, x.labels, smoothing=0.1, validate=v
    ),
    "binary_cross_entropy": lambda x, t, v=True: F.binary_cross_entropy(
        x.logits, x.labels, smoothing=0.1, validate=v
    ),
}
HARD = {
    "instance_nce": lambda x, t, v=True: F.instance_nce(
        x.features, x.view2, temperature=t, validate=v
    ),
    "instance_nce_bank": lambda x, t, v=True: F.instance_nce_bank(
        x.features, x.view2, x.bank, temperature=t, mask=x.mask, validate=v
    ),
    "consistency_kl": _consistency,
    "triplet_batch_hard": lambda x, t, v=True: F.triplet_batch_hard(
        x.features, x.labels, margin=0.3, validate=v
    ),
    "varcon": lambda x, t, v=True: F.varcon(
        x.features, x.labels, temperature=t, epsilon=0.02, validate=v
    ),
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
