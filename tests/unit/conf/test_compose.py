"""Overrides in, one validated experiment out; every problem in one message, with the path and the nearest name."""

import re

import pytest

from conf.compose import InvalidConfiguration, compose_experiment, parse_experiment, split_sweep
from conf.schema.robust import Bucketing
from conf.schema.rules import warnings_for


def problems(*overrides: str) -> str:
    with pytest.raises(InvalidConfiguration) as caught:
        compose_experiment(overrides)
    return str(caught.value)


def test_default_is_private_and_needs_no_download() -> None:
    experiment = compose_experiment()
    assert experiment.privacy.kind == "example_level"
    assert experiment.privacy.target_epsilon == 8
    assert experiment.model.path.startswith("embedded:")
    assert warnings_for(experiment) == []


def test_all_problems_are_reported_at_once() -> None:
    text = problems(
        "strategy=fedavgg",
        "federation.rouds=3",
        "peft.rank=0",
        "privacy.noise_multiplier=1",
        "data.partition.kez=region",
        "model.dtype=fp8",
    )
    assert "6 problem(s)" in text
    assert re.search(
        r"strategy=fedavgg does not exist; choose one of [a-z_, ]*\bffa_lora\b[a-z_, ]*; did you mean", text
    )
    assert "federation.rouds is not a known key; did you mean rounds?" in text
    assert "peft.rank=0: input should be greater than or equal to 1" in text
    assert "give exactly one of privacy.target_epsilon and privacy.noise_multiplier" in text
    assert "data.partition.kez is not a known key; did you mean key?" in text
    assert "model.dtype='fp8': input should be 'fp32', 'bf16' or 'fp16'" in text


@pytest.mark.parametrize("privacy", ["example_level", "user_level", "client_level"])
def test_a_loss_in_clear_belongs_to_no_private_run(privacy: str) -> None:
    """Nor to a client-level one: the server's noise covers the update alone."""
    text = problems(f"privacy={privacy}", "federation.release_training_loss=true")
    assert "federation.release_training_loss=true would send losses that no ε covers" in text


def test_a_mistyped_key_is_never_silently_added() -> None:
    assert "federation.local.stepz is not a known key; did you mean steps?" in problems("+federation.local.stepz=3")


@pytest.mark.parametrize(
    "line", ["quantization=null", "quantization={kind:eden,bits:2}", "quantization=[eden]", "quantization=2"]
)
def test_a_group_takes_the_name_of_a_member_and_nothing_else(line: str) -> None:
    text = problems(line, "peft.rank=0")
    assert f"{line} names no member of the group quantization; choose one of bf16, eden, fp16" in text
    assert "peft.rank=0: input should be greater" in text


def test_no_experiment_can_be_chosen_by_name() -> None:
    assert compose_experiment(["experiment=null"]) == compose_experiment()


def test_an_unknown_variant_lists_the_family() -> None:
    text = problems("federation.local.optimizer.kind=adam")
    assert "federation.local.optimizer.kind=adam does not exist; choose one of 'sgd', 'adamw'" in text


def test_a_blank_value_names_what_to_set() -> None:
    assert "model.path is required and has no value; set model.path=..." in problems("model=causal_lm")


@pytest.mark.parametrize("line", ["bad[override", "peft.rank=[1,", "nonsense", "=3", "--rounds=3", "seed=1=2"])
def test_an_override_that_cannot_be_read_is_one_problem_among_the_others(line: str) -> None:
    text = problems("federation.rounds=0", line, "peft.rank=0")
    assert "3 problem(s)" in text
    assert f"{line!r} cannot be read as an override; write path.to.key=value, and quote a value" in text
    assert "federation.rounds=0: input should be greater" in text
    assert "hydra.cc" not in text


def test_the_quotes_that_the_message_proposes_work() -> None:
    assert compose_experiment(["data.source.path='a, [b]=c'"]).data.source.path == "a, [b]=c"


def test_a_sweep_that_cannot_be_read_names_the_override() -> None:
    with pytest.raises(InvalidConfiguration, match=r"'seed=choice\(1,' cannot be read as an override"):
        split_sweep(["seed=choice(1,", "peft.rank=1,2"])


@pytest.mark.parametrize(
    "overrides",
    [
        ("strategy.robust.kind=median", "strategy.robust.mixing.kind=bucketing", "strategy.robust.mixing.size=3"),
        ("strategy.robust.mixing.size=3", "strategy.robust.mixing.kind=bucketing", "strategy.robust.kind=median"),
        ("robust=krum", "strategy.robust.kind=median", "strategy.robust.mixing={kind:bucketing,size:3}"),
        ("robust=median", "strategy.robust.mixing.kind=bucketing", "strategy.robust.mixing.size=3"),
    ],
)
def test_kinds_nest_whatever_the_order(overrides: tuple[str, ...]) -> None:
    robust = compose_experiment(["data.partition={kind:iid,sites:10}", *overrides]).strategy.robust
    assert robust.kind == "median"
    assert robust.mixing == Bucketing(size=3)


