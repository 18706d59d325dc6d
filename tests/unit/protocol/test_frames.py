"""Frames between a relay and a site: what goes in comes out, and nothing else is believed."""

import json
import socket
import struct
from collections import OrderedDict
from contextlib import suppress

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import SiteRefusal
from protocol.frames import decode_frame, encode_frame, receive_frame, send_frame


def a_record(values: list[float], header: str) -> RecordDict:
    array = Array(np.asarray(values, dtype=np.float32))
    return RecordDict(
        {
            "cloister": ConfigRecord({"json": header}),
            "tensors": ArrayRecord(OrderedDict({"a.b": array, "empty": array})),
        }
    )


@given(values=st.lists(st.floats(width=32, allow_nan=False), max_size=20), header=st.text(max_size=40))
def test_a_record_survives(values: list[float], header: str) -> None:
    kind, record = decode_frame(encode_frame("train", a_record(values, header)))
    assert kind == "train"
    assert record.config_records["cloister"]["json"] == header
    assert np.array_equal(record.array_records["tensors"]["a.b"].numpy(), np.asarray(values, dtype=np.float32))
    assert list(record.array_records["tensors"]) == ["a.b", "empty"]


@given(position=st.integers(0, 10_000), value=st.integers(0, 255))
def test_a_changed_byte_gives_a_record_or_a_refusal(position: int, value: int) -> None:
    frame = bytearray(encode_frame("train", a_record([1.0, 2.0], "header")))
    frame[position % len(frame)] = value
    with suppress(SiteRefusal):  # and nothing else is raised
        assert decode_frame(bytes(frame))


@pytest.mark.parametrize("extra", [b"x", b"x" * 1000])
def test_bytes_too_many_or_too_few_are_refused(extra: bytes) -> None:
    frame = encode_frame("train", a_record([1.0], "h"))
    for wrong in (frame + extra, frame[:-1], frame[:2]):
        with pytest.raises(SiteRefusal, match=r"its head says otherwise|head cannot be read"):
            decode_frame(wrong)


def test_an_enormous_head_is_refused_before_it_is_read() -> None:
    with pytest.raises(SiteRefusal, match=r"the frame's head has 4294967295 bytes, above"):
        decode_frame(struct.pack(">I", 2**32 - 1) + b"{}")


def test_a_head_with_an_unknown_field_is_refused() -> None:
    head = json.dumps({"kind": "train", "texts": {}, "arrays": {}, "code": "import os"}).encode()
    with pytest.raises(SiteRefusal, match="head cannot be read: ValidationError"):
        decode_frame(struct.pack(">I", len(head)) + head)


def test_only_texts_and_arrays_travel() -> None:
    with pytest.raises(SiteRefusal, match="holds something that is no text"):
        encode_frame("train", RecordDict({"cloister": ConfigRecord({"json": b"bytes"})}))
    with pytest.raises(SiteRefusal, match="has no metric records"):
        encode_frame("train", RecordDict({"m": MetricRecord({"loss": 1.0})}))


def test_over_a_socket() -> None:
    here, there = socket.socketpair()
    with here, there:
        send_frame(here, b"abc")
        send_frame(here, b"")
        assert receive_frame(there, 3) == b"abc"
        assert receive_frame(there, 3) == b""
        send_frame(here, b"abcd")
        with pytest.raises(SiteRefusal, match="a frame of 4 bytes is announced, above the limit of 3"):
            receive_frame(there, 3)
        here.sendall(struct.pack(">Q", 3) + b"a")
        here.close()
        assert there.recv(4) == b"abcd"
        assert receive_frame(there, 3) is None
