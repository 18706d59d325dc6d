"""A reply that does not verify is never aggregated, is named with its reason, and does not stop the round."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, Context, Message, MessageType

from client.app import client_app
from client.site import Site
from conf.compose import compose_experiment
from protocol.errors import FederationError
from protocol.instructions import Instruction, PrivacyStatement, Reply
from server.app import Launch, serve
from simulations.in_process import InProcessGrid
from simulations.population import Population, build_population

SITES = ("eastfield", "harbor", "millbrook", "northgate")
LIAR = "harbor"
OVERRIDES = (
    "experiment=smoke",
    "privacy=none",
    "data.max_records=80",
    "data.max_length=96",
    "federation.local.expected_batch_size=8",  # an empty draw, whose update is zero, is as good as impossible
    "evaluation.every=0",
    "runtime.threads=1",
)

Tamper = Callable[[Reply], Reply]
TamperMessage = Callable[[Message], None]


@dataclass
class Lying:
    """A real site whose replies are tampered with before they leave."""

    site: Site
    tamper: Tamper

    @property
    def file(self) -> Any:
        return self.site.file

    def card(self, challenge: bytes = b"") -> Any:
        return self.site.card(challenge)

    def handle(self, instruction: Instruction) -> Reply:
        return self.tamper(self.site.handle(instruction))


@cache
def population() -> Population:
    return build_population(compose_experiment(OVERRIDES))


def run(
    path: Path, *overrides: str, tamper: Tamper | None = None, message: TamperMessage | None = None
) -> dict[str, Any]:
    """Run the federation with one lying site, and return its summary."""
    experiment = compose_experiment((*OVERRIDES, *overrides))
    parts = Population({name: population().parts[name] for name in wanted_sites(experiment)}, ())
    sites: dict[str, Any] = dict(parts.sites(experiment, path / "sites"))
    if tamper is not None:
        sites[LIAR] = Lying(sites[LIAR], tamper)
    nodes = list(sites.values())
    app = client_app(lambda context: nodes[int(context.node_config["partition-id"])])

    def answered(instruction: Message, context: Context) -> Message:
        reply = app(instruction, context)
        site = nodes[int(context.node_config["partition-id"])].file.name
        if message is not None and site == LIAR and instruction.metadata.message_type == MessageType.TRAIN:
            message(reply)
        return reply

    grid: Any = InProcessGrid(answered, [{"partition-id": position} for position in range(len(nodes))])  # type: ignore[arg-type]
    serve(grid, Launch(experiment, path, heldout=(), expected_sites=len(nodes)))
    return summary_of(path)


def wanted_sites(experiment: Any) -> tuple[str, ...]:
    return experiment.data.partition.sites or SITES


def summary_of(path: Path) -> dict[str, Any]:
    return json.loads((path / "summary.json").read_text())


@pytest.fixture(scope="module")
def without_the_liar(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The adapter of a run in which the lying site has never been."""
    honest = ",".join(site for site in SITES if site != LIAR)
    summary = run(tmp_path_factory.mktemp("honest") / "run", f"data.partition.sites=[{honest}]")
    return summary["adapter"]["digest"]


def with_first_tensor(change: Callable[[torch.Tensor], torch.Tensor]) -> Tamper:
    def tamper(reply: Reply) -> Reply:
        name = sorted(reply.tensors)[0]
        return replace(reply, tensors=dict(reply.tensors) | {name: change(reply.tensors[name])})

    return tamper


def with_header(**values: Any) -> Tamper:
    return lambda reply: replace(reply, header=reply.header.model_copy(update=values))


def stating(**changed: Any) -> PrivacyStatement:
    """Return a statement with one mechanism, in which something is changed."""
    mechanism = {"sampling_rate": 0.1, "noise_multiplier": 1.0, "steps": 4} | changed
    return PrivacyStatement(unit="", relation="", sampling_rate=0.1, steps_executed=4, mechanisms=(mechanism,))


