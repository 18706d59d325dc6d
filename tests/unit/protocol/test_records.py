"""Instructions and replies as real Flower records, and records that lie."""

import json
import math
import pickle
import tracemalloc
from collections import OrderedDict

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.compose import compose_experiment
from protocol.cards import SiteCard
from protocol.errors import ReplyRejected, SiteRefusal
from protocol.instructions import Instruction, InstructionHeader, Reply, ReplyHeader, client_plan
from protocol.records import (
    card_to_record,
    challenge_to_record,
    instruction_to_record,
    instructions_to_records,
    payload_bytes,
    record_to_card,
    record_to_challenge,
    record_to_instruction,
    record_to_reply,
    reply_to_record,
)

HEADER = ReplyHeader(status="trained", site="harbor", round=1, plan_digest="p")
TENSORS = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.tensor(7.0), "c": torch.zeros(0, 4)}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        torch.equal(left[name], right[name]) and left[name].dtype == right[name].dtype for name in right
    )


def test_a_reply_survives() -> None:
    back = record_to_reply(reply_to_record(Reply(HEADER, TENSORS)))
    assert back.header == HEADER
    assert same(dict(back.tensors), TENSORS)


def test_an_instruction_survives() -> None:
    plan = client_plan(compose_experiment(["experiment=smoke"]), "run-1")
    header = InstructionHeader(round=1, plan=plan, plan_digest=plan.digest, base_digest="b", adapter_digest="a")
    back = record_to_instruction(instruction_to_record(Instruction(header, TENSORS)))
    assert back.header == header
    assert same(dict(back.tensors), TENSORS)


def test_a_card_survives() -> None:
    card = SiteCard(cloister_version="1", site="harbor", published_records=5)
    assert record_to_card(card_to_record(card)) == card
    bad = RecordDict({"cloister": ConfigRecord({"json": '{"site": 1}'}), "tensors": ArrayRecord(OrderedDict())})
    with pytest.raises(ReplyRejected, match="a site's card cannot be read") as rejected:
        record_to_card(bad)
    assert rejected.value.code == "malformed_card"


@pytest.mark.parametrize("challenge", [None, "", "0" * 62, "0" * 66, "0" * 64 + "\n", "A" * 64, b"0" * 64])
def test_a_card_is_asked_for_with_a_challenge(challenge: bytes | str | None) -> None:
    assert record_to_challenge(challenge_to_record(b"x" * 32)) == b"x" * 32
    config = ConfigRecord({} if challenge is None else {"challenge": challenge})
    with pytest.raises(SiteRefusal, match="a card is asked for with a challenge of 32 bytes in hex"):
        record_to_challenge(RecordDict({"cloister": config}))
    with pytest.raises(SiteRefusal):
        record_to_challenge(RecordDict())


def test_layouts_of_memory_do_not_matter() -> None:
    tensors = {"t": torch.arange(6.0).reshape(2, 3).T, "s": torch.arange(10.0)[::2]}
    assert same(dict(record_to_reply(reply_to_record(Reply(HEADER, tensors))).tensors), tensors)


def test_a_message_is_one_array_however_many_tensors_it_has() -> None:
    many = {f"layer.{i}": torch.full((2,), float(i)) for i in range(56)}
    sent = reply_to_record(Reply(HEADER, many))
    assert [list(arrays) for arrays in sent.array_records.values()] == [["safetensors"]]
    assert same(dict(record_to_reply(sent).tensors), many)
    assert [list(arrays) for arrays in reply_to_record(Reply(HEADER, {})).array_records.values()] == [[]]


def test_the_bytes_on_the_wire_are_counted() -> None:
    sent = reply_to_record(Reply(HEADER, {"a": torch.ones(1000)}))
    # Eight bytes of length, then {"a":{"dtype":"F32","shape":[1000],"data_offsets":[0,4000]}} filled up to 64.
    assert payload_bytes(sent) == 4000 + 8 + 64 + len(HEADER.model_dump_json())


def packed(entries: object, payload: bytes = bytes(16)) -> bytes:
    """Return a safetensors file whose header may say anything."""
    header = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return len(header).to_bytes(8, "little") + header + payload


def entry(*shape: int, dtype: str = "F32", start: int = 0, end: int = 16) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def record(
    data: bytes,
    *,
    dtype: str = "uint8",
    shape: tuple[int, ...] | None = None,
    stype: str = "safetensors",
    names: tuple[str, ...] = ("safetensors",),
) -> RecordDict:
    array = Array(dtype=dtype, shape=(len(data),) if shape is None else shape, stype=stype, data=data)
    return RecordDict(
        {
            "cloister": ConfigRecord({"json": HEADER.model_dump_json()}),
            "tensors": ArrayRecord(OrderedDict((name, array) for name in names)),
        }
    )


HONEST = packed({"x": entry(4)})
PETA = 2**50


def test_the_forger_can_be_honest() -> None:
    """The control: what is forged below is otherwise accepted."""
    assert torch.equal(record_to_reply(record(HONEST)).tensors["x"], torch.zeros(4))


