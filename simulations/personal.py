"""What each simulated site's own model is worth, where a strategy leaves a part of it at the site.

The server has no such model and cannot measure one. A simulation owns the sites, so it puts together what they would:
the shared part, and what each has kept. In a deployment this is the site's private matter, and nothing of it leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from client.memory import SiteMemory
from client.site import Site
from conf.schema.experiment import Experiment
from protocol.tensors import NamedTensors

__all__ = ["personal_models"]


def personal_models(
    experiment: Experiment, run: str, sites: Iterable[Site]
) -> Callable[[NamedTensors], Mapping[str, NamedTensors]] | None:
    """Return what takes the final adapter to each site's own model; None where the server's is everybody's."""
    if not experiment.strategy.personal:
        return None
    files = [site.file for site in sites]

    def models(adapter: NamedTensors) -> Mapping[str, NamedTensors]:
        kept = {
            file.name: SiteMemory(Path(file.state_directory), run).before(experiment.federation.rounds + 1)
            for file in files
        }
        # A site that never took part has what it starts from.
        return {name: {**adapter, **{key: own[key] for key in own if key in adapter}} for name, own in kept.items()}

    return models
