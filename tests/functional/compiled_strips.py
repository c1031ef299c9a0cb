"""What a GPU would take: strips by torch's compiler, beside matrices. Prints errors, graphs and breaks."""

import json

import torch
from torch._dynamo.utils import counters
from torch.nn.functional import normalize, one_hot

from nearkin import functional as F
from nearkin.functional import pairs, strips

SAMPLES = 70  # two strips of 32 and a smaller one
LOSSES = {
    "supcon_out": lambda z, y: F.supcon_out(z, y, temperature=0.01),
    "schane": lambda z, y: F.schane(z, 0.9 * one_hot(y, 5) + 0.02, temperature=0.1, hardness=0.7),
    "sincere": lambda z, y: F.sincere(z, y, temperature=0.1),
}


def differentiated(loss, z, labels):
    z = z.clone().requires_grad_()
    value = F.mean_valid(loss(z, labels))
    return value.detach(), *torch.autograd.grad(value, z)


def main():
    draw = torch.Generator().manual_seed(0)
    z = normalize(torch.randn(SAMPLES, 6, generator=draw, dtype=torch.float64), dim=1)
    labels = torch.randint(5, (SAMPLES,), generator=draw)
    expected = {name: differentiated(loss, z, labels) for name, loss in LOSSES.items()}
    strips.HEIGHT = 32
    strips.has_triton = pairs.on_gpu = lambda *_: True
    pairs.LARGE_ON_GPU = 0
    found = {}
    for name, loss in LOSSES.items():
        torch.compiler.reset()
        results = zip(differentiated(loss, z, labels), expected[name], strict=True)
        errors = [float((a - b).norm() / b.norm()) for a, b in results]
        graphs = counters["stats"]["unique_graphs"]
        found[name] = errors, graphs, len(counters["graph_break"])
        counters.clear()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
