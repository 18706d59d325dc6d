"""Tensors without their zeros: the same bits come back, few bytes travel, and forgeries allocate nothing."""

import tracemalloc
from collections import OrderedDict

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors.torch import load, save

from protocol.errors import ReplyRejected
from protocol.instructions import Reply, ReplyHeader
from protocol.records import record_to_reply, reply_to_record
from protocol.sparse import packed, unpacked
from protocol.tensors import NamedTensors, digest

HEADER = ReplyHeader(status="trained", site="harbor", round=1, plan_digest="p")
TEN = np.array([0, 0, 1.5, 0, -0.0, 0, 0, 0, 0, 2], dtype=np.float32)
GOOD = bytes([0b00010100, 0b10]) + np.array([1.5, -0.0, 2], dtype="<f4").tobytes()
"""Entries 2, 4 and 9 of ten, lowest bit first."""


def test_the_form_is_the_documented_one() -> None:
    assert packed(TEN) == GOOD
    assert unpacked("x", GOOD, 10).tobytes() == TEN.tobytes()


@given(
    arrays.arrays(
        np.float32,
        arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=9),
        elements=st.one_of(st.just(0.0), st.just(-0.0), st.floats(width=32)),
    )
)
def test_every_array_comes_back_to_the_bit_and_never_takes_more(array: np.ndarray) -> None:
    data = packed(array)
    if data is not None:
        assert len(data) < array.nbytes
        assert unpacked("x", data, array.size).tobytes() == array.tobytes()
    tensors = {"x": torch.from_numpy(array.copy())}
    back = record_to_reply(reply_to_record(Reply(HEADER, tensors))).tensors
    assert digest(back) == digest(tensors)


def sparse(density: float) -> NamedTensors:
    generator = torch.Generator().manual_seed(0)
    return {
        f"{name}.{layer}": torch.randn(shape, generator=generator).where(
            torch.rand(shape, generator=generator) < density, 0.0
        )
        for layer in range(12)
        for name, shape in (("a", (8, 768)), ("b", (768, 8)))
    }


@pytest.mark.parametrize("density", [0.0, 0.01, 0.1, 0.25, 0.9])
def test_the_bytes_are_a_bitmap_and_the_values(density: float) -> None:
    tensors = sparse(density)
    entries = sum(tensor.numel() for tensor in tensors.values())
    kept = sum(int(tensor.count_nonzero()) for tensor in tensors.values())
    file = reply_to_record(Reply(HEADER, tensors)).array_records["tensors"]["safetensors"].data
    bytes_sent = len(file) - 8 - int.from_bytes(file[:8], "little")  # names and shapes take as many as they do anyway
    assert bytes_sent == pytest.approx(entries / 8 + 4 * kept, rel=0.02)


def test_a_dense_tensor_travels_under_its_own_name() -> None:
    record = reply_to_record(Reply(HEADER, {"x": torch.ones(100)}))
    assert list(load(record.array_records["tensors"]["safetensors"].data)) == ["x"]


def record(data: bytes, shape: tuple[int, ...], copies: int = 1, **others: torch.Tensor) -> RecordDict:
    named = "x".join(map(str, shape))
    stored = {f"sparse:{named}:x{number}": torch.tensor(list(data), dtype=torch.uint8) for number in range(copies)}
    return whole(stored | others)


def whole(stored: dict[str, torch.Tensor]) -> RecordDict:
    file = save(stored)
    array = Array(dtype="uint8", shape=(len(file),), stype="safetensors", data=file)
    return RecordDict(
        {
            "cloister": ConfigRecord({"json": HEADER.model_dump_json()}),
            "tensors": ArrayRecord(OrderedDict(safetensors=array)),
        }
    )


def test_the_forger_can_be_honest() -> None:
    """The control: what is forged below is otherwise accepted."""
    found = record_to_reply(record(GOOD, (2, 5)), most_bytes=40).tensors["x0"]
    assert torch.equal(found, torch.from_numpy(TEN.reshape(2, 5)))


@pytest.mark.parametrize(
    ("forged", "problem"),
    [
        pytest.param(
            record(GOOD, (2**32, 2**18)), "declare 4503599627370496 bytes, expected at most 40", id="petabytes"
        ),
        pytest.param(record(bytes(2**12), (2**23,)), "declare 33554432 bytes, expected", id="zeros that grow"),
        pytest.param(record(GOOD, (10,), copies=2), "declare 80 bytes, expected at most 40", id="too many together"),
        pytest.param(record(GOOD, (9,)), "has bits beyond them", id="a shape smaller than the bitmap"),
        pytest.param(record(bytes([4, 4]) + GOOD[6:], (10,)), "has bits beyond them", id="bits beyond the end"),
        pytest.param(record(GOOD[:-1], (10,)), "that are not zero in 11 bytes", id="a byte short"),
        pytest.param(record(GOOD + b"\0", (10,)), "that are not zero in 13 bytes", id="a byte long"),
        pytest.param(record(GOOD[:1], (10,)), "its bitmap has 1 bytes", id="half a bitmap"),
        pytest.param(record(b"", (10,)), "its bitmap has 0 bytes", id="nothing"),
        pytest.param(record(GOOD[:10] + bytes(4), (10,)), "and holds a zero", id="a second form of the same"),
        pytest.param(whole({"sparse:10:x": torch.ones(4)}), "which is no sparse tensor", id="float32"),
        pytest.param(record(GOOD, (-10,)), "which is no sparse tensor", id="negative shape"),
        pytest.param(record(b"", (0, 2**70)), "which is no sparse tensor", id="a size beyond all memory"),
        pytest.param(record(b"", (0, 9999999999, 9999999999)), "an impossible shape", id="the same, of nothing"),
        pytest.param(record(GOOD, (10,), x0=torch.ones(1)), "which is no sparse tensor", id="a name twice"),
        pytest.param(
            whole({"sparse:10:x": torch.tensor(list(GOOD)).byte(), "sparse:2x5:x": torch.tensor(list(GOOD)).byte()}),
            "hold 'x' twice|expected at most 40",
            id="a sparse name twice",
        ),
    ],
)
def test_a_forged_array_is_rejected_before_anything_is_allocated(forged: RecordDict, problem: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(ReplyRejected, match=problem) as rejected:
            record_to_reply(forged, most_bytes=40)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert rejected.value.code == "malformed_reply"
    assert peak < 100_000


@given(st.binary(max_size=60), st.integers(0, 100))
def test_random_bytes_are_rejected_or_have_one_form(data: bytes, count: int) -> None:
    try:
        array = unpacked("x", data, count)
    except ReplyRejected:
        return
    assert packed(array) in (None, data)
