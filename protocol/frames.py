"""Messages between a relay and a site's process: length-prefixed frames over a local socket.

A frame is a Flower record without Flower: eight bytes of length, then four bytes of length and a JSON head that names
texts and arrays, then the arrays' bytes one after the other. Nothing is interpreted here but the head, and that
strictly; what an array holds is checked where it is decoded (`protocol/records.py`). An empty frame says that the other
side is alive and at work. Neither torch nor any code of the site is imported: the relay runs without them.
"""

from __future__ import annotations

import json
import socket
import struct
from collections import OrderedDict

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from pydantic import Field, ValidationError

from conf.schema.base import Frozen
from protocol.errors import SiteRefusal
from protocol.refusals import sentence

__all__ = ["ALIVE", "decode_frame", "encode_frame", "receive_frame", "refusal_record", "send_frame"]

ALIVE = b""
"""The frame that says: still at work."""
_LENGTH, _HEAD = struct.Struct(">Q"), struct.Struct(">I")
_CHUNK = 1 << 20
_MAX_HEAD = 16 << 20


class _ArrayHead(Frozen):
    name: str
    dtype: str
    shape: tuple[int, ...]
    stype: str
    size: int = Field(ge=0, description="bytes")


class _Head(Frozen):
    kind: str
    texts: dict[str, dict[str, str]]
    arrays: dict[str, tuple[_ArrayHead, ...]]


def encode_frame(kind: str, record: RecordDict) -> bytes:
    """Return the frame of a record of texts and arrays; `kind` says what is asked, or that it is an answer.

    Raises:
        SiteRefusal: code `malformed_instruction` for a record with anything else in it.
    """
    texts: dict[str, dict[str, str]] = {}
    for name, config in record.config_records.items():
        texts[name] = {key: value for key, value in config.items() if isinstance(value, str)}
        if len(texts[name]) != len(config):
            raise SiteRefusal("malformed_instruction", f"the record {name!r} holds something that is no text")
    if record.metric_records:
        raise SiteRefusal("malformed_instruction", "a message between server and site has no metric records")
    heads = {
        name: tuple(
            _ArrayHead(name=key, dtype=array.dtype, shape=tuple(array.shape), stype=array.stype, size=len(array.data))
            for key, array in arrays.items()
        )
        for name, arrays in record.array_records.items()
    }
    head = _Head(kind=kind, texts=texts, arrays=heads).model_dump_json().encode()
    payload = [array.data for arrays in record.array_records.values() for array in arrays.values()]
    return b"".join([_HEAD.pack(len(head)), head, *payload])


def decode_frame(frame: bytes) -> tuple[str, RecordDict]:
    """Return the kind and the record of a frame.

    Raises:
        SiteRefusal: code `malformed_instruction` when head and length do not agree.
    """
    try:
        (size,) = _HEAD.unpack_from(frame)
        if size > _MAX_HEAD:
            raise SiteRefusal("malformed_instruction", f"the frame's head has {size} bytes, above {_MAX_HEAD}")
        start = _HEAD.size + size
        head = _Head.model_validate_json(frame[_HEAD.size : start], strict=True)
    except (struct.error, ValidationError) as error:
        raise SiteRefusal(
            "malformed_instruction", f"the frame's head cannot be read: {type(error).__name__}"
        ) from error
    if start + sum(array.size for arrays in head.arrays.values() for array in arrays) != len(frame):
        raise SiteRefusal("malformed_instruction", f"the frame has {len(frame)} bytes, its head says otherwise")
    record = RecordDict({name: ConfigRecord(dict(texts)) for name, texts in head.texts.items()})
    for name, heads in head.arrays.items():
        arrays: OrderedDict[str, Array] = OrderedDict()
        for each in heads:
            data = frame[start : start + each.size]
            arrays[each.name] = Array(dtype=each.dtype, shape=each.shape, stype=each.stype, data=data)
            start += each.size
        record[name] = ArrayRecord(arrays)
    return head.kind, record


def send_frame(connection: socket.socket, frame: bytes) -> None:
    """Send one frame, its length first."""
    connection.sendall(_LENGTH.pack(len(frame)))
    connection.sendall(frame)


def receive_frame(connection: socket.socket, limit: int) -> bytes | None:
    """Return the next frame, or None when the other side is gone.

    Memory grows with what arrives, never with what is announced.

    Raises:
        SiteRefusal: code `oversized_frame` when more than `limit` bytes are announced.
        TimeoutError: nothing came for as long as the socket's timeout.
    """
    prefix = _receive(connection, _LENGTH.size)
    if prefix is None:
        return None
    (size,) = _LENGTH.unpack(prefix)
    if size > limit:
        raise SiteRefusal("oversized_frame", f"a frame of {size} bytes is announced, above the limit of {limit}")
    return _receive(connection, size)


def refusal_record(code: str, site: str = "") -> RecordDict:
    """Return the record of a refusal outside of any round; `protocol.records` reads it."""
    header = {"status": "refused", "site": site, "round": 0, "plan_digest": "", "code": code, "reason": sentence(code)}
    return RecordDict({"cloister": ConfigRecord({"json": json.dumps(header)}), "tensors": ArrayRecord(OrderedDict())})


def _receive(connection: socket.socket, size: int) -> bytes | None:
    received = bytearray()
    while len(received) < size:
        chunk = connection.recv(min(_CHUNK, size - len(received)))
        if not chunk:
            return None
        received += chunk
    return bytes(received)
