"""A site that limits its rank: it says so, trains a cut, or refuses before anything is spent."""

from collections.abc import Callable
from typing import Any

import pytest

from client.site import Site
from protocol.errors import SiteRefusal
from protocol.instructions import client_plan

Make = Callable[..., Any]


def limited(site: Site, rank: int) -> Site:
    return Site(site.file.model_copy(update={"trained_rank": rank}), rows=site._read, simulated=True)


def test_the_card_tells_the_limit(make_site: Make, small: Make) -> None:
    assert make_site(small()).card().trained_rank is None
    assert limited(make_site(small()), 2).card().trained_rank == 2


@pytest.mark.parametrize(("strategy", "rank"), [("fedit", 2), ("rolora", 7), ("ravan", 1)])
def test_a_plan_above_the_limit_is_refused_where_ranks_do_not_mix(
    strategy: str, rank: int, make_site: Make, small: Make, instruct: Make
) -> None:
    experiment = small(f"strategy={strategy}")
    site = limited(make_site(experiment), rank)
    reply = site.handle(instruct(experiment))
    assert (reply.header.status, reply.header.code) == ("refused", "rank_above_limit")
    assert site.state.spent() == 0
    with pytest.raises(SiteRefusal):
        site.rehearse(client_plan(experiment, "run"))