@pytest.mark.parametrize(
    "forged",
    [
        pytest.param(record(packed({"x": entry(PETA)})), id="shape claims petabytes"),
        pytest.param(record(packed({"x": entry(PETA, end=4 * PETA)})), id="shape and offsets claim petabytes"),
        pytest.param(record(packed({"x": entry(2**62, 2**62)})), id="shape whose product overflows"),
        pytest.param(record(packed({"x": entry(4, end=2**64)})), id="offset above what a machine counts"),
        pytest.param(record(HONEST, shape=(PETA,)), id="declaration claims petabytes"),
        pytest.param(record(HONEST, shape=(4,)), id="another shape declared"),
        pytest.param(record(HONEST, dtype="float32"), id="another dtype declared"),
        pytest.param(record(HONEST, stype="numpy.ndarray"), id="another serialization"),
        pytest.param(record(HONEST, names=("x",)), id="another name"),
        pytest.param(record(HONEST, names=("safetensors", "x")), id="two arrays"),
        pytest.param(record(HONEST[:-1]), id="a byte short"),
        pytest.param(record(HONEST + b"\0"), id="a byte long"),
        pytest.param(record(HONEST[:20]), id="half a header"),
        pytest.param(record(b""), id="nothing"),
        pytest.param(record(b"\xff" * 8), id="a header of exabytes"),
        pytest.param(record(bytes(8)), id="a header of no bytes"),
        pytest.param(record(packed(b"\xff\xfe" * 30)), id="header that is no text"),
        pytest.param(record(packed(b"[" * 100_000)), id="header that nests"),
        pytest.param(record(packed(b'{"x": ')), id="header that does not end"),
        pytest.param(record(packed({"x": entry(4, dtype="O")})), id="objects"),
        pytest.param(record(packed({"x": entry(4, dtype="F32"), "y": entry(4)})), id="two tensors on the same bytes"),
        pytest.param(record(packed({"x": entry(2, start=8)})), id="bytes of no tensor before"),
        pytest.param(record(packed({"x": entry(2, end=8)})), id="bytes of no tensor after"),
        pytest.param(record(packed({"x": entry(4, start=16, end=0)})), id="offsets that go backward"),
        pytest.param(record(packed({"x": entry(-2, -2)})), id="negative shape"),
        pytest.param(record(packed({"x": entry(2, dtype="F64")})), id="double precision"),
        pytest.param(record(packed({"x": entry(2, dtype="C64")})), id="complex numbers"),
        pytest.param(record(packed({"x": entry(0, 2**62, end=0)}, b"")), id="endless, and empty"),
        pytest.param(record(packed({"x": entry(0, 2**64 - 1, end=0)}, b"")), id="beyond endless, and empty"),
        pytest.param(record(packed({"x": entry(*(1,) * 100, end=4)}, bytes(4))), id="a hundred dimensions"),
        pytest.param(record(pickle.dumps({"a": 1})), id="a pickle"),
    ],
)
def test_forged_tensors_are_rejected_before_anything_is_allocated(forged: RecordDict) -> None:
    """An exception of any other type would end the server's round instead of one site's reply."""
    tracemalloc.start()
    try:
        with pytest.raises(ReplyRejected, match=r"^the (tensors|message)") as rejected:
            record_to_reply(forged)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert rejected.value.code == "malformed_reply"
    assert peak < 1_000_000
    assert len(str(rejected.value)) < 400
    with pytest.raises(SiteRefusal) as refused:
        record_to_instruction(forged)
    assert refused.value.code == "malformed_instruction"


def test_too_many_tensors_are_rejected_before_they_are_read() -> None:
    many = packed({f"layer.{i}": entry(0, end=0) for i in range(100_000)}, b"")
    with pytest.raises(ReplyRejected, match=r"header is said to have \d+ bytes, above 4194304"):
        record_to_reply(record(many))


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=200), st.lists(st.integers(-3, 9), max_size=3))
def test_random_bytes_are_rejected(data: bytes, shape: list[int]) -> None:
    count = 4 * math.prod(shape)
    for payload in (data, packed(data), packed({"x": entry(*shape, end=len(data))}, data)):
        try:
            reply = record_to_reply(record(payload))
        except ReplyRejected:
            continue
        assert sum(tensor.nbytes for tensor in reply.tensors.values()) == (count if reply.tensors else 0)


@given(
    st.dictionaries(
        st.text(max_size=20).filter(lambda name: name != "__metadata__"),
        st.lists(st.integers(0, 4), max_size=4),
        max_size=5,
    ),
    st.sampled_from([torch.float32, torch.uint8]),
)
def test_any_names_and_shapes_survive(shapes: dict[str, list[int]], dtype: torch.dtype) -> None:
    tensors = {name: torch.arange(math.prod(shape)).reshape(shape).to(dtype) for name, shape in shapes.items()}
    assert same(dict(record_to_reply(reply_to_record(Reply(HEADER, tensors))).tensors), tensors)


@pytest.mark.parametrize(
    "broken",
    [
        RecordDict({}),
        RecordDict({"cloister": ConfigRecord({"json": 5}), "tensors": ArrayRecord(OrderedDict())}),
        RecordDict({"cloister": ConfigRecord({"json": HEADER.model_dump_json()})}),
        RecordDict({"cloister": ConfigRecord({"json": "{"}), "tensors": ArrayRecord(OrderedDict())}),
    ],
)
def test_a_message_without_its_parts_is_rejected(broken: RecordDict) -> None:
    with pytest.raises(ReplyRejected) as rejected:
        record_to_reply(broken)
    assert rejected.value.code == "malformed_reply"


def test_records_of_the_same_tensors_share_their_arrays_whatever_their_headers_say() -> None:
    plan = client_plan(compose_experiment(), "r")
    header = InstructionHeader(round=1, plan=plan, plan_digest=plan.digest, base_digest="b", adapter_digest="a")
    asked = Instruction(header, {"x": torch.ones(2)})
    other = Instruction(header.model_copy(update={"ledger_heads": {"records": "a" * 64}}), asked.tensors)
    records = instructions_to_records({"north": asked, "south": other})
    north, south = (records[site].array_records["tensors"] for site in ("north", "south"))
    assert north is south
    assert record_to_instruction(records["north"]).header == asked.header
    assert record_to_instruction(records["south"]).header.ledger_heads == {"records": "a" * 64}
