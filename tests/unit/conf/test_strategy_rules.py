"""What strategies cannot be combined with, refused with the reason; and what is worth a second look."""

import pytest

from conf.compose import InvalidConfiguration, compose_experiment
from conf.schema.model import LoRA
from conf.schema.rules import warnings_for
from conf.schema.strategy import FedSB, FedSVD, Ravan

CLIENT_LEVEL = ("privacy=client_level", "privacy.target_epsilon=null", "privacy.noise_multiplier=1")


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (("strategy=ravan", "peft.rank=6"), r"strategy\.heads=4 does not divide peft\.rank=6; use a rank of 4"),
        (("federation.site_ranks=[8,0]",), "greater than or equal to 1"),
        (("federation.site_ranks=[]",), "at least 1 item"),
        (
            ("strategy=fedex", "federation.site_ranks=[8,2]"),
            r"which strategy=fedex cannot combine; use one of ffa_lora,",
        ),
        (
            ("strategy=ravan", "strategy.heads=1", "peft.rank=8", "federation.site_ranks=[8,7]"),
            r"has a rank of 7, and strategy=ravan needs 8 for a single core",
        ),
        (
            ("strategy=ravan", "strategy.heads=4", "peft.rank=8", "federation.site_ranks=[8,1]"),
            r"has a rank of 1, and strategy=ravan needs 2 for a single core",
        ),
        (
            ("strategy=flora", "peft=dora"),
            r"strategy=flora folds products beside the base, which peft\.dora=true ignores",
        ),
        (("strategy=fedsvd", "peft=dora"), r"strategy=fedsvd trains one factor at a time, peft\.dora=true adds a"),
        (("strategy=fedsb", "peft=dora"), r"strategy=fedsb trains cores between the factors, which DoRA cannot norm"),
        (
            ("strategy=flexlora", *CLIENT_LEVEL),
            r"privacy=client_level needs a strategy that sums updates \(fedit, .*not flex",
        ),
        (
            ("strategy=fedsvd", "privacy=client_level_tree", "federation.cohort_size=2"),
            r"privacy\.noise\.kind=tree cancels over rounds, and the values that strategy=fedsvd sums are others",
        ),
        (
            ("strategy=flasc", "quantization=eden", "quantization.downlink=same"),
            r"strategy\.download_density=0\.25 sends other entries in every round, quantization\.downlink=same their",
        ),
    ],
)
def test_illegal_combinations(overrides: tuple[str, ...], problem: str) -> None:
    with pytest.raises(InvalidConfiguration, match=problem):
        compose_experiment(overrides)


def test_equal_ranks_need_no_rule_for_different_ones() -> None:
    assert compose_experiment(["strategy=fedit", "federation.site_ranks=[8,16]"]).federation.site_ranks == (8, 16)


@pytest.mark.parametrize(
    ("strategy", "text"),
    [("fedrot", "strategy=fedrot noises both"), ("flora", "starts from B = 0"), ("fedsa", "has no global model")],
)
def test_warnings(strategy: str, text: str) -> None:
    assert any(text in warning for warning in warnings_for(compose_experiment([f"strategy={strategy}"])))


def test_the_rank_of_a_limited_site() -> None:
    assert [FedSVD().rank_within(8, limit) for limit in (None, 3, 8, 20)] == [8, 3, 8, 8]
    assert [FedSB().rank_within(8, limit) for limit in (None, 3)] == [8, 3]
    assert [Ravan(heads=4).rank_within(8, limit) for limit in (None, 1, 3, 5, 20)] == [8, 0, 2, 4, 8]
    assert [Ravan(heads=4).cores_at(rank, 8) for rank in (2, 4, 8)] == [1, 2, 4]


@pytest.mark.parametrize("rslora", [False, True])
def test_another_rank_has_the_same_scale(rslora: bool) -> None:
    config = LoRA(rank=8, alpha=16.0, rslora=rslora)
    low = config.at_rank(2)
    power = 0.5 if rslora else 1.0
    assert low.alpha / low.rank**power == pytest.approx(config.alpha / config.rank**power)