def one_value(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        changed = tensor.clone()
        changed.view(-1)[0] = value
        return changed

    return change


def without_first(reply: Reply) -> Reply:
    first = sorted(reply.tensors)[0]
    return replace(reply, tensors={name: tensor for name, tensor in reply.tensors.items() if name != first})


def with_another(reply: Reply) -> Reply:
    return replace(reply, tensors=dict(reply.tensors) | {"unknown.weight": torch.zeros(3)})


def crash(_: Reply) -> Reply:
    raise RuntimeError("record 17 reads: patient has")


@pytest.mark.parametrize(
    ("tamper", "code", "reason"),
    [
        (with_first_tensor(one_value(float("nan"))), "not_finite", "holds NaN or infinity"),
        (with_first_tensor(one_value(float("-inf"))), "not_finite", "holds NaN or infinity"),
        (with_first_tensor(one_value(1e38)), "not_finite", "or a value above 1e+09 in size"),
        (with_first_tensor(lambda tensor: tensor.T.contiguous()), "wrong_shape", "has shape"),
        (with_first_tensor(lambda tensor: tensor[:1]), "wrong_shape", "has shape"),
        (with_first_tensor(lambda tensor: tensor.double()), "malformed_reply", "as F64, expected F32 or U8"),
        (without_first, "missing_tensor", "1 tensor(s) are missing"),
        (with_another, "unknown_tensor", "first unknown.weight"),
        (with_header(plan_digest="0" * 64), "wrong_plan_digest", "the reply answers plan_digest='000"),
        (with_header(base_digest="0" * 64), "wrong_base_digest", "the reply answers base_digest='000"),
        (with_header(adapter_digest="0" * 64), "wrong_adapter_digest", "the reply answers adapter_digest='000"),
        (with_header(round=7), "wrong_round", "the reply answers round=7, asked was"),
        (with_header(site="eastfield"), "wrong_site", "the reply answers site='eastfield', asked was 'harbor'"),
        (with_header(metrics={"training_loss": 1e300}), "wrong_metric", "states training_loss=1e+300, above 1e+09"),
        (with_header(privacy=stating(steps=2.5)), "malformed_reply", "steps=2.5, expected a whole number"),
        (with_header(privacy=stating(steps=10**30)), "malformed_reply", "steps=1000000000000000000000000000000,"),
        (
            with_header(status="refused", code="not_today", reason="the ward is closed"),
            "not_today",
            "the ward is closed",
        ),
        (crash, "site_error", "the site could not do it; its own log says why"),
    ],
)
def test_a_bad_reply_is_named_and_the_round_goes_on(
    tamper: Tamper, code: str, reason: str, tmp_path: Path, without_the_liar: str
) -> None:
    summary = run(tmp_path / "run", tamper=tamper)

    assert_rejected(summary, code, reason)
    assert summary["adapter"]["digest"] == without_the_liar


def forged(array: Array, **changes: object) -> Array:
    """Return the packed tensors with another entry for the first of them; the header's length stays right."""
    size = int.from_bytes(array.data[:8], "little")
    header = json.loads(array.data[8 : 8 + size])
    header[sorted(header)[0]] |= changes
    written = json.dumps(header).encode()
    return packed(array, len(written).to_bytes(8, "little") + written + array.data[8 + size :])


def packed(array: Array, data: bytes) -> Array:
    return Array(array.dtype, (len(data),), array.stype, data)


def change_array(change: Callable[[Array], Array]) -> TamperMessage:
    def tamper(message: Message) -> None:
        (arrays,) = message.content.array_records.values()
        arrays["safetensors"] = change(arrays["safetensors"])

    return tamper


def drop_header(message: Message) -> None:
    message.content.config_records["cloister"]["json"] = "{}"


@pytest.mark.parametrize(
    ("tamper", "reason"),
    [
        (change_array(lambda array: forged(array, shape=[1_000_000, 1_000_000])), "header cannot be read"),
        (change_array(lambda array: forged(array, dtype="O")), "header cannot be read"),
        (change_array(lambda array: forged(array, dtype="I32")), "expected F32 or U8"),
        (change_array(lambda array: Array(array.dtype, (10**12,), array.stype, array.data)), "are declared as uint8"),
        (
            change_array(lambda array: Array(array.dtype, array.shape, "pickle", array.data)),
            "are serialized as 'pickle'",
        ),
        (change_array(lambda array: packed(array, array.data[:-4])), "header cannot be read"),
        (change_array(lambda array: packed(array, b"\x80\x04.")), "header cannot be read"),
        (change_array(lambda array: Array(np.zeros(array.shape, dtype=bool))), "expected 'safetensors'"),
        (drop_header, "the reply cannot be read"),
    ],
)
def test_a_forged_payload_is_named_and_the_round_goes_on(
    tamper: TamperMessage, reason: str, tmp_path: Path, without_the_liar: str
) -> None:
    summary = run(tmp_path / "run", message=tamper)

    assert_rejected(summary, "malformed_reply", reason)
    assert summary["adapter"]["digest"] == without_the_liar


def assert_rejected(summary: dict[str, Any], code: str, reason: str) -> None:
    assert summary["status"] == "finished"
    assert len(summary["rounds"]) == 2
    for item in summary["rounds"]:
        assert item["accepted"] == [site for site in SITES if site != LIAR]
        (rejected,) = item["rejected"]
        assert rejected["site"] == LIAR
        assert rejected["code"] == code
        assert reason in rejected["reason"]
    assert summary["sites"][LIAR]["accepted"] == 0
    assert summary["sites"][LIAR]["rejected"] == 2


def test_an_exceptions_text_stays_at_the_site(tmp_path: Path) -> None:
    run(tmp_path / "run", tamper=crash)

    written = [path for path in (tmp_path / "run").glob("*") if path.is_file()]
    assert written
    assert not any(b"record 17" in path.read_bytes() for path in written)


def test_too_few_valid_replies_end_the_run_clearly(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with pytest.raises(FederationError, match=r"round 1 has 3 valid replies and 1 others, federation.min_replies=4"):
        run(path, "federation.min_replies=4", tamper=without_first)

    summary = summary_of(path)
    assert summary["status"] == "failed"
    assert summary["error"].startswith("FederationError: round 1 has 3 valid replies")
    assert summary["rounds"][0]["rejected"][0]["code"] == "missing_tensor"
    assert not (path / "adapter").exists()
    assert not list(path.glob("checkpoints/*"))
