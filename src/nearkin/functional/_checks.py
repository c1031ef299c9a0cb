"""Checks of arguments: shapes and settings always, the values of tensors where `validate` asks for it.

A check of values raises ValueError at once, naming the row. On a GPU and while torch.compile traces, it is an
asynchronous assertion instead, which does not synchronise and does not name the row.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

TOLERANCE = 0.01  # of lengths and sums: rounding to bf16 changes them by at most 0.4 %


def check_positive(name: str, value: float | int) -> None:
    """Raise ValueError unless `value` is a finite number above 0."""
    _check_number(name, value)
    if not 0 < value < math.inf:
        raise ValueError(f"{name} is {value} but must be above 0 and finite.")


def check_amount(name: str, value: float) -> None:
    """Raise ValueError unless `value` is a finite number, 0 or above."""
    _check_number(name, value)
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} is {value} but must be 0 or above and finite.")


def _check_number(name: str, value: object) -> None:
    """A tensor would be taken for a constant, and what it learns from would be wrong."""
    if isinstance(value, Tensor):
        raise ValueError(f"{name} is a tensor, and has no gradient here; give a number.")


def check_rows(name: str, rows: Tensor, count: int) -> None:
    """Raise ValueError unless `rows` has `count` rows: broadcasting would hide the mistake."""
    if rows.shape[:1] != (count,):
        raise ValueError(f"{name} has shape {tuple(rows.shape)} but must have {count} rows.")


def check_same_shape(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raise ValueError unless the two tensors have the same shape."""
    if tensor.shape != other.shape:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)} but {other_name} has {tuple(other.shape)}."
        )


def check_labels(
    labels: Tensor, count: int, *, classes: int | None = None, hard: bool = False, validate: bool
) -> None:
    """Raise ValueError unless labels are `[count]` integers or, if not hard, `[count, C]` floating rows.

    validate: also unless integers are in [0, classes) (not negative if classes is None), and rows are shares of 1.
    """
    check_rows("labels", labels, count)
    soft = labels.ndim == 2 and labels.is_floating_point() and not hard
    if not soft and (labels.ndim != 1 or labels.is_floating_point() or labels.is_complex()):
        wanted = "[N] integers or [N, C] floating rows that sum to 1"
        if hard:
            wanted = "[N] integers here: for mixed labels, weigh the values of the two labels"
        raise ValueError(
            f"labels are {labels.dtype} of shape {tuple(labels.shape)} but must be {wanted}."
        )
    if soft and classes not in (None, labels.shape[1]):
        raise ValueError(f"labels have {labels.shape[1]} columns but there are {classes} classes.")
    if validate:
        check_shares("labels", labels) if soft else check_classes("labels", labels, classes)


def check_classes(name: str, labels: Tensor, classes: int | None, least: int = 0) -> None:
    """Raise ValueError unless all integers are at least `least` and below `classes`."""
    bad = labels < least
    if classes is not None:
        bad = bad | (labels >= classes)
    allowed = f"at least {least}" if classes is None else f"in [{least}, {classes})"
    rows = bad.flatten(1) if bad.ndim > 1 else bad[:, None]

    def message(row: int) -> str:
        value = labels.view(len(labels), -1)[row][rows[row]][0]
        return f"{name}[{row}] is {value} but must be {allowed}."

    _require(~rows.any(1), message, f"{name} must be {allowed}.")


def check_shares(name: str, rows: Tensor, *, zeros: bool = False) -> None:
    """Raise ValueError unless all rows are finite, not negative and sum to 1; zeros: rows of zeros may be there."""
    total = rows.sum(1)
    good = ((total - 1).abs() <= TOLERANCE) | ((total == 0) & zeros)
    good = good & (rows >= 0).all(1)  # NaN is not
    expected = "rows of finite numbers >= 0 that sum to 1"

    def message(row: int) -> str:
        if bool((rows[row] >= 0).all()):
            return f"{name}[{row}] sums to {total[row]:.4g} but must sum to 1."
        value = rows[row][~(rows[row] >= 0)][0]
        return f"{name}[{row}] holds {value:.4g} but must hold {expected[8:]}."

    _require(good, message, f"{name} must be {expected}.")


def check_unit(validate: bool, *, zeros: bool = False, **named: Tensor) -> None:
    """Raise ValueError for anything but rows and, if `validate`, unless all have unit length; zeros: or are 0, as empty
    slots of a bank."""
    for name, rows in named.items():
        if rows.ndim != 2:
            raise ValueError(f"{name} has shape {tuple(rows.shape)} but must be rows [N, d].")
    for name, rows in named.items() if validate else ():
        length = torch.linalg.vector_norm(rows.detach(), dim=1)
        good = ((length - 1).abs() <= TOLERANCE) | ((length == 0) & zeros)

        def message(row: int, name: str = name, length: Tensor = length) -> str:
            found = f"{name}[{row}] has length {length[row]:.4g} but must have length 1"
            return f"{found}; torch.nn.functional.normalize gives such rows."

        _require(good, message, f"{name} must be rows of unit length.")


def check_cosines(cosine: Tensor) -> None:
    """Raise ValueError unless all numbers are in [-1, 1]."""
    largest = cosine.detach().abs().amax(1)

    def message(row: int) -> str:
        return f"cosine[{row}] reaches {largest[row]:.4g} but must be in [-1, 1]."

    _require(largest <= 1 + TOLERANCE, message, "cosine must be in [-1, 1].")


def _require(good: Tensor, message: Callable[[int], str], general: str) -> None:
    """Raise ValueError(message(row)) for the first row that is not good, or assert it asynchronously."""
    if good.is_cuda or torch.compiler.is_compiling():
        torch._assert_async(good.all(), general)
    elif not bool(good.all()):
        raise ValueError(message(int(good.int().argmin())))


def check_smoothing(smoothing: float) -> None:
    """Raise ValueError unless smoothing lies in [0, 1)."""
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing is {smoothing} but must be in [0, 1).")
