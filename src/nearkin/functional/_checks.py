"""Checks of arguments: shapes and settings always, values of tensors on request."""

from __future__ import annotations

from torch import Tensor


def check_positive(name: str, value: float | int) -> None:
    """Raise ValueError unless `value` is above 0."""
    if not value > 0:
        raise ValueError(f"{name} is {value} but must be above 0.")


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


def check_labels(labels: Tensor, count: int) -> None:
    """Raise ValueError unless labels are `[count]` integers or `[count, C]` floating rows."""
    check_rows("labels", labels, count)
    soft = labels.ndim == 2 and labels.is_floating_point()
    if not (soft or _hard(labels)):
        raise ValueError(
            f"labels are {labels.dtype} of shape {tuple(labels.shape)} "
            "but must be [N] integers or [N, C] floating rows that sum to 1."
        )


def check_hard_labels(labels: Tensor, count: int) -> None:
    """Raise ValueError unless labels are `[count]` integers."""
    check_rows("labels", labels, count)
    if not _hard(labels):
        raise ValueError(
            f"labels are {labels.dtype} of shape {tuple(labels.shape)} but must be [N] integers "
            "here: for mixed labels, weigh the values of the two labels."
        )


def check_smoothing(smoothing: float) -> None:
    """Raise ValueError unless smoothing lies in [0, 1)."""
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing is {smoothing} but must be in [0, 1).")


def _hard(labels: Tensor) -> bool:
    integer = not (labels.is_floating_point() or labels.is_complex())
    return labels.ndim == 1 and integer
