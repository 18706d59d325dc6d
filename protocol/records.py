"""Instructions and replies as Flower records. The only file of `protocol` that knows Flower.

Tensors travel as named arrays of an `ArrayRecord`, in numpy's own format, never pickled, or, where that takes fewer
bytes, as a bitmap and the values that are not zero (`sparse.py`); the header travels as one JSON string. An array's
declared shape, its npy header and its length must agree *before* anything is allocated: a forged header could otherwise
claim terabytes. What sparse arrays of a message grow to is bounded by the receiver.
"""

from __future__ import annotations

import io
import math
from collections import OrderedDict

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from pydantic import ValidationError

from protocol.errors import ReplyRejected, SiteRefusal
from protocol.instructions import Instruction, Reply, SiteCard, decode_instruction, decode_reply
from protocol.sparse import packed, unpacked
from protocol.tensors import NamedTensors

__all__ = [
    "LARGEST_MESSAGE",
    "card_to_record",
    "instruction_to_record",
    "payload_bytes",
    "record_to_card",
    "record_to_instruction",
    "record_to_reply",
    "reply_to_record",
]

_HEADER, _TENSORS, _JSON = "cloister", "tensors", "json"
LARGEST_MESSAGE = 1 << 31
"""Bytes; what Flower sends in one piece."""
_MOST_DIMENSIONS = 8
_NPY, _SPARSE = "numpy.ndarray", "cloister.sparse"
_FORMATS = {"float32": "<f4", "uint8": "|u1"}
"""Tensors, and the bytes of encoded ones (`protocol/codecs/`)."""


def instruction_to_record(instruction: Instruction) -> RecordDict:
    """Return the record that carries an instruction."""
    return _record(instruction.header.model_dump_json(), instruction.tensors)


def record_to_instruction(record: RecordDict, most_bytes: int = LARGEST_MESSAGE) -> Instruction:
    """Return the instruction a record carries; its sparse arrays may grow to `most_bytes` together.

    Raises:
        SiteRefusal: code `malformed_instruction` or `plan_digest`.
    """
    try:
        return decode_instruction(_header(record), _tensors(record, most_bytes))
    except ReplyRejected as error:
        raise SiteRefusal("malformed_instruction", str(error)) from error


def reply_to_record(reply: Reply) -> RecordDict:
    """Return the record that carries a reply."""
    return _record(reply.header.model_dump_json(), reply.tensors)


def record_to_reply(record: RecordDict, most_bytes: int = LARGEST_MESSAGE) -> Reply:
    """Return the reply a record carries; its sparse arrays may grow to `most_bytes` together.

    Raises:
        ReplyRejected: code `malformed_reply`.
    """
    return decode_reply(_header(record), _tensors(record, most_bytes))


def card_to_record(card: SiteCard) -> RecordDict:
    """Return the record that carries a site's card."""
    return _record(card.model_dump_json(), {})


def record_to_card(record: RecordDict) -> SiteCard:
    """Return the card a record carries.

    Raises:
        ReplyRejected: code `malformed_card`.
    """
    try:
        return SiteCard.model_validate_json(_header(record))
    except ValidationError as error:
        raise ReplyRejected("malformed_card", f"a site's card cannot be read: {error.errors()[0]['msg']}") from error


def payload_bytes(record: RecordDict) -> int:
    """Return the bytes a record puts on the wire: array payloads and the JSON header."""
    arrays = sum(len(array.data) for array_record in record.array_records.values() for array in array_record.values())
    return arrays + len(_header(record).encode())


def _record(header: str, tensors: NamedTensors) -> RecordDict:
    arrays = OrderedDict(
        (name, _encoded(tensor.detach().cpu().contiguous().numpy())) for name, tensor in tensors.items()
    )
    return RecordDict({_HEADER: ConfigRecord({_JSON: header}), _TENSORS: ArrayRecord(arrays)})


def _encoded(array: np.ndarray) -> Array:
    data = packed(array) if array.dtype == np.float32 else None
    return Array(array) if data is None else Array("float32", array.shape, _SPARSE, data)


def _header(record: RecordDict) -> str:
    header = record.config_records.get(_HEADER, {}).get(_JSON)
    if not isinstance(header, str):
        raise ReplyRejected("malformed_reply", "the message has no JSON header")
    return header


def _tensors(record: RecordDict, most_bytes: int) -> dict[str, torch.Tensor]:
    arrays = record.array_records.get(_TENSORS)
    if arrays is None:
        raise ReplyRejected("malformed_reply", "the message has no tensors record")
    for name, array in arrays.items():
        _check_declared(name, array)
    grown = sum(4 * math.prod(array.shape) for array in arrays.values() if array.stype == _SPARSE)
    if grown > most_bytes:
        raise ReplyRejected(
            "malformed_reply", f"the sparse arrays of a message declare {grown} bytes, expected at most {most_bytes}"
        )
    return {name: torch.from_numpy(_decoded(name, array)) for name, array in arrays.items()}


def _check_declared(name: str, array: Array) -> None:
    """Check what an array is declared as: its serialization, its type, its shape."""
    if array.stype not in (_NPY, _SPARSE):
        raise ReplyRejected("malformed_reply", f"{name} is serialized as {array.stype!r}, expected {_NPY!r}")
    allowed = ("float32",) if array.stype == _SPARSE else tuple(_FORMATS)
    sizes = tuple(array.shape)
    possible = len(sizes) <= _MOST_DIMENSIONS and all(type(size) is int and 0 <= size < 1 << 40 for size in sizes)
    # numpy refuses what no memory could address, also where another size is 0: an error that nobody would catch.
    if array.dtype not in allowed or not possible or math.prod(max(size, 1) for size in sizes) >= 1 << 60:
        raise ReplyRejected(
            "malformed_reply",
            f"{name} is declared as {array.dtype} {sizes}, expected {' or '.join(allowed)}",
        )


def _decoded(name: str, array: Array) -> np.ndarray:
    """Return the float32 or uint8 array, after comparing its header with the only one that its declared shape can have.

    The header is compared, not parsed: what a stranger wrote there is never interpreted.
    """
    shape, descr = tuple(array.shape), _FORMATS[array.dtype]
    if array.stype == _SPARSE:
        return unpacked(name, array.data, math.prod(shape)).reshape(shape)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": descr, "fortran_order": False, "shape": shape})
    start = header.tell()
    if not array.data.startswith(header.getvalue()) or len(array.data) - start != np.dtype(descr).itemsize * math.prod(
        shape
    ):
        raise ReplyRejected("malformed_reply", f"{name} declares {array.dtype} {shape}; its payload disagrees")
    return np.frombuffer(array.data, dtype=descr, offset=start).reshape(shape).copy()
