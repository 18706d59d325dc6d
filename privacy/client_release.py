"""A client-level run at the server: clipped sums go in, noised means come out."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy, deepcopy

import torch

from privacy.adaptive_clip import next_clip_norm
from privacy.client_level import ClientLevelPlan, update_norm
from privacy.randomness import SecureStream
from protocol.tensors import Layout, NamedTensors, corner

__all__ = ["ClientLevelRelease", "ClippedSum"]


class ClippedSum:
    """Σ wₖ Δₖ of one round in float64, and Σ ±1/2 over whether a clip changed nothing. Exact, so it is a secret.

    Without any update it is zero: an empty cohort is a sum like any other.
    """

    def __init__(self, layout: Layout, clip_norm: float, max_weight: float) -> None:
        self._parts = {name: torch.zeros(layout[name].shape, dtype=torch.float64) for name in sorted(layout)}
        self._clip_norm, self._max_weight = clip_norm, max_weight
        self._count = 0.0

    def accumulate(self, update: NamedTensors, weight: float, below_clip: bool | None = None) -> None:
        """Fold one verified update. What its rounding to float32 left above the clip norm is taken off.

        Raises:
            ValueError: the weight is not positive, or above the bound that the noise is made for.
        """
        if not 0 < weight <= self._max_weight:
            raise ValueError(f"weight={weight} is not in (0, {self._max_weight}], the bound that the noise is made for")
        norm = update_norm(update)
        factor = weight * min(1.0, self._clip_norm / norm) if norm > 0 else weight
        for name, part in self._parts.items():
            # A site of lower rank trains a corner of the factor.
            corner(part, update[name].shape).add_(update[name].double() * factor)
        if below_clip is not None:
            self._count += 0.5 if below_clip else -0.5

    @property
    def count(self) -> float:
        """Σ ±1/2 over the folded updates: plus where the norm was below the clip."""
        return self._count

    @property
    def parts(self) -> dict[str, torch.Tensor]:
        """The sums by name, float64, in the order of the names."""
        return self._parts


class ClientLevelRelease:
    """Noise state and clip norm from round to round: what is public of it is two numbers, the rest is drawn again."""

    def __init__(self, plan: ClientLevelPlan) -> None:
        self._plan = plan
        self._noise = plan.factorization.start()
        self._clip_norm = plan.clip_norm

    @classmethod
    def resumed(
        cls,
        plan: ClientLevelPlan,
        rounds: int,
        clip_norm: float,
        values: int,
        stream_of: Callable[[int], SecureStream],
    ) -> ClientLevelRelease:
        """Return the release as it was after `rounds` rounds, bit for bit.

        The state of correlated noise follows from the noise drawn so far, so it is drawn again and never stored.

        Args:
            plan: of the run.
            rounds: rounds that were released.
            clip_norm: as it was after them.
            values: coordinates of a released sum.
            stream_of: returns the stream of a round, from 1, as it was given to `release`; not called where noise is
                independent.
        """
        release = cls(plan)
        release._clip_norm = clip_norm
        for number in range(1, rounds + 1 if plan.participation is not None else 1):
            stream = stream_of(number)
            release._noise.next(lambda stream=stream: stream.gaussian(values))
        return release

    def copy(self) -> ClientLevelRelease:
        """Return another release in the same state; what one does next does not move the other."""
        twin = copy(self)
        twin._noise = deepcopy(self._noise)
        return twin

    @property
    def clip_norm(self) -> float:
        """The clip norm of the next round. It follows from released values alone."""
        return self._clip_norm

    def new_sum(self, layout: Layout) -> ClippedSum:
        """Return an empty sum for the next round."""
        return ClippedSum(layout, self._clip_norm, self._plan.max_weight)

    def release(self, total: ClippedSum, stream: SecureStream) -> dict[str, torch.Tensor]:
        """Return the round's noised sum over the public normalizer, as float32, and move the clip norm.

        Args:
            total: of `new_sum`, all updates folded.
            stream: fresh randomness for this round.
        """
        plan, parts = self._plan, total.parts
        values = sum(part.numel() for part in parts.values())
        drawn = torch.from_numpy(self._noise.next(lambda: stream.gaussian(values)))
        exact = torch.cat([part.flatten() for part in parts.values()])
        (noised,) = plan.noise(self._clip_norm).add_drawn((exact,), (drawn,))
        released = noised / plan.normalizer
        if plan.adaptive is not None:
            noised_count = total.count + plan.adaptive.count_noise * float(stream.gaussian(1)[0])
            self._clip_norm = next_clip_norm(self._clip_norm, noised_count, plan.expected_sites, plan.adaptive)
        pieces = released.split([part.numel() for part in parts.values()])
        return {name: piece.reshape(parts[name].shape) for name, piece in zip(parts, pieces, strict=True)}
