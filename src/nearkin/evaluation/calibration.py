"""Temperature scaling: one number that makes the probabilities of a model fit how often it is right."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import softplus

LEAST = 1e-30  # probabilities below it are taken as it: their logarithm is finite in float32
RANGE = (0.05, 20.0)  # of temperatures


def scaled(probabilities: Tensor, temperature: float) -> Tensor:
    """softmax(ln p / T), `[N, C]`: for p = softmax(logits) the same as softmax(logits / T). T > 0."""
    return (probabilities.clamp(min=LEAST).log() / temperature).softmax(1)


def fit_temperature(probabilities: Tensor, labels: Tensor) -> float:
    """The T in [0.05, 20] with the lowest -sum_i ln scaled(p, T)[i, label_i] (Guo et al. 2017, arXiv 1706.04599).

    probabilities `[N, C]`, labels `[N]`, of N > 0 images that the model was not trained on. Without a wrong image the
    sum falls for ever towards T = 0, which no number of images can justify; so one more image counts, whose two most
    probable classes are as far apart as in the mean, and whose label is the second (as in Laplace's rule of
    succession). Brent's method finds log T to 1e-4.
    """
    from scipy.optimize import minimize_scalar

    logs = probabilities.clamp(min=LEAST).log().double()
    own = logs.gather(1, labels[:, None])[:, 0]
    first, second = logs.topk(2, dim=1).values.mean(0)

    def loss(log_temperature: float) -> float:
        inverse = math.exp(-log_temperature)
        nll = torch.logsumexp(logs * inverse, 1) - own * inverse
        return float(nll.sum() + softplus((first - second) * inverse))

    low, high = (math.log(end) for end in RANGE)
    found = minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-4})
    return math.exp(float(found.x))
