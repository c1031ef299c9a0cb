"""What `nearkin.functional` must return, written from the equations as plain loops in float64.

Nothing here is vectorised, in log space or shared with the package. Every function takes NumPy
arrays and returns the value and the validity of each anchor, unless said otherwise.
"""

import math

import numpy as np


def overlap(labels, i, others, j):
    """sum_c y_ic y_jc. Labels: integers, rows over classes, or (classes, weights); -1 is none."""
    mine, yours = shares(labels, i), shares(others, j)
    return sum(mine[c] * yours.get(c, 0.0) for c in mine)


def shares(labels, i):
    """{class: weight} of entry i."""
    if isinstance(labels, tuple):
        result = {}
        for c, weight in zip(labels[0][i], labels[1][i], strict=True):
            if c >= 0:
                result[int(c)] = result.get(int(c), 0.0) + float(weight)
        return result
    if labels.ndim == 1:
        return {int(labels[i]): 1.0} if labels[i] >= 0 else {}
    return {c: float(weight) for c, weight in enumerate(labels[i])}


def per_anchor(count, function):
    """Calls function(i) for each anchor: a value, or None for an invalid anchor."""
    results = [function(i) for i in range(count)]
    value = np.array([0.0 if r is None else r for r in results])
    return value, np.array([r is not None for r in results])


def softmax(scores):
    weights = [math.exp(s - max(scores)) for s in scores]
    return [w / sum(weights) for w in weights]


def one_hot(labels, i, classes):
    if labels.ndim == 2:
        return labels[i]
    return np.array([1.0 if c == labels[i] else 0.0 for c in range(classes)])


class Anchor:
    """The other samples as one anchor sees them: e^s, positiveness a and negativeness b = 1 - a."""

    def __init__(self, z, labels, i, temperature):
        self.others = [j for j in range(len(z)) if j != i]
        self.s = {j: float(z[i] @ z[j]) / temperature for j in self.others}
        self.e = {j: math.exp(self.s[j]) for j in self.others}
        self.a = {j: overlap(labels, i, labels, j) for j in self.others}
        self.b = {j: 1.0 - self.a[j] for j in self.others}
        self.positives = sum(self.a.values())
        self.negatives = sum(self.b.values())


def supcon_out(z, labels, temperature):
    def value(i):
        at = Anchor(z, labels, i, temperature)
        if at.positives == 0:
            return None
        everything = sum(at.e.values())
        terms = [at.a[p] * -math.log(at.e[p] / everything) for p in at.others]
        return sum(terms) / at.positives

    return per_anchor(len(z), value)


def supcon_in(z, labels, temperature):
    def value(i):
        at = Anchor(z, labels, i, temperature)
        if at.positives == 0:
            return None
        mean = sum(at.a[p] * at.e[p] for p in at.others) / at.positives
        return -math.log(mean / sum(at.e.values()))

    return per_anchor(len(z), value)


def instance_nce(view1, view2, temperature):
    z, images = np.concatenate([view1, view2]), len(view1)

    def value(i):
        twin = (i + images) % (2 * images)
        e = {j: math.exp(float(z[i] @ z[j]) / temperature) for j in range(len(z)) if j != i}
        return -math.log(e[twin] / sum(e.values()))

    return per_anchor(len(z), value)


def instance_nce_bank(query, key, bank, temperature, mask):
    def value(i):
        own = math.exp(float(query[i] @ key[i]) / temperature)
        others = [
            math.exp(float(query[i] @ bank[j]) / temperature)
            for j in range(len(bank))
            if mask[i, j]
        ]
        return -math.log(own / (own + sum(others)))

    return per_anchor(len(query), value)


def sincere(z, labels, temperature):
    def value(i):
        at = Anchor(z, labels, i, temperature)
        if at.positives == 0:
            return None
        repelled = sum(at.b[n] * at.e[n] for n in at.others)
        terms = [at.a[p] * -math.log(at.e[p] / (at.e[p] + repelled)) for p in at.others]
        return sum(terms) / at.positives

    return per_anchor(len(z), value)


