"""Thin factorizations against dense ones of numpy's own."""

import numpy as np
import pytest
import torch

from strategies.lora.spectral import product_norm, spectral, truncated


def pair(m: int, r: int, n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(m, r, generator=generator, dtype=torch.float64),
        torch.randn(r, n, generator=generator, dtype=torch.float64),
    )


@pytest.mark.parametrize(("m", "r", "n"), [(20, 4, 15), (4, 4, 15), (3, 4, 15), (20, 1, 2), (6, 6, 6)])
def test_spectral_keeps_the_product_and_is_its_singular_vectors(m: int, r: int, n: int) -> None:
    left, right = pair(m, r, n)
    b, a = spectral(left, right)
    torch.testing.assert_close(b @ a, left @ right, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(a @ a.T, torch.eye(r, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    values = np.linalg.svd((left @ right).numpy(), compute_uv=False)[:r]
    np.testing.assert_allclose(b.norm(dim=0)[: len(values)].numpy(), values, rtol=1e-10, atol=1e-10)


def test_spectral_does_not_depend_on_how_the_product_was_factored() -> None:
    left, right = pair(20, 4, 15)
    turn = torch.linalg.qr(pair(4, 4, 4, seed=1)[0])[0]
    b, a = spectral(left, right)
    b2, a2 = spectral(b @ turn, turn.T @ a)
    torch.testing.assert_close((b2 * b).sum(0).abs(), b.square().sum(0))
    torch.testing.assert_close(b2.norm(dim=0), b.norm(dim=0))
    torch.testing.assert_close(spectral(b, a)[0] @ spectral(b, a)[1], b @ a)
    assert (a2 * a).sum(1).abs().min() > 1 - 1e-9


def test_spectral_of_nothing_leaves_an_orthonormal_basis_where_it_is() -> None:
    basis = torch.linalg.qr(pair(15, 4, 1)[0])[0].T
    b, a = spectral(torch.zeros(20, 4, dtype=torch.float64), basis)
    torch.testing.assert_close(a, basis)
    assert not b.any()


def test_equal_singular_values_are_turned_to_one_form() -> None:
    """Any basis of an eigenspace is right; that one is chosen that the space alone decides."""
    basis = torch.linalg.qr(pair(15, 4, 1)[0])[0].T
    columns = torch.linalg.qr(pair(20, 4, 1, seed=2)[0])[0]
    values = torch.tensor([3.0, 2.0, 2.0, 2.0], dtype=torch.float64).diag()
    turn = torch.eye(4, dtype=torch.float64)
    turn[1:, 1:] = torch.linalg.qr(pair(3, 3, 1, seed=3)[0])[0]
    first = spectral(columns @ values, basis)
    # The same product from the same frame, through another basis of the space of the twos.
    second = spectral((columns @ turn) @ values @ turn.T, basis)
    torch.testing.assert_close(first, second, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(first[1], basis, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_truncation_is_eckart_and_youngs_optimum(rank: int) -> None:
    left, right = pair(20, 12, 15)
    b, a = truncated(left, right, rank)
    u, s, vt = np.linalg.svd((left @ right).numpy())
    np.testing.assert_allclose((b @ a).numpy(), (u[:, :rank] * s[:rank]) @ vt[:rank], rtol=1e-10, atol=1e-10)
    assert b.shape == (20, rank)
    assert a.shape == (rank, 15)


@pytest.mark.parametrize(("m", "k", "n"), [(6, 30, 9), (9, 30, 6), (30, 4, 30)])
def test_recompression_is_lossless_at_full_rank(m: int, k: int, n: int) -> None:
    left, right = pair(m, k, n)
    b, a = truncated(left, right, min(m, n))
    assert b.shape[1] == a.shape[0] == min(m, k, n)
    torch.testing.assert_close(b @ a, left @ right, rtol=1e-11, atol=1e-11)


def test_product_norm_is_the_frobenius_norm() -> None:
    left, right = pair(20, 4, 15)
    assert product_norm(left, right) == pytest.approx(float((left @ right).norm()), rel=1e-12)
