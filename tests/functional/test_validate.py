"""`validate`: bad values of labels and rows raise and name the row; without it nothing is checked."""

import inspect
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from functional_cases import ALL, CLASSES, HARD, SOFT, differentiated, make, mixed
from torch.nn.functional import one_hot

from nearkin import functional as F

LABELS = [0, 0, 1, 1, 2, 3]
# Functions without labels, and functions that read no unit rows.
UNLABELLED = ("instance_nce", "instance_nce_bank", "consistency_kl")
LOGITS_ONLY = ("symmetric_ce", "cross_entropy", "binary_cross_entropy")
# With a known number of classes.
COUNTED = ("gpaco", "cosface_logits", "arcface_logits", *LOGITS_ONLY)


def with_row(rows, row, value):
    return rows.index_copy(0, torch.tensor([row]), torch.as_tensor(value, dtype=rows.dtype)[None])


def cases():
    """(function, what is replaced, by what, the message)."""
    hard, soft = make(LABELS), make(one_hot(torch.tensor(LABELS), CLASSES).double())
    for name in ALL:
        if name not in UNLABELLED:
            yield name, hard._replace(labels=with_row(hard.labels, 3, -1)), r"labels\[3\] is -1"
        if name in COUNTED:
            over = hard._replace(labels=with_row(hard.labels, 4, CLASSES))
            yield name, over, r"labels\[4\] is 4 but must be in \[0, 4\)"
        if name not in LOGITS_ONLY:
            long = hard._replace(features=with_row(hard.features, 2, 2 * hard.features[2]))
            first = {"instance_nce": "view1", "neighbour_nll": "query", "consistency_kl": "key"}
            row = {"instance_nce_bank": "query"}.get(name, first.get(name, "features"))
            yield name, long, rf"{row}\[2\] has length 2 but must have length 1"
            empty = hard._replace(features=with_row(hard.features, 2, torch.zeros(5)))
            yield name, empty, rf"{row}\[2\] has length 0 "
        if name in SOFT:
            double = soft._replace(labels=with_row(soft.labels, 1, 2 * soft.labels[1]))
            yield name, double, r"labels\[1\] sums to 2 but must sum to 1"
            for value in (-0.5, torch.nan):
                bad = torch.tensor([value, 0.5, 0.5, 0.5])
                yield (
                    name,
                    soft._replace(labels=with_row(soft.labels, 5, bad)),
                    r"labels\[5\] holds",
                )
        if name in ("instance_nce_bank", "neighbour_nll", "gpaco", "consistency_kl"):
            bank = hard._replace(bank=with_row(hard.bank, 7, 3 * hard.bank[7]))
            yield name, bank, r"bank\[7\] has length 3"
        if name in ("neighbour_nll", "gpaco"):
            below = hard._replace(bank_labels=with_row(hard.bank_labels, 7, -2))
            yield name, below, r"bank_labels\[7\] is -2"
            pairs = F.soft_pairs(hard.bank_labels)
            half = pairs._replace(weights=with_row(pairs.weights, 4, [0.5, 0.0]))
            message = r"bank_labels.weights\[4\] sums to 0.5"
            yield name, hard._replace(bank_labels=half), message
            over = with_row(hard.bank_labels, 7, CLASSES)
            yield name, soft._replace(bank_labels=over), r"bank_labels\[7\] is 4"
    second = hard._replace(view2=with_row(hard.view2, 0, 2 * hard.view2[0]))
    yield "instance_nce", second, r"view2\[0\]"
    yield "instance_nce_bank", second, r"key\[0\]"
    shares = hard._replace(bank_probs=with_row(hard.bank_probs, 9, [1.0] * CLASSES))
    yield "consistency_kl", shares, r"bank_probs\[9\] sums to 4"


CASES = list(cases())
every = pytest.mark.parametrize(
    ("name", "sample", "message"), CASES, ids=[f"{name} {message}" for name, _, message in CASES]
)


@every
def test_a_bad_value_is_named_with_its_row(name, sample, message):
    with pytest.raises(ValueError, match=message):
        ALL[name](sample, 0.1)


@every
def test_without_validate_no_value_is_checked(name, sample, message):
    out_of_range = r"bank_labels\[7\] is 4" in message  # which torch's gather refuses
    with pytest.raises(RuntimeError, match="bounds") if out_of_range else nullcontext():
        ALL[name](sample, 0.1, False)


