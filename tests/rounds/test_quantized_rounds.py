"""A federation in each codec: near the one in float32, by the error that the codec states, in the bytes it states."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from client.app import client_app
from client.site import Site
from conf.compose import InvalidConfiguration, compose_experiment
from conf.schema.rules import warnings_for
from finetuning.checkpoints import load_tensors, save_tensors
from privacy.client_level import update_norm
from privacy.client_release import ClippedSum
from protocol.codecs.base import ENCODED, WireContext, value_count
from protocol.codecs.build import build_codec
from protocol.instructions import Instruction, Reply
from protocol.tensors import corner, layout_of
from server.app import Launch, serve
from simulations.in_process import InProcessGrid
from simulations.population import Population, build_population

SITES = ("harbor", "northgate")
OVERRIDES = (
    "experiment=smoke",
    "privacy=none",
    "data.partition.sites=[harbor,northgate]",
    "data.max_records=40",
    "data.max_length=64",
    "federation.local.expected_batch_size=8",  # an empty draw, whose update is zero, is as good as impossible
    "federation.min_replies=1",
    "evaluation.every=0",
    "runtime.threads=1",
)
# Which records are drawn depends on the plan, so on its codec: rounds in two codecs agree when all are drawn.
EVERY_RECORD = ("data.partition={kind:iid,sites:2}", "federation.local.expected_batch_size=18")
Tamper = Callable[[Instruction, Reply], Reply]


@cache
def population(*overrides: str) -> Population:
    return build_population(compose_experiment((*OVERRIDES, *overrides)))


class Watched:
    """A real site that shows what it was asked, and whose replies may be tampered with."""

    def __init__(self, site: Site, tamper: Tamper | None) -> None:
        self.site, self.tamper = site, tamper
        self.asked: list[Instruction] = []

    @property
    def file(self) -> Any:
        return self.site.file

    def card(self, challenge: bytes = b"") -> Any:
        return self.site.card(challenge)

    def handle(self, instruction: Instruction) -> Reply:
        self.asked.append(instruction)
        reply = self.site.handle(instruction)
        return reply if self.tamper is None else self.tamper(instruction, reply)


class Run:
    """One run, and what is left of it."""

    def __init__(self, path: Path, *overrides: str, tamper: Tamper | None = None) -> None:
        experiment = compose_experiment((*OVERRIDES, *overrides))
        real = population(*EVERY_RECORD[: EVERY_RECORD[0] in overrides]).sites(experiment, path / "sites")
        self.sites = {name: Watched(site, tamper if name == SITES[0] else None) for name, site in real.items()}
        nodes: list[Any] = list(self.sites.values())
        app = client_app(lambda context: nodes[int(context.node_config["partition-id"])])
        grid: Any = InProcessGrid(app, [{"partition-id": position} for position in range(len(nodes))])
        serve(grid, Launch(experiment, path / "run", heldout=(), expected_sites=len(nodes)))
        self.summary: dict[str, Any] = json.loads((path / "run" / "summary.json").read_text())
        newest = sorted((path / "run" / "checkpoints").glob("*.safetensors"))[-1]
        self.final = {name.removeprefix("adapter/"): tensor for name, tensor in load_tensors(newest)[0].items()}
        lines = (path / "run" / "metrics.jsonl").read_text().splitlines()
        self.events: list[dict[str, Any]] = [json.loads(line) for line in lines]


def one_round(path: Path, *overrides: str) -> tuple[torch.Tensor, float]:
    """Return the change that one round makes, and the bytes that a site sent."""
    run = Run(path, "federation.rounds=1", *EVERY_RECORD, *overrides)
    start = next(iter(run.sites.values())).asked[0].tensors
    final = run.final
    change = torch.cat([(final[name] - start[name]).flatten() for name in sorted(start)])
    up = max(event["bytes_up"] for event in run.events if "bytes_up" in event)
    return change.double(), up


@pytest.fixture(scope="module")
def in_float32(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.Tensor, float]:
    return one_round(tmp_path_factory.mktemp("float32"))


@pytest.mark.parametrize(
    ("quantization", "bits", "error"),
    [
        # The squared error of the mean of two sites is half of one site's where the codec is unbiased (table D1).
        pytest.param(("eden",), 4, math.sqrt(0.00959 / 2), id="eden"),
        pytest.param(("eden", "quantization.bits=1"), 1, math.sqrt(0.571 / 2), id="eden at 1 bit"),
        pytest.param(("uniform_entropy",), 4, math.sqrt(0.00559 / 2), id="uniform_entropy"),
        pytest.param(("bf16",), 16, 2**-9, id="bf16"),
        pytest.param(("fp16",), 16, 2**-12, id="fp16"),
        pytest.param(("int8",), 8.25, 0.03, id="int8"),
        pytest.param(("int4",), 4.25, 0.5, id="int4"),
        pytest.param(("nf4",), 4.5, 0.2, id="nf4"),
        pytest.param(("signsgd",), 1.03, 0.9, id="signsgd"),
        pytest.param(("topk", "quantization.fraction=0.2"), 9.6, 0.8, id="topk"),
        pytest.param(("lattice", "quantization.norm_bound=10"), 16, 0.2, id="lattice"),
    ],
)
def test_a_round_is_near_the_one_in_float32(
    quantization: tuple[str, ...], bits: float, error: float, in_float32: tuple[torch.Tensor, float], tmp_path: Path
) -> None:
    group, *rest = quantization
    change, sent = one_round(tmp_path, f"quantization={group}", *rest)
    exact, sent_exact = in_float32
    # Two sites' updates may point apart, and the error is relative to each of them: a factor of 2 covers that.
    assert float((change - exact).norm() / exact.norm()) <= 2 * error
    assert not torch.equal(change, exact)
    # Beside the update a reply has a JSON header, about 400 bytes, and a header with an entry per tensor.
    assert sent <= bits / 8 * exact.numel() * 1.05 + 1500
    assert sent < sent_exact


def test_changes_go_down_to_sites_that_hold_the_last_adapter(tmp_path: Path) -> None:
    """From the second round on; every site and the server start from one decoded adapter, bit by bit."""
    run = Run(tmp_path, "quantization=eden", "quantization.downlink=same", "federation.rounds=3")
    for watched in run.sites.values():
        first, *later = watched.asked
        assert first.header.reference_digest is None
        assert [set(instruction.tensors) for instruction in later] == [{ENCODED}] * 2
    digests = [{each.asked[number].header.adapter_digest for each in run.sites.values()} for number in range(3)]
    assert [len(each) for each in digests] == [1, 1, 1]
    assert all(event["accepted"] for event in run.events if "bytes_up" in event)
    down = [event["bytes_down"] for event in run.events if "bytes_down" in event]
    values = sum(tensor.numel() for tensor in run.sites["harbor"].asked[0].tensors.values())
    # The first download is B = 0, which takes a bit per value and an entry of the header per tensor, about 100 bytes; a
    # change takes four bits, and is one tensor.
    entries = 100 * len(run.sites["harbor"].asked[0].tensors)
    assert down[-1] - down[0] == pytest.approx(values * 3 / 8 - entries, rel=0.15)


@pytest.mark.parametrize(
    ("strategy", "ranks"), [("ffa_lora", "[8,4]"), ("fedsb", "[8,4]"), ("ravan", "[8,2]"), ("ffa_lora", "[8,1]")]
)
def test_changes_go_down_to_sites_of_lower_ranks(strategy: str, ranks: str, tmp_path: Path) -> None:
    """They cut what all are sent, and start from the cut of the one adapter; where 4 bits of the whole are more than
    32 of the cut, the cut is sent."""
    chosen = (f"strategy={strategy}", f"federation.site_ranks={ranks}", "peft.rank=8")
    run = Run(tmp_path, "quantization=eden", "quantization.downlink=same", "federation.rounds=3", *chosen)
    assert all(event["accepted"] for event in run.events if "bytes_up" in event)
    strong, weak = ([set(each.tensors) == {ENCODED} for each in site.asked] for site in run.sites.values())
    assert strong == [False, True, True]
    assert weak == ([False] * 3 if ranks == "[8,1]" else strong)
    held = [
        load_tensors(next((tmp_path / "sites" / name).glob("**/references/*/000003.safetensors")))[0] for name in SITES
    ]
    assert all(torch.equal(corner(held[0][name], part.shape), part) for name, part in held[1].items())
    assert held[0].keys() == held[1].keys()


def forgetful(instruction: Instruction, reply: Reply) -> Reply:
    """Answer the second round as if another adapter had been received."""
    if instruction.header.round != 2:
        return reply
    return replace(reply, header=reply.header.model_copy(update={"adapter_digest": "0" * 64}))


def test_who_is_not_known_to_hold_an_adapter_gets_all_of_it(tmp_path: Path) -> None:
    run = Run(tmp_path, "quantization=topk", "quantization.downlink=same", "federation.rounds=4", tamper=forgetful)
    sent = {name: [set(each.tensors) == {ENCODED} for each in watched.asked] for name, watched in run.sites.items()}
    assert sent[SITES[0]] == [False, True, False, True]
    assert sent[SITES[1]] == [False, True, True, True]


def test_a_site_that_lost_what_it_received_says_so(tmp_path: Path) -> None:
    run = Run(tmp_path, "quantization=eden", "quantization.downlink=same", "federation.rounds=2")
    site = run.sites["harbor"]
    change = site.asked[1]
    header = change.header.model_copy(update={"reference_digest": "0" * 64})
    reply = site.site.handle(replace(change, header=header))
    assert (reply.header.status, reply.header.code) == ("refused", "unknown_reference")
    damaged = change.tensors[ENCODED].clone()
    damaged[0] = 0
    reply = site.site.handle(replace(change, tensors={ENCODED: damaged}))
    assert (reply.header.status, reply.header.code) == ("refused", "malformed_payload")
    changed = change.tensors[ENCODED].clone()
    changed[-1] ^= 0xFF
    reply = site.site.handle(replace(change, tensors={ENCODED: changed}))
    assert (reply.header.status, reply.header.code) == ("refused", "adapter_digest")


def test_what_a_codec_left_out_is_part_of_the_next_update(tmp_path: Path) -> None:
    """The same instruction twice gives the same bits, and a residual is kept for each round."""
    run = Run(tmp_path, "quantization=topk", "federation.rounds=2")
    site = run.sites["harbor"]
    (folder,) = (tmp_path / "sites" / "harbor").glob("**/left_out/*")
    assert sorted(path.name for path in folder.iterdir()) == ["000001.safetensors", "000002.safetensors"]
    again, once_more = (site.site.handle(site.asked[1]) for _ in range(2))
    assert torch.equal(again.tensors[ENCODED], once_more.tensors[ENCODED])


def cut_short(instruction: Instruction, reply: Reply) -> Reply:
    return replace(reply, tensors={ENCODED: reply.tensors[ENCODED][:-1]})


def test_a_reply_that_does_not_decode_is_one_rejected_reply(tmp_path: Path) -> None:
    run = Run(tmp_path, "quantization=eden", "federation.rounds=1", tamper=cut_short)
    outcomes = {event["site"]: event["code"] for event in run.events if "bytes_up" in event}
    assert outcomes == {SITES[0]: "malformed_payload", SITES[1]: ""}


def enormous(instruction: Instruction, reply: Reply) -> Reply:
    """Answer with values that every check of the payload passes, and that nothing after it can take."""
    header = instruction.header
    codec = build_codec(header.plan.quantization)
    context = WireContext(header.plan.run, header.round, reply.header.site, "up")
    encoded = codec.encode(
        {name: torch.full_like(tensor, 1e29) for name, tensor in instruction.tensors.items() if "lora_B" in name},
        context,
        context.rounding(),
    )
    return replace(reply, tensors=encoded) if header.round == 1 else reply


def test_values_that_no_training_gives_end_no_run(tmp_path: Path) -> None:
    """Else they would be in the adapter, and the next change of it could not be encoded."""
    overrides = ("quantization=eden", "quantization.downlink=same", "federation.rounds=3")
    run = Run(tmp_path, *overrides, tamper=enormous)
    outcomes = [(event["round"], event["code"]) for event in run.events if event.get("site") == SITES[0]]
    assert outcomes == [(1, "not_finite"), (2, ""), (3, "")]


@pytest.mark.parametrize(
    "quantization",
    [
        ("eden", "quantization.bits=1"),
        ("topk", "quantization.error_feedback=true"),
        ("lattice", "quantization.norm_bound=0.01"),
        ("int4",),
    ],
    ids=lambda given: given[0],
)
def test_a_decoded_update_stays_within_the_sensitivity(quantization: tuple[str, ...], tmp_path: Path) -> None:
    """Client-level: whatever the codec adds to a norm is taken off before the sum that the noise is made for."""
    group, *rest = quantization
    clip_norm = 0.01
    private = (f"privacy.clip_norm={clip_norm}", "privacy.target_epsilon=null", "privacy.noise_multiplier=0.5")
    overrides = ("privacy=client_level", *private, "privacy.delta=0.1", f"quantization={group}", *rest)
    run = Run(tmp_path, "federation.rounds=2", *overrides)
    assert all(event["accepted"] for event in run.events if "bytes_up" in event)
    codec = build_codec(compose_experiment((*OVERRIDES, *overrides)).quantization)
    inflated = False
    for name, watched in run.sites.items():
        for asked in watched.asked:
            encoded = watched.site.handle(asked).tensors
            layout = layout_of(asked.tensors)
            context = WireContext(asked.header.plan.run, asked.header.round, name, "up")
            decoded = codec.decode(encoded, layout, context)
            inflated = inflated or update_norm(decoded) > clip_norm * 1.01
            assert update_norm(decoded) <= clip_norm * codec.norm_inflation(value_count(layout)) * (1 + 1e-5)
            total = ClippedSum(layout, clip_norm, 1.0)
            total.accumulate(decoded, 1.0)
            assert update_norm(total.parts) <= clip_norm * (1 + 1e-9)
    assert inflated == (group in ("eden", "int4")), "the test must meet a norm that grows, where norms grow"


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["quantization=lattice", "quantization.bits=4"], "quantization.max_summands=64 is above 7"),
        (
            ["quantization=lattice", "quantization.max_summands=3"],
            "quantization.max_summands=3 is below the cohort of 4",
        ),
        (
            ["quantization=lattice", "privacy=client_level", "quantization.norm_bound=3"],
            r"quantization.norm_bound=3\.0 is not privacy.clip_norm=",
        ),
        (
            ["quantization=topk", "quantization.downlink=same", "strategy=fedsvd"],
            "needs a strategy that sums updates of the same values in every round, not fedsvd",
        ),
        (["quantization=eden", "quantization.bits=9"], "less than or equal to 8"),
        (["quantization=eden", "quantization.bits=0.4"], "greater than or equal to 0.5"),
    ],
)
def test_what_cannot_work_is_refused(overrides: list[str], complaint: str) -> None:
    with pytest.raises(InvalidConfiguration, match=complaint):
        compose_experiment(["data.partition={kind:iid,sites:4}", *overrides])


def test_errors_that_nothing_feeds_back_are_warned_of() -> None:
    for overrides in (["quantization=nf4"], ["quantization=topk", "quantization.error_feedback=false"]):
        assert any(
            "is biased, and nothing feeds its errors back" in each
            for each in warnings_for(compose_experiment(overrides))
        )
    assert not any("biased" in each for each in warnings_for(compose_experiment(["quantization=topk"])))


def test_a_clip_norm_that_only_the_lattice_has_is_warned_of() -> None:
    def warned(*overrides: str) -> bool:
        return any("quantization.norm_bound=1.0" in each for each in warnings_for(compose_experiment(overrides)))

    assert warned("quantization=lattice")
    assert not warned("quantization=eden")


def test_what_a_factor_left_out_waits_until_the_factor_is_trained_again(tmp_path: Path) -> None:
    """RoLoRA trains B in odd rounds and A in even ones: the memory of round 3 starts from B's residual of round 1."""
    run = Run(tmp_path, "quantization=topk", "strategy=rolora", "federation.rounds=3")
    folder = next((tmp_path / "sites" / "harbor").glob("**/left_out/*"))
    first, second, third = (load_tensors(folder / f"{number:06d}.safetensors")[0] for number in (1, 2, 3))
    assert first
    assert all("lora_B" in name for name in first)
    assert second.keys() == third.keys() > first.keys()
    assert all(torch.equal(second[name], first[name]) for name in first)
    assert not any(torch.equal(third[name], second[name]) for name in first)
    site = run.sites["harbor"]
    kept = site.site.handle(site.asked[2]).tensors[ENCODED]
    save_tensors(folder / "000002.safetensors", {name: second[name] for name in second.keys() - first.keys()})
    assert not torch.equal(site.site.handle(site.asked[2]).tensors[ENCODED], kept)
