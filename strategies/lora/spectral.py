"""Products of two thin matrices, and their singular vectors, without ever forming the m x n product."""

from __future__ import annotations

from itertools import pairwise

import torch

__all__ = ["product_norm", "spectral", "truncated"]

_SAME = 1e-6
"""Relative to the largest singular value; what is nearer than float32 can tell counts as equal."""


def spectral(left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return factors of the same product left·right whose right one is its right singular vectors.

    left (m x r) and right (r x n), r <= n. The returned right has orthonormal rows Vᵀ, by falling singular value; the
    returned left is U S. It costs two thin QR decompositions, O((m + n) r²), and an SVD of r x r.

    Singular vectors are defined up to sign, and up to a rotation where singular values are equal (zeros, above all).
    Both are fixed in the frame of `right`: a lone vector has its largest coordinate positive, and equal ones are turned
    to be nearest to coordinate axes. So a zero `left` gives back an orthonormal `right` as it is.
    """
    frame, triangle = _positive_qr(right.T)
    core = torch.linalg.qr(left)[1] @ triangle.T
    _, values, rows = torch.linalg.svd(core, full_matrices=True)
    values = torch.cat([values, values.new_zeros(len(rows) - len(values))])
    vectors = torch.cat([_fixed(group) for group in rows.split(_multiplicities(values))]) @ frame.T
    # A projection on orthonormal rows of the same row space: exact whatever the rotation.
    return left @ (right @ vectors.T), vectors


def truncated(left: torch.Tensor, right: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return factors (m x k) and (k x n) of the best approximation of left·right of rank `most` (Eckart, Young 1936).

    k is at most `most`, m, n and the given inner size; with `most` = min(m, n) nothing is lost. The right factor has
    orthonormal rows, by falling singular value, each with its largest coordinate positive. QR of both factors and an
    SVD of the small core: the m x n product is never formed.
    """
    left_frame, left_core = torch.linalg.qr(left)
    right_frame, right_core = torch.linalg.qr(right.T)
    u, values, rows = torch.linalg.svd(left_core @ right_core.T, full_matrices=False)
    kept = min(most, len(values))
    rows = rows[:kept] @ right_frame.T
    signs = _signs(rows.gather(1, rows.abs().argmax(dim=1, keepdim=True)))
    return left_frame @ (u[:, :kept] * values[:kept] * signs.T), rows * signs


def product_norm(left: torch.Tensor, right: torch.Tensor) -> float:
    """Return ‖left·right‖_F from two r x r Gram matrices: tr(LᵀL · R Rᵀ)."""
    return float(((left.T @ left) * (right @ right.T)).sum().clamp(min=0).sqrt())


def _positive_qr(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the QR decomposition with a diagonal that is not negative: then it is the only one."""
    q, r = torch.linalg.qr(matrix)
    signs = _signs(r.diagonal())
    return q * signs, r * signs[:, None]


def _multiplicities(values: torch.Tensor) -> list[int]:
    """Return the sizes of the groups of equal singular values; `values` fall."""
    gaps = (values[:-1] - values[1:]) > _SAME * values[0]
    starts = [0, *(position + 1 for position, gap in enumerate(gaps.tolist()) if gap), len(values)]
    return [end - begin for begin, end in pairwise(starts)]


def _fixed(rows: torch.Tensor) -> torch.Tensor:
    """Return orthonormal rows (k x r) turned within the space they span, to a form that depends on that space alone:
    nearest to the identity in the k coordinates where the space is largest."""
    chosen = rows.square().sum(dim=0).topk(len(rows)).indices.sort().values
    u, _, vh = torch.linalg.svd(rows[:, chosen])
    return (u @ vh).T @ rows


def _signs(values: torch.Tensor) -> torch.Tensor:
    return torch.where(values < 0, -1.0, 1.0).to(values.dtype)