def test_a_setting_below_a_groups_name_is_told_its_path() -> None:
    text = problems("robust.kind=median", "objective.mu=0.1", "robust=median", "strategy.robust.atackers=2")
    assert "robust.kind=median is no path: what robust=NAME chooses is at strategy.robust" in text
    assert "use strategy.robust.kind=median" in text
    assert "use strategy.objective.mu=0.1" in text
    assert "strategy.robust.atackers is not a known key; did you mean attackers?" in text


def test_a_new_kind_starts_its_node_afresh() -> None:
    optimizer = compose_experiment(["federation.local.optimizer.kind=adamw"]).federation.local.optimizer
    assert optimizer.kind == "adamw"
    partition = compose_experiment(["data.partition={kind:dirichlet,sites:3,alpha:0.5}"]).data.partition
    assert partition.kind == "dirichlet"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["data.partition={kind:iid,sites:3}", "federation.cohort_size=5"],
            "federation.cohort_size=5 is larger than the population of 3 sites; use at most 3",
        ),
        (
            ["data.partition={kind:iid,sites:3}", "federation.min_replies=4"],
            "federation.min_replies=4 is larger than the cohort of 3 sites; use at most 3",
        ),
        (["task=classification", "task.labels=[a,b]"], "task=classification needs data.columns.kind=labelled"),
        (["data=csv_labelled", "data.source.path=x.csv"], "data.columns.kind=labelled needs task=classification"),
        (
            ["peft.dora=true", "strategy=fedit", "privacy.per_example_gradients=opacus", "privacy.without_rule=refuse"],
            "peft.dora=true has no per-example gradient rule in Opacus (layer lora_magnitude_vector); set "
            "privacy.per_example_gradients=native, or peft.dora=false",
        ),
        (
            ["strategy=ffa_lora", "peft.dora=true", "privacy=none"],
            "strategy=ffa_lora trains one factor at a time, peft.dora=true adds a magnitude",
        ),
        (["privacy.target_epsilon=null"], "neither is set; give exactly one of"),
        (["task=classification", "data=csv_labelled", "data.source.path=x.csv", "task.labels=[a,a]"], "repeated: a"),
    ],
)
def test_illegal_combinations(overrides: list[str], message: str) -> None:
    assert message in problems(*overrides)


@pytest.mark.parametrize("backend", [[], ["privacy.per_example_gradients=opacus"]])
def test_dora_trains_privately_where_a_rule_or_a_way_out_exists(backend: list[str]) -> None:
    assert compose_experiment(["peft.dora=true", "strategy=fedit", *backend]).peft.dora


@pytest.mark.parametrize(
    ("overrides", "warning"),
    [
        (["privacy=none"], "nothing protects the sites' records"),
        (["privacy.insecure_seed=3"], "noise is repeatable"),
        (["privacy.target_epsilon=50"], "is a weak promise"),
        (["strategy=fedit"], "noises both LoRA factors"),
    ],
)
def test_warnings(overrides: list[str], warning: str) -> None:
    assert warning in "\n".join(warnings_for(compose_experiment(overrides)))


def test_stored_json_gives_the_same_experiment() -> None:
    experiment = compose_experiment(["strategy=fedit", "privacy.insecure_seed=3", "data.partition.sites=[a,b]"])
    assert parse_experiment(experiment.canonical_json()) == experiment
    assert parse_experiment(experiment.canonical_json()).digest == experiment.digest


def test_stored_json_is_decoded_strictly() -> None:
    text = compose_experiment().canonical_json().replace('"rounds"', '"rouds"')
    with pytest.raises(InvalidConfiguration, match=r"federation.rouds is not a known key"):
        parse_experiment(text)


def test_digest_ignores_where_a_run_is_stored_and_nothing_else() -> None:
    default = compose_experiment()
    assert compose_experiment(["logging.directory=elsewhere"]).digest == default.digest
    assert compose_experiment(["seed=1"]).digest != default.digest


def test_sweeps_expand_to_every_combination() -> None:
    jobs = split_sweep(["strategy=fedit,ffa_lora", "seed=0,1", "name=x"])
    assert len(jobs) == 4
    assert ("strategy=ffa_lora", "seed=1", "name=x") in jobs


def test_learning_rate_decay_ends_above_zero() -> None:
    local = compose_experiment(["federation.local.learning_rate_decay=linear"]).federation.local
    assert [local.learning_rate_factor(number, 4) for number in (1, 2, 3, 4)] == [1.0, 0.75, 0.5, 0.25]
    constant = compose_experiment(["federation.local.learning_rate_decay=none"]).federation.local
    assert constant.learning_rate_factor(4, 4) == 1.0