def test_margins_of_given_cosines():
    cosine = torch.tensor([[0.5, -1.0], [0.2, 7.5]])
    for function in (F.cosface_margin, F.arcface_margin):
        options = {"margin": 0.1, "scale": 2.0}
        with pytest.raises(ValueError, match=r"cosine\[1\] reaches 7.5"):
            function(cosine, torch.tensor([0, 1]), **options)
        with pytest.raises(ValueError, match=r"labels\[1\] is 2 "):
            function(cosine.clamp(max=1), torch.tensor([0, 2]), **options)
        function(cosine, torch.tensor([0, 2]), **options, validate=False)


def test_soft_pairs():
    with pytest.raises(ValueError, match=r"labels\[0\] sums to 2"):
        F.soft_pairs(torch.ones(1, 2))
    with pytest.raises(ValueError, match=r"labels\[1\] is -2"):
        F.soft_pairs(torch.tensor([-1, -2]))
    F.soft_pairs(torch.ones(1, 2), validate=False)


def test_a_target_that_is_no_distribution():
    logits = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"target\[1\] sums to 3"):
        F.consistency_kl(logits, torch.tensor([[0.0] * 3, [1.0] * 3]))


def test_every_function_has_the_keyword():
    without = {"PerAnchor", "SoftPairs", "mean_valid", "cosine_logits"}  # any rows are right there
    for name in set(F.__all__) - without:
        assert inspect.signature(getattr(F, name)).parameters["validate"].default is True, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rounding_is_no_error(dtype):
    for seed in range(5):
        for name in ALL:
            ALL[name](make(LABELS, dtype, seed), 0.1)
        smoothed = 0.9 * mixed(LABELS, [1, 2, 3, 4, 5, 0], 0.7) + 0.1 / CLASSES
        for name in SOFT:
            ALL[name](make(smoothed, dtype, seed), 0.1)


def test_empty_slots_of_a_bank_are_allowed():
    x = make(LABELS)
    empty = x.bank_labels < 0
    assert empty.any()
    bare = x._replace(
        bank=x.bank.masked_fill(empty[:, None], 0),
        bank_labels=F.soft_pairs(x.bank_labels)._replace(
            weights=F.soft_pairs(x.bank_labels).weights.masked_fill(empty[:, None], 0)
        ),
        bank_probs=x.bank_probs.masked_fill(empty[:, None], 0),
    )
    for name in ("neighbour_nll", "gpaco", "consistency_kl", "instance_nce_bank"):
        ALL[name](bare, 0.1)


def test_on_a_gpu_the_check_does_not_wait(monkeypatch):
    """One asynchronous assertion of one condition, here on tensors without values."""
    found = []
    monkeypatch.setattr(torch, "_assert_async", lambda good, text: found.append((good.shape, text)))
    with torch._subclasses.fake_tensor.FakeTensorMode() as mode:
        x = make(LABELS)
        x = type(x)(*(mode.from_tensor(value).to("cuda") for value in x))
        F.cross_entropy(x.logits, x.labels)
        F.supcon_out(x.features, x.labels, temperature=0.1)
    assert found == [
        (torch.Size([]), "labels must be in [0, 4)."),
        (torch.Size([]), "labels must be at least 0."),
        (torch.Size([]), "features must be rows of unit length."),
    ]


@pytest.mark.parametrize("name", [*SOFT, *HARD])
def test_torch_func(name):
    """Gradients with the checks, and maps over batches without them."""
    x = make(LABELS)

    def total(features, view2, logits, validate):
        sample = x._replace(features=features, view2=view2, logits=logits)
        return F.mean_valid(ALL[name](sample, 0.1, validate))

    leaves = x.features, x.view2, x.logits
    expected = differentiated(ALL[name], x, 0.1)[1]
    for a, b in zip(torch.func.grad(total, (0, 1, 2))(*leaves, True), expected, strict=True):
        torch.testing.assert_close(a, b)
    mapped = torch.vmap(lambda *rows: total(*rows, False))(*(each[None] for each in leaves))
    torch.testing.assert_close(mapped[0], total(*leaves, True))


COMPILED = """
import torch
from nearkin import functional as F

@torch.compile(backend="aot_eager", fullgraph=True)
def loss(features, labels):
    return F.mean_valid(F.supcon_out(features, labels, temperature=0.1))

rows, labels = torch.eye(4), torch.tensor([0, 0, 1, 1])
print(float(loss(rows, labels) - F.mean_valid(F.supcon_out(rows, labels, temperature=0.1))))
try:
    loss(2 * rows, labels)
except RuntimeError as error:
    print(error)
"""


def test_under_compile():
    """The check is an assertion in the graph. In a process without the type checks, which dynamo cannot trace."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", COMPILED], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    difference, message = done.stdout.splitlines()[:2]
    assert abs(float(difference)) < 1e-6
    assert message == "features must be rows of unit length."
