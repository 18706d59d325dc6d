"""Instructions and replies as Flower records. The only file of `protocol` that knows Flower.

Tensors travel as named arrays of an `ArrayRecord` (numpy's own format, never pickled); the header travels as one JSON
string. An array's declared shape, its npy header and its length must agree *before* anything is allocated: a forged
header could otherwise claim terabytes.
"""

from __future__ import annotations

import io
import math
from collections import OrderedDict
from collections.abc import Mapping

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from pydantic import ValidationError

from protocol.errors import ReplyRejected, SiteRefusal
from protocol.instructions import Instruction, Reply, SiteCard, decode_instruction, decode_reply
from protocol.tensors import NamedTensors

__all__ = [
    "card_to_record",
    "instruction_to_record",
    "instructions_to_records",
    "payload_bytes",
    "record_to_card",
    "record_to_instruction",
    "record_to_reply",
    "reply_to_record",
]

_HEADER, _TENSORS, _JSON = "cloister", "tensors", "json"
_NPY = "numpy.ndarray"
_FORMATS = {"float32": "<f4", "uint8": "|u1"}
"""Tensors, and the bytes of encoded ones (`protocol/codecs/`)."""


def instruction_to_record(instruction: Instruction) -> RecordDict:
    """Return the record that carries an instruction."""
    return _record(instruction.header.model_dump_json(), instruction.tensors)


def instructions_to_records(instructions: Mapping[str, Instruction]) -> dict[str, RecordDict]:
    """Return each site's record. Those with the same tensors share their arrays, whatever their headers say: Flower
    stores and sends them once."""
    tensors = {id(each.tensors): each.tensors for each in instructions.values()}
    arrays = {key: _arrays(each) for key, each in tensors.items()}
    return {
        site: RecordDict(
            {_HEADER: ConfigRecord({_JSON: each.header.model_dump_json()}), _TENSORS: arrays[id(each.tensors)]}
        )
        for site, each in instructions.items()
    }


def record_to_instruction(record: RecordDict) -> Instruction:
    """Return the instruction a record carries.

    Raises:
        SiteRefusal: code `malformed_instruction` or `plan_digest`.
    """
    try:
        return decode_instruction(_header(record), _tensors(record))
    except ReplyRejected as error:
        raise SiteRefusal("malformed_instruction", str(error)) from error


def reply_to_record(reply: Reply) -> RecordDict:
    """Return the record that carries a reply."""
    return _record(reply.header.model_dump_json(), reply.tensors)


def record_to_reply(record: RecordDict) -> Reply:
    """Return the reply a record carries.

    Raises:
        ReplyRejected: code `malformed_reply`.
    """
    return decode_reply(_header(record), _tensors(record))


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
    return RecordDict({_HEADER: ConfigRecord({_JSON: header}), _TENSORS: _arrays(tensors)})


def _arrays(tensors: NamedTensors) -> ArrayRecord:
    return ArrayRecord(
        OrderedDict((name, Array(tensor.detach().cpu().contiguous().numpy())) for name, tensor in tensors.items())
    )


def _header(record: RecordDict) -> str:
    header = record.config_records.get(_HEADER, {}).get(_JSON)
    if not isinstance(header, str):
        raise ReplyRejected("malformed_reply", "the message has no JSON header")
    return header


def _tensors(record: RecordDict) -> dict[str, torch.Tensor]:
    arrays = record.array_records.get(_TENSORS)
    if arrays is None:
        raise ReplyRejected("malformed_reply", "the message has no tensors record")
    return {name: torch.from_numpy(_decoded(name, array)) for name, array in arrays.items()}


def _decoded(name: str, array: Array) -> np.ndarray:
    """Return the float32 or uint8 array, after comparing its header with the only one that its declared shape can have.

    The header is compared, not parsed: what a stranger wrote there is never interpreted.
    """
    if array.stype != _NPY:
        raise ReplyRejected("malformed_reply", f"{name} is serialized as {array.stype!r}, expected {_NPY!r}")
    shape = tuple(array.shape)
    descr = _FORMATS.get(array.dtype)
    if descr is None or not all(type(size) is int and size >= 0 for size in shape):
        raise ReplyRejected(
            "malformed_reply", f"{name} is declared as {array.dtype} {shape}, expected float32 or uint8"
        )
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": descr, "fortran_order": False, "shape": shape})
    start = header.tell()
    if not array.data.startswith(header.getvalue()) or len(array.data) - start != np.dtype(descr).itemsize * math.prod(
        shape
    ):
        raise ReplyRejected("malformed_reply", f"{name} declares {array.dtype} {shape}; its payload disagrees")
    return np.frombuffer(array.data, dtype=descr, offset=start).reshape(shape).copy()
