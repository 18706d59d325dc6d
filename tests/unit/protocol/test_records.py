"""Instructions and replies as real Flower records, and records that lie."""

import io
import math
import tracemalloc
from collections import OrderedDict

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.compose import compose_experiment
from protocol.errors import ReplyRejected, SiteRefusal
from protocol.instructions import Instruction, InstructionHeader, Reply, ReplyHeader, SiteCard, client_plan
from protocol.records import (
    card_to_record,
    instruction_to_record,
    payload_bytes,
    record_to_card,
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


def test_layouts_of_memory_do_not_matter() -> None:
    tensors = {"t": torch.arange(6.0).reshape(2, 3).T, "s": torch.arange(10.0)[::2]}
    assert same(dict(record_to_reply(reply_to_record(Reply(HEADER, tensors))).tensors), tensors)


def test_the_bytes_on_the_wire_are_counted() -> None:
    record = reply_to_record(Reply(HEADER, {"a": torch.ones(1000)}))
    assert payload_bytes(record) == 4000 + 128 + len(HEADER.model_dump_json())


def npy(array: np.ndarray, **forged: object) -> bytes:
    """Return an npy file whose header may say something else."""
    stream = io.BytesIO()
    fields = {"descr": array.dtype.str, "fortran_order": False, "shape": array.shape, **forged}
    np.lib.format.write_array_header_1_0(stream, fields)  # type: ignore[arg-type]
    return stream.getvalue() + array.tobytes()


def record(data: bytes, shape: tuple[int, ...], dtype: str = "float32", stype: str = "numpy.ndarray") -> RecordDict:
    array = Array(dtype=dtype, shape=shape, stype=stype, data=data)
    return RecordDict(
        {
            "cloister": ConfigRecord({"json": HEADER.model_dump_json()}),
            "tensors": ArrayRecord(OrderedDict({"x": array})),
        }
    )


FOUR = np.arange(4, dtype=np.float32)
HUGE = (2**40, 2**10)


def test_the_forger_can_be_honest() -> None:
    """The control: what is forged below is otherwise accepted."""
    assert torch.equal(record_to_reply(record(npy(FOUR), (4,))).tensors["x"], torch.arange(4.0))


@pytest.mark.parametrize(
    "forged",
    [
        pytest.param(record(npy(FOUR, shape=HUGE), HUGE), id="header and declaration claim petabytes"),
        pytest.param(record(npy(FOUR, shape=HUGE), (4,)), id="header claims petabytes"),
        pytest.param(record(npy(FOUR), HUGE), id="declaration claims petabytes"),
        pytest.param(record(npy(FOUR), (2, 2)), id="another shape declared"),
        pytest.param(record(npy(FOUR), (4,), dtype="float64"), id="another dtype declared"),
        pytest.param(record(npy(FOUR)[:-1], (4,)), id="a byte short"),
        pytest.param(record(npy(FOUR) + b"\0", (4,)), id="a byte long"),
        pytest.param(record(npy(FOUR)[:20], (4,)), id="half a header"),
        pytest.param(record(b"", (4,)), id="nothing"),
        pytest.param(record(b"\x93NUMPY\x01\x00\x02\x00\xff\xfe" + bytes(16), (4,)), id="header that is no text"),
        pytest.param(record(b"\x93NUMPY\x09\x00", (4,)), id="unknown version"),
        pytest.param(record(npy(FOUR), (4,), stype="torch.save"), id="another serialization"),
        pytest.param(record(npy(FOUR, descr="|O"), (4,), dtype="object"), id="objects"),
        pytest.param(record(npy(FOUR, descr="<c8"), (2,), dtype="complex64"), id="complex numbers"),
        pytest.param(record(npy(FOUR, descr="|S16"), (1,), dtype="|S16"), id="text"),
        pytest.param(record(npy(FOUR, descr=[("f", "<f4")]), (4,), dtype="[('f', '<f4')]"), id="records"),
    ],
)
def test_a_forged_array_is_rejected_before_anything_is_allocated(forged: RecordDict) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(ReplyRejected, match=r"^x (is|has|declares) ") as rejected:
            record_to_reply(forged)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert rejected.value.code == "malformed_reply"
    assert peak < 1_000_000
    with pytest.raises(SiteRefusal) as refused:
        record_to_instruction(forged)
    assert refused.value.code == "malformed_instruction"


def test_pickled_objects_are_never_loaded() -> None:
    stream = io.BytesIO()
    np.save(stream, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ReplyRejected, match="is declared as object"):
        record_to_reply(record(stream.getvalue(), (1,), dtype="object"))


@pytest.mark.parametrize(
    "odd",
    [
        pytest.param(record(npy(FOUR, shape=(-2, -2)), (-2, -2)), id="negative shape"),
        pytest.param(record(npy(FOUR[:0], shape=(0, 2**62)), (0, 2**62)), id="nothing, in a shape beyond all memory"),
        pytest.param(record(npy(FOUR[:0], shape=(0, 2**35, 2**35)), (0, 2**35, 2**35)), id="the same in two sizes"),
        pytest.param(record(npy(FOUR[:1], shape=(1,) * 70), (1,) * 70), id="more dimensions than numpy has"),
        pytest.param(record(npy(FOUR.astype(">f4")), (4,), dtype=">f4"), id="foreign byte order"),
        pytest.param(record(npy(FOUR.astype(np.longdouble)), (4,), dtype="float128"), id="longdouble"),
        pytest.param(record(b"\x93NUMPY\x01\x00\x03\x00(((" + bytes(16), (4,)), id="header that does not end"),
        pytest.param(record(b"\x93NUMPY\x01\x00\x70\x17" + b"-" * 6000, (4,)), id="header that nests"),
    ],
)
def test_an_odd_array_is_rejected_not_an_error_of_ours(odd: RecordDict) -> None:
    """An exception of any other type would end the server's round instead of one site's reply."""
    with pytest.raises(ReplyRejected):
        record_to_reply(odd)


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=200), st.lists(st.integers(-3, 9), max_size=3))
def test_random_bytes_are_rejected(data: bytes, shape: list[int]) -> None:
    for payload in (data, b"\x93NUMPY\x01\x00" + data, b"\x93NUMPY\x01\x00\x46\x00" + data):
        try:
            reply = record_to_reply(record(payload, tuple(shape)))
        except ReplyRejected:
            continue
        assert reply.tensors["x"].numel() == math.prod(shape)


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
