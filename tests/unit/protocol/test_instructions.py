"""Headers are read strictly: what is not understood is refused."""

import json
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from conf.compose import compose_experiment
from protocol.cards import SiteCard
from protocol.errors import ReplyRejected, SiteRefusal
from protocol.instructions import (
    WIRE_VERSION,
    ClientPlan,
    InstructionHeader,
    PrivacyStatement,
    ReplyHeader,
    client_plan,
    decode_instruction,
    decode_reply,
)

TENSORS = {"x": torch.ones(2)}
CANDIDATES = (
    *("other", 0.125, 7, True, False, ["other"], "published_records", "one_by_one", "bf16", "linear", "cosine"),
    *("refuse", "discrete"),
)


@pytest.fixture(scope="module")
def plan() -> ClientPlan:
    return client_plan(compose_experiment(["experiment=smoke"]), "run-1")


@pytest.fixture
def header(plan: ClientPlan) -> dict[str, Any]:
    made = InstructionHeader(round=2, plan=plan, plan_digest=plan.digest, base_digest="base", adapter_digest="adapter")
    return json.loads(made.model_dump_json())


def test_an_instruction_survives_the_wire(plan: ClientPlan, header: dict[str, Any]) -> None:
    decoded = decode_instruction(json.dumps(header), TENSORS)
    assert decoded.header.plan == plan
    assert decoded.header.plan.digest == plan.digest
    assert (decoded.header.round, decoded.header.base_digest, decoded.header.adapter_digest) == (2, "base", "adapter")
    assert decoded.tensors is TENSORS


def altered(header: dict[str, Any], *path: str, value: object) -> str:
    target = header
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    return json.dumps(header)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("surprise",), 1, r"surprise: Extra inputs are not permitted"),
        (("plan", "surprise"), 1, r"plan\.surprise: Extra inputs"),
        (("plan", "local", "surprise"), 1, r"plan\.local\.surprise: Extra inputs"),
        (("plan", "wire_version"), WIRE_VERSION + 1, r"plan\.wire_version: Input should be 1"),
        (("plan", "strategy", "kind"), "fedsgd", r"plan\.strategy"),
        (("plan", "privacy"), {"kind": "none", "clip_norm": 1}, r"plan\.privacy\.none\.clip_norm: Extra inputs"),
        (("round",), 0, r"round: Input should be greater than or equal to 1"),
        (("round",), 1.5, r"round: "),
        (("round",), "2", r"round: Input should be a valid integer"),
        (("plan", "rounds"), "5", r"plan\.rounds: Input should be a valid integer"),
        (("plan", "peft", "rslora"), "yes", r"plan\.peft\.rslora: Input should be a valid boolean"),
        (("plan", "run"), "", r"plan\.run: String should have at least 1 character"),
        (("plan", "run"), "x" * 129, r"plan\.run: String should have at most 128 characters"),
        (("base_digest",), None, r"base_digest: Input should be a valid string"),
    ],
)
def test_what_is_not_understood_is_refused(
    path: tuple[str, ...], value: object, message: str, header: dict[str, Any]
) -> None:
    with pytest.raises(SiteRefusal, match=rf"the instruction cannot be read: {message}") as refusal:
        decode_instruction(altered(header, *path, value=value), TENSORS)
    assert refusal.value.code == "malformed_instruction"


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"round": 1}', "\x00"])
def test_what_is_no_instruction_is_refused(text: str) -> None:
    with pytest.raises(SiteRefusal, match="the instruction cannot be read: "):
        decode_instruction(text, TENSORS)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("plan", "local", "steps"), 999),
        (("plan", "run"), "another"),
        (("plan", "rounds"), 1),
        (("plan", "adapter_seed"), 77),
        (("plan_digest",), "0" * 64),
    ],
)
def test_an_altered_plan_does_not_match_its_digest(
    path: tuple[str, ...], value: object, header: dict[str, Any]
) -> None:
    with pytest.raises(SiteRefusal, match="the plan does not match its digest; server and site differ in version") as e:
        decode_instruction(altered(header, *path, value=value), TENSORS)
    assert e.value.code == "plan_digest"


def test_the_digest_covers_every_field(plan: ClientPlan) -> None:
    fields = json.loads(plan.model_dump_json())

    def leaves(value: object, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
        if isinstance(value, dict) and value:
            return [leaf for key, part in value.items() for leaf in leaves(part, (*path, key))]
        return [path]

    same_text = ClientPlan.model_validate(dict(reversed(fields.items())))
    assert same_text.digest == plan.digest
    paths = [path for path in leaves(fields) if path[-1] not in ("kind", "wire_version", "weight_format")]
    digests, unchanged = {plan.digest}, []
    for path in paths:
        copy = json.loads(json.dumps(fields))
        old = copy
        for key in path[:-1]:
            old = old[key]
        before = old[path[-1]]
        for value in CANDIDATES:
            if value == before:
                continue
            try:
                old[path[-1]] = value
                digests.add(ClientPlan.model_validate(copy).digest)
            except ValidationError:
                continue
            break
        else:
            unchanged.append(path)
    assert unchanged == []
    assert len(digests) == len(paths) + 1


def test_sites_are_told_no_path_seed_or_population(plan: ClientPlan) -> None:
    assert set(ClientPlan.model_fields) == {
        "wire_version",
        "run",
        "rounds",
        "adapter_seed",
        "strategy",
        "privacy",
        "model",
        "peft",
        "task",
        "local",
        "quantization",
    }
    assert "directory" not in plan.model_dump_json()


def reply(**fields: object) -> str:
    return json.dumps({"status": "trained", "site": "harbor", "round": 1, "plan_digest": "p", **fields})


def test_a_reply_survives_the_wire() -> None:
    statement = PrivacyStatement(unit="one record", relation="add or remove", sampling_rate=0.1, steps_executed=4)
    header = ReplyHeader(status="trained", site="harbor", round=1, plan_digest="p", privacy=statement)
    decoded = decode_reply(header.model_dump_json(), TENSORS)
    assert decoded.header == header
    assert decoded.tensors is TENSORS


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"surprise": 1}, "surprise: Extra inputs"),
        ({"status": "maybe"}, "status: Input should be 'trained' or 'refused'"),
        ({"round": "1"}, "round: Input should be a valid integer"),
        ({"metrics": {"loss": "1.0"}}, r"metrics\.loss: Input should be a valid number"),
        ({"metrics": {"loss": None}}, r"metrics\.loss"),
        ({"privacy": {"unit": "x"}}, r"privacy\.relation: Field required"),
        (
            {"privacy": {"unit": "x", "relation": "y", "sampling_rate": 2, "steps_executed": 1}},
            r"privacy\.sampling_rate: Input should be less than or equal to 1",
        ),
    ],
)
def test_a_reply_that_is_not_understood_is_rejected(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ReplyRejected, match=rf"the reply cannot be read: {message}") as rejected:
        decode_reply(reply(**fields), TENSORS)
    assert rejected.value.code == "malformed_reply"


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_a_number_that_is_none_is_rejected(number: str) -> None:
    with pytest.raises(ReplyRejected):
        decode_reply(reply().replace('"p"}', f'"p", "metrics": {{"loss": {number}}}}}'), TENSORS)


@pytest.mark.parametrize("site", ["", "../up", "a b", "x" * 65, "-x", "härbor"])
def test_a_card_has_a_plain_name(site: str) -> None:
    with pytest.raises(ValidationError, match="site"):
        SiteCard(cloister_version="1", site=site, published_records=1)
