"""FLTrust (Cao et al. 2021, arXiv 2012.13995, equations 2 to 4).

The server trains an update g₀ on root records of its own, which are public. Update k counts by ReLU(cos(xₖ, g₀)), after
it is scaled to the length of g₀, so that the result is never longer than g₀.
"""

from __future__ import annotations

import torch

from protocol.tensors import NamedTensors
from strategies.robust.updates import Updates

__all__ = ["fltrust"]


def fltrust(updates: Updates) -> NamedTensors:
    """Return the trusted mean; zero when no update points where the reference does.

    Raises:
        ValueError: no reference was given.
    """
    if updates.reference is None:
        raise ValueError("FLTrust needs the server's own update, trained on root records; there is none")
    inner, count = updates.gram, len(updates)
    tiny = torch.finfo(torch.float64).tiny
    norms = inner.diagonal().clamp_min(0).sqrt()
    trust = (inner[:count, count] / (norms[:count] * norms[count]).clamp_min(tiny)).clamp_min(0)
    weights = torch.zeros(count + 1, dtype=torch.float64)
    weights[:count] = trust * norms[count] / norms[:count].clamp_min(tiny) / trust.sum().clamp_min(tiny)
    return updates.combination(weights)