def schane(z, labels, temperature, hardness, positives="mean"):
    def value(i):
        at = Anchor(z, labels, i, temperature)
        if at.positives == 0:
            return None
        if at.negatives == 0:
            return 0.0
        attracted = sum(at.a[p] * at.e[p] for p in at.others)
        if positives == "mean":
            attracted /= at.positives
        hard = {n: math.exp(hardness * at.s[n]) for n in at.others}
        mean_hard = sum(at.b[n] * hard[n] for n in at.others) / at.negatives
        repelled = sum(at.b[n] * hard[n] / mean_hard * at.e[n] for n in at.others)
        return -math.log(attracted / (attracted + repelled))

    return per_anchor(len(z), value)


def sigsup(z, labels, log_scale, bias, normalise="positives"):
    def value(i):
        others = [j for j in range(len(z)) if j != i]
        if not others:
            return None
        total = positives = 0.0
        for j in others:
            score = math.exp(log_scale) * float(z[i] @ z[j]) + bias
            same = overlap(labels, i, labels, j)
            total -= same * math.log(1 / (1 + math.exp(-score)))
            total -= (1 - same) * math.log(1 / (1 + math.exp(score)))
            positives += same
        return total / max(1.0, positives) if normalise == "positives" else total

    return per_anchor(len(z), value)


def orthogonal_projection(z, labels, gamma):
    """One number."""
    pairs = [(i, j) for i in range(len(z)) for j in range(len(z)) if i != j]
    a = {(i, j): overlap(labels, i, labels, j) for i, j in pairs}
    cosine = {(i, j): float(z[i] @ z[j]) for i, j in pairs}
    attraction = sum(a[p] * cosine[p] for p in pairs) / (sum(a.values()) + 1e-6)
    repulsion = sum((1 - a[p]) * cosine[p] for p in pairs)
    repulsion /= sum(1 - a[p] for p in pairs) + 1e-6
    return 1 - attraction + gamma * repulsion


def triplet_batch_hard(z, labels, margin):
    def value(i):
        distance = {j: math.dist(z[i], z[j]) for j in range(len(z)) if j != i}
        positives = [distance[j] for j in distance if labels[j] == labels[i]]
        negatives = [distance[j] for j in distance if labels[j] != labels[i]]
        if not positives or not negatives:
            return None
        return max(0.0, max(positives) - min(negatives) + margin)

    return per_anchor(len(z), value)


def usable(mask, i, j):
    if mask is None:
        return True
    return bool(mask[j] if mask.ndim == 1 else mask[i, j])


def neighbour_nll(query, labels, bank, bank_labels, temperature, topk, mask=None):
    def value(i):
        entries = [j for j in range(len(bank)) if usable(mask, i, j)]
        if not entries:
            return None
        entries.sort(key=lambda j: -float(query[i] @ bank[j]))
        nearest = entries[:topk]
        attention = softmax([float(query[i] @ bank[j]) / temperature for j in nearest])
        pairs = zip(attention, nearest, strict=True)
        mass = sum(w * overlap(labels, i, bank_labels, j) for w, j in pairs)
        return -math.log(mass) if mass > 1e-8 else 0.0

    return per_anchor(len(query), value)


def neighbour_target(key, bank, probabilities, temperature, mask=None):
    """One row over the classes per sample."""
    target = np.zeros((len(key), probabilities.shape[1]))
    for i in range(len(key)):
        entries = [j for j in range(len(bank)) if usable(mask, i, j)]
        if entries:
            attention = softmax([float(key[i] @ bank[j]) / temperature for j in entries])
            for w, j in zip(attention, entries, strict=True):
                target[i] += w * probabilities[j]
    return target


def consistency_kl(logits, target):
    def value(i):
        p = softmax(list(logits[i]))
        return sum(d * math.log(d / q) for d, q in zip(target[i], p, strict=True) if d > 0)

    return per_anchor(len(logits), value)


