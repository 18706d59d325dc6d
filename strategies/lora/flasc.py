"""FLASC: sparse download and upload, dense training (Kuo et al. 2024, arXiv 2406.05233, algorithm 1)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from protocol.tensors import NamedTensors
from strategies.averaging import Averaging, PlainClient, PlainRound, everything
from strategies.base import Aggregator, LocalOutcome, LocalRound, LocalStart, Names, ServerState, Strategy
from strategies.lora.drift import MeasuredMean
from strategies.lora.factors import is_random_factor, is_zero_factor

__all__ = ["flasc", "largest"]


def flasc(download_density: float, upload_density: float) -> Strategy:
    """Return P ← P + Σ pₖ top(Δₖ), where site k trains all of the factors from top(P).

    top keeps the share `download_density` or `upload_density` of the factors' values, those largest in size over all
    layers together, and sets the rest to zero; the server's P stays dense. Tensors that are no LoRA factor travel
    whole. Selecting follows training, so it is post-processing of noised steps, and it never raises an update's norm:
    under client-level privacy the site clips what is left, and the sum's sensitivity is that of `fedit`. The download
    is post-processing of the noised sum. With both densities 1 it is `fedit`.
    """
    return Strategy(
        is_linear=True,
        sensitivity="weighted_clip_norm",
        post_processes_sum=True,
        server=_SparseDownload(density=download_density),
        client=_SparseUpload(upload_density),
        trained=everything,
        uploaded=everything,
        downloaded=everything,
    )


@dataclass(frozen=True)
class _SparseDownload(Averaging):
    density: float = 1.0

    def download(self, adapter: NamedTensors, state: ServerState, names: Names, rank: int | None) -> NamedTensors:
        """Return the largest values of the adapter's factors, zeros in place of the others."""
        return largest(super().download(adapter, state, names, rank), self.density)

    def aggregator(self, adapter: NamedTensors, state: ServerState) -> Aggregator:
        """Return a weighted mean that measures drift from what the sites started from."""
        return MeasuredMean(largest(adapter, self.density))


@dataclass(frozen=True)
class _SparseUpload(PlainClient):
    density: float

    def begin(self, start: LocalStart) -> LocalRound:
        """Return a round that trains densely."""
        return _SparseRound(start, self.density)


@dataclass(frozen=True)
class _SparseRound(PlainRound):
    density: float

    def finish(self, after: NamedTensors) -> LocalOutcome:
        """Return the largest values of trained minus received."""
        return LocalOutcome(largest(super().finish(after).update, self.density))


def largest(tensors: NamedTensors, density: float) -> dict[str, torch.Tensor]:
    """Return the tensors with the ⌈density · n⌉ largest of the factors' n values, and zeros for the others.

    Of equal sizes the first in the order of names is kept, so that every machine selects the same. What is not finite
    counts as largest: a selection must not hide it from those who check.
    """
    names = sorted(name for name in tensors if is_random_factor(name) or is_zero_factor(name))
    count = sum(tensors[name].numel() for name in names)
    wanted = math.ceil(density * count)
    if wanted == count:
        return dict(tensors)
    sizes = torch.cat([tensors[name].detach().reshape(-1) for name in names]).abs().nan_to_num(nan=math.inf)
    least = torch.topk(sizes, wanted, sorted=False).values.min()
    kept = sizes > least
    ties = (sizes == least).nonzero().squeeze(1)
    kept[ties[: wanted - int(kept.sum())]] = True
    chosen = dict(tensors)
    for name, mask in zip(names, kept.split([tensors[name].numel() for name in names]), strict=True):
        chosen[name] = tensors[name].where(mask.reshape(tensors[name].shape), 0.0)
    return chosen
