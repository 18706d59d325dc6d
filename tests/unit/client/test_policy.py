"""What a site refuses, whatever the server asks."""

from pathlib import Path

import pytest

from client.policy import check_policy
from client.site import read_site_file
from conf.compose import compose_experiment
from conf.schema.site import SiteBudget, SiteFile, SitePolicy
from protocol.errors import ConfigError, SiteRefusal
from protocol.instructions import InstructionHeader, client_plan

USERS = ("privacy=user_level", "data.user_column=patient")
CLIENTS = ("privacy=client_level",)


def header(*overrides: str, round_number: int = 1) -> InstructionHeader:
    plan = client_plan(compose_experiment(overrides), "run")
    return InstructionHeader(
        round=round_number,
        plan=plan,
        plan_digest=plan.digest,
        base_digest="b" * 64,
        adapter_digest="a" * 64,
        clip_norm=1.0 if plan.privacy.kind == "client_level" else None,
    )


def site(budget: SiteBudget | None = SiteBudget(epsilon=8, delta=1e-5), **policy: object) -> SiteFile:
    data = compose_experiment().data
    return SiteFile(
        name="clinic",
        published_records=1000,
        data=data,
        model_path="embedded:clinic-base",
        budget=budget,
        policy=SitePolicy.model_validate(policy),
        state_directory="state",
    )


@pytest.mark.parametrize(
    ("asked", "own", "code"),
    [
        (header("privacy=none"), site(), "no_privacy"),
        (header("privacy.insecure_seed=1"), site(), "insecure_seed"),
        (header("privacy=client_level", "privacy.insecure_seed=1"), site(trust_server_noise=True), "insecure_seed"),
        (header(), site(budget=None), "no_budget"),
        (header("privacy.delta=1e-6"), site(), "delta_below_budget"),
        (header(), site(budget=SiteBudget(unit="user", epsilon=8, delta=1e-5)), "wrong_unit"),
        (header(*USERS), site(), "no_users"),
        (header(*CLIENTS), site(), "no_trust_in_server_noise"),
        (header(), site(max_steps_per_round=3), "too_many_steps"),
        (
            header("data=csv_labelled", "data.source.path=x.csv", "task=classification", "task.labels=[flu,cold]"),
            site(),
            "wrong_task",
        ),
        (header(round_number=11), site(), "round_out_of_plan"),
    ],
)
def test_refusals(asked: InstructionHeader, own: SiteFile, code: str) -> None:
    with pytest.raises(SiteRefusal) as caught:
        check_policy(own, asked)
    assert caught.value.code == code


def test_the_default_policy_agrees_to_private_training_alone() -> None:
    check_policy(site(), header())
    assert not SitePolicy().release_training_loss
    assert not SitePolicy().allow_no_privacy


def test_a_policy_can_agree_to_more() -> None:
    check_policy(site(allow_no_privacy=True, budget=None), header("privacy=none"))
    check_policy(site(), header("privacy.insecure_seed=1"), simulated=True)


def test_no_file_means_nothing_is_allowed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist; a site without its own file allows nothing"):
        read_site_file(tmp_path / "site.yaml")


def test_every_problem_of_a_site_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    path.write_text("name: 'a b'\npublished_records: 0\nbudgett: 3\n")
    with pytest.raises(ConfigError) as caught:
        read_site_file(path)
    for part in ("name: ", "published_records: ", "budgett: ", "data: ", "state_directory: "):
        assert part in str(caught.value)


@pytest.mark.parametrize("content", [b"name: [", b"name: \xff\xfe"])
def test_a_site_file_that_is_no_yaml(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="is no YAML"):
        read_site_file(path)