def cross_entropy(logits, labels, smoothing=0.0, class_weights=None):
    classes = logits.shape[1]

    def value(i):
        p, y, total = softmax(list(logits[i])), one_hot(labels, i, classes), 0.0
        for c in range(classes):
            weight = 1.0 if class_weights is None else class_weights[c]
            total -= weight * ((1 - smoothing) * y[c] + smoothing / classes) * math.log(p[c])
        return total

    return per_anchor(len(logits), value)


def binary_cross_entropy(logits, labels, smoothing=0.0, class_weights=None):
    classes = logits.shape[1]

    def value(i):
        y, total = one_hot(labels, i, classes), 0.0
        for c in range(classes):
            weight = 1.0 if class_weights is None else class_weights[c]
            target = (1 - smoothing) * y[c] + smoothing / classes
            p = 1 / (1 + math.exp(-float(logits[i, c])))
            total -= weight * (target * math.log(p) + (1 - target) * math.log(1 - p))
        return total / classes

    return per_anchor(len(logits), value)


def symmetric_ce(logits, labels, alpha, beta):
    """Both parts are linear in the label, so a soft label is the weighted sum over hard ones."""
    classes = logits.shape[1]

    def of_class(p, y):
        log_label = [math.log(max(1.0 if c == y else 0.0, 1e-4)) for c in range(classes)]
        reverse = -sum(min(max(p[c], 1e-7), 1.0) * log_label[c] for c in range(classes))
        return -alpha * math.log(p[y]) + beta * reverse

    def value(i):
        p, y = softmax(list(logits[i])), one_hot(labels, i, classes)
        return sum(y[c] * of_class(p, c) for c in range(classes) if y[c] > 0)

    return per_anchor(len(logits), value)


def cosines(z, weight):
    return [[float(row @ w) / math.hypot(*w) for w in weight] for row in z]


def cosface_logits(z, weight, labels, margin, scale):
    """The logits."""
    logits = np.array(cosines(z, weight))
    for i, y in enumerate(labels):
        logits[i, y] -= margin
    return scale * logits


def arcface_logits(z, weight, labels, margin, scale):
    """The logits."""
    logits = np.array(cosines(z, weight))
    for i, y in enumerate(labels):
        logits[i, y] = math.cos(math.acos(logits[i, y]) + margin)
    return scale * logits


def gpaco(z, labels, logits, bank, bank_labels, alpha, temperature, smoothing, mask=None):
    classes = logits.shape[1]

    def value(i):
        y = one_hot(labels, i, classes)
        spread = smoothing / (classes - 1)
        weights = [(1 - smoothing) * y[c] + spread * (1 - y[c]) for c in range(classes)]
        scores = list(logits[i])
        for j in range(len(z)):
            if j != i:
                scores.append(float(z[i] @ z[j]) / temperature)
                weights.append(alpha * overlap(labels, i, labels, j))
        for k in range(len(bank)):
            if usable(mask, i, k):
                scores.append(float(z[i] @ bank[k]) / temperature)
                weights.append(alpha * overlap(labels, i, bank_labels, k))
        p = softmax(scores)
        return -sum(w * math.log(q) for w, q in zip(weights, p, strict=True)) / sum(weights)

    return per_anchor(len(z), value)


def varcon(z, labels, temperature, epsilon):
    present = sorted(set(labels.tolist()))
    centres = {}
    for c in present:
        mean = sum(z[j] for j in range(len(z)) if labels[j] == c) / sum(labels == c)
        centres[c] = mean / math.hypot(*mean)

    def value(i):
        p = softmax([float(z[i] @ centres[c]) / temperature for c in present])
        own = present.index(labels[i])
        sharp = max(temperature - epsilon + 2 * epsilon * p[own], 1e-6)
        q = softmax([1 / sharp if c == labels[i] else 0.0 for c in present])
        divergence = sum(b * math.log(b / a) for a, b in zip(p, q, strict=True) if b > 0)
        return divergence - math.log(p[own])

    return per_anchor(len(z), value)
