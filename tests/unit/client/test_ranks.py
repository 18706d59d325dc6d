"""A site that limits its rank: it says so, trains a cut, or refuses before anything is spent."""

from collections.abc import Callable
from typing import Any

import pytest

from client.site import Site
from finetuning.loop import train_locally
from finetuning.memory import examples_that_fit, rank_that_fits
from protocol.errors import SiteRefusal
from protocol.instructions import client_plan

Make = Callable[..., Any]


def limited(site: Site, rank: int) -> Site:
    return Site(site.file.model_copy(update={"trained_rank": rank}), rows=site._read, simulated=True)


def test_the_card_tells_the_limit(make_site: Make, small: Make) -> None:
    assert make_site(small()).card().trained_rank is None
    assert limited(make_site(small()), 2).card().trained_rank == 2


def with_memory(site: Site, mib: int, **changes: Any) -> Site:
    return Site(site.file.model_copy(update={"memory_mib": mib, **changes}), rows=site._read, simulated=True)


def test_the_card_tells_what_memory_allows(make_site: Make, small: Make) -> None:
    site = make_site(small())
    fitting = rank_that_fits(site.file.model_path, site.file.task, 8 << 20)
    assert 1 < fitting < 64
    assert with_memory(site, 8).card().trained_rank == fitting
    assert with_memory(site, 8, trained_rank=1).card().trained_rank == 1, "the smaller of the two"
    assert with_memory(site, 8, trained_rank=64).card().trained_rank == fitting


def test_memory_for_nothing_refuses_before_anything_is_spent(make_site: Make, small: Make, instruct: Make) -> None:
    experiment = small("strategy=flexlora")
    site = with_memory(make_site(experiment), 1)
    assert rank_that_fits(site.file.model_path, site.file.task, 1 << 20) == 0
    assert site.card().trained_rank == 1, "a card has no lower rank"
    reply = site.handle(instruct(experiment))
    assert (reply.header.status, reply.header.code) == ("refused", "rank_above_limit")
    assert site.state.spent() == 0


def test_a_plan_that_adapts_more_than_the_linear_layers_is_measured_itself(
    make_site: Make, small: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The card knows the linear layers; an embedding is as large as the vocabulary."""
    wide = small("strategy=hetlora", "peft.targets=[embed_tokens,down_proj]", "peft.rank=8", private=False)
    plan, site = client_plan(wide, "run"), make_site(wide)
    monkeypatch.setattr("client.site.rank_that_fits", lambda *_: 8)
    assert with_memory(site, 3)._adapted(plan).config.rank == 8
    with pytest.raises(SiteRefusal, match=r"30464 values at rank 8, too many for memory_mib=1$"):
        with_memory(site, 1)._adapted(plan)


@pytest.mark.parametrize(
    ("unit", "share"),
    [(["privacy=example_level"], 1), (["privacy=user_level", "privacy.max_records_per_user=4"], 4)],
    ids=["records", "users of four records"],
)
def test_gradients_held_at_once_are_those_of_records(
    unit: list[str],
    share: int,
    make_site: Make,
    small: Make,
    instruct: Make,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A user's gradient is of as many records as the plan allows."""
    experiment, at_once = small("strategy=fedit", *unit), list[int | None]()
    site = with_memory(make_site(experiment), 16)

    def watched(*given: Any, **settings: Any) -> Any:
        at_once.append(settings["max_units"])
        return train_locally(*given, **settings)

    monkeypatch.setattr("client.training.train_locally", watched)
    assert site.handle(instruct(experiment)).header.status == "trained"
    adapted = site._adapted(client_plan(experiment, "run"))
    values = sum(parameter.numel() for parameter in adapted.parameters.values())
    fitting = examples_that_fit(values, values, 16 << 20)
    assert fitting >= 8
    assert at_once == [fitting // share]


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
