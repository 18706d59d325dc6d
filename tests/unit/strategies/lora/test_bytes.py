"""Bytes on the wire, measured on serialized records, against the table of docs/strategies.md.

RoBERTa-base: q and v of 12 layers, m = n = 768, rank 8, ten sites, float32, no head. MB are 10⁶ bytes.
"""

import pytest
import torch

from conf.schema import strategy as schema
from conf.schema.federation import LocalTraining
from protocol.instructions import Reply, ReplyHeader
from protocol.records import payload_bytes, reply_to_record
from protocol.tensors import NamedTensors, add
from strategies.base import Contribution, LocalStart, Strategy
from strategies.build import build_strategy

MODULES = [
    f"base_model.model.roberta.encoder.layer.{i}.attention.self.{p}" for i in range(12) for p in ("query", "value")
]
HEADER = ReplyHeader(status="trained", site="site", round=1, plan_digest="")


def adapter(rank: int, heads: int = 0) -> NamedTensors:
    generator, tensors = torch.Generator().manual_seed(0), dict[str, torch.Tensor]()
    for module in MODULES:
        tensors[f"{module}.lora_A.weight"] = torch.randn(rank, 768, generator=generator)
        tensors[f"{module}.lora_B.weight"] = torch.randn(768, rank, generator=generator)
        if heads:
            tensors[f"{module}.lora_core"] = torch.randn(heads, rank // heads, rank // heads, generator=generator)
            tensors[f"{module}.lora_core_scale"] = torch.ones(heads)
    return tensors


def megabytes(tensors: NamedTensors) -> float:
    """The serialized size, without the entry of each tensor in the header, which shows beside tensors of 4 kB."""
    record = reply_to_record(Reply(HEADER, tensors))
    entries = int.from_bytes(record.array_records["tensors"]["safetensors"].data[:8], "little")
    assert entries < 200 * len(tensors)
    return (payload_bytes(record) - entries) / 1e6


def upload(strategy: Strategy, start: NamedTensors) -> NamedTensors:
    # No zeros, which would travel for a bit each: a site's changes have none.
    return {name: torch.ones_like(start[name]) for name in strategy.uploaded(frozenset(start), 1)}


def download(strategy: Strategy, start: NamedTensors, round_number: int = 1) -> NamedTensors:
    names = strategy.downloaded(frozenset(name for name in start if "offset" not in name), round_number)
    return strategy.server.download(start, strategy.server.init(start), names, None)


@pytest.mark.parametrize(
    ("config", "rank", "up", "down"),
    [
        (schema.FedIT(), 8, 1.180, 1.180),
        (schema.FlexLoRA(), 8, 1.180, 1.180),
        (schema.HetLoRA(), 8, 1.180, 1.180),
        (schema.FedRot(), 8, 1.180, 1.180),
        (schema.FFALoRA(), 8, 0.590, 0.590),
        (schema.RoLoRA(), 8, 0.590, 1.180),
        (schema.FedSVD(), 8, 0.590, 1.180),
        (schema.FedSALoRA(), 8, 0.590, 0.590),
        (schema.FedSB(), 64, 0.393, 0.393),
        (schema.Ravan(heads=4), 128, 0.393, 0.393),
        (schema.FedSB(), 32, 0.098, 0.098),
    ],
    ids=lambda value: getattr(value, "kind", str(value)),
)
def test_what_travels(config: schema.Strategy, rank: int, up: float, down: float) -> None:
    strategy, start = build_strategy(config), adapter(rank, config.cores)
    assert megabytes(upload(strategy, start)) == pytest.approx(up, rel=0.02)
    assert megabytes(download(strategy, start)) == pytest.approx(down, rel=0.02)


def test_flasc_sends_a_bit_per_entry_and_what_is_kept() -> None:
    """At a density of 0.1: 294,912 entries / 8 + 29,492 values of 4 bytes, both ways."""
    strategy, start = build_strategy(schema.FLASC(download_density=0.1, upload_density=0.1)), adapter(8)
    names = frozenset(start)
    given = LocalStart(start, {}, {}, names, names, LocalTraining(), 1.0)
    update = strategy.client.begin(given).finish(add(start, adapter(8))).update
    expected = (294_912 / 8 + 29_492 * 4) / 1e6
    assert megabytes(update) == pytest.approx(expected, rel=0.02)
    assert megabytes(download(strategy, start)) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("config", [schema.FLoRA(), schema.FedEx()], ids=["flora", "fedex"])
def test_what_is_folded_comes_down_to_all(config: schema.Strategy) -> None:
    """11.8 MB after a round of ten sites: K r (m + n) for FLoRA, ((K-1) r + r)(m + n) for FedEx."""
    strategy = build_strategy(config)
    start = strategy.initial(adapter(8))
    state = strategy.server.init(start)
    aggregator = strategy.server.aggregator(start, state)
    for site in range(10):
        generator = torch.Generator().manual_seed(site)
        update = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in start.items()}
        aggregator.accumulate(Contribution(update, 1.0))
    after, _ = strategy.server.step(start, aggregator.result(), state)
    assert megabytes(upload(strategy, start)) == pytest.approx(1.180, rel=0.02)
    assert megabytes(download(strategy, after)) == pytest.approx(11.8, rel=0.02)
