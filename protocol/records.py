"""Instructions and replies as Flower records. The only file of `protocol` that knows Flower.

The tensors of a message travel as one array that holds a safetensors file, never pickled: Flower sends every array in
requests of its own, and fifty of them take seconds. The header of a message travels as one JSON string. safetensors
compares every shape with the bytes that are there *before* anything is allocated: a forged header could otherwise claim
terabytes. A tensor with many zeros is stored as a bitmap and the values that are left (`sparse.py`), under a name that
tells its shape; what these grow to is bounded by the receiver.
"""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from collections.abc import Mapping

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from pydantic import ValidationError
from safetensors import SafetensorError, deserialize
from safetensors.torch import save

from protocol.cards import CHALLENGE_BYTES, SiteCard
from protocol.errors import ReplyRejected, SiteRefusal
from protocol.instructions import Instruction, InstructionHeader, Reply, decode_instruction, decode_reply
from protocol.sparse import packed, unpacked
from protocol.tensors import NamedTensors

__all__ = [
    "LARGEST_MESSAGE",
    "card_to_record",
    "challenge_to_record",
    "instruction_to_record",
    "instructions_to_records",
    "payload_bytes",
    "record_to_card",
    "record_to_challenge",
    "record_to_header",
    "record_to_instruction",
    "record_to_reply",
    "reply_to_record",
]

_HEADER, _TENSORS, _JSON, _CHALLENGE = "cloister", "tensors", "json", "challenge"
_PACKED, _SPARSE = "safetensors", "sparse:"
_SPARSE_NAME = re.compile(_SPARSE + r"(\d{1,10}(?:x\d{1,10}){0,7}):(.*)", re.DOTALL)
_HEX = re.compile(rf"[0-9a-f]{{{2 * CHALLENGE_BYTES}}}")
LARGEST_MESSAGE = 1 << 31
"""Bytes; what Flower sends in one piece."""
_FORMATS = {"F32": np.dtype("<f4"), "U8": np.dtype("u1")}
"""Tensors, and the bytes of encoded ones (`protocol/codecs/`)."""
_MAX_HEADER = 4 << 20
"""Bytes: some twenty thousand tensors. Reading a header takes several times its size in memory."""


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


def record_to_instruction(record: RecordDict, most_bytes: int = LARGEST_MESSAGE) -> Instruction:
    """Return the instruction a record carries; its sparse tensors may grow to `most_bytes` together.

    Raises:
        SiteRefusal: code `malformed_instruction` or `plan_digest`.
    """
    try:
        return decode_instruction(_header(record), _tensors(record, most_bytes))
    except ReplyRejected as error:
        raise SiteRefusal("malformed_instruction", str(error)) from error


def record_to_header(record: RecordDict) -> InstructionHeader:
    """Return the header of the instruction a record carries; its tensors stay packed.

    Raises:
        SiteRefusal: code `malformed_instruction` or `plan_digest`.
    """
    try:
        return decode_instruction(_header(record), {}).header
    except ReplyRejected as error:
        raise SiteRefusal("malformed_instruction", str(error)) from error


def reply_to_record(reply: Reply) -> RecordDict:
    """Return the record that carries a reply."""
    return _record(reply.header.model_dump_json(), reply.tensors)


def record_to_reply(record: RecordDict, most_bytes: int = LARGEST_MESSAGE) -> Reply:
    """Return the reply a record carries; its sparse tensors may grow to `most_bytes` together.

    Raises:
        ReplyRejected: code `malformed_reply`.
    """
    return decode_reply(_header(record), _tensors(record, most_bytes))


def challenge_to_record(challenge: bytes) -> RecordDict:
    """Return the record that asks for a site's card."""
    return RecordDict({_HEADER: ConfigRecord({_CHALLENGE: challenge.hex()})})


def record_to_challenge(record: RecordDict) -> bytes:
    """Return what the card is to be signed with.

    Raises:
        SiteRefusal: code `malformed_instruction`, for anything but `CHALLENGE_BYTES` bytes in hex.
    """
    challenge = record.config_records.get(_HEADER, {}).get(_CHALLENGE)
    if not isinstance(challenge, str) or not _HEX.fullmatch(challenge):
        raise SiteRefusal(
            "malformed_instruction", f"a card is asked for with a challenge of {CHALLENGE_BYTES} bytes in hex"
        )
    return bytes.fromhex(challenge)


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
    arrays: OrderedDict[str, Array] = OrderedDict()
    if tensors:
        data = save(dict(_stored(name, tensor.detach().cpu().contiguous()) for name, tensor in tensors.items()))
        arrays[_PACKED] = Array(dtype="uint8", shape=(len(data),), stype=_PACKED, data=data)
    return ArrayRecord(arrays)


def _stored(name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
    """Return a tensor and its name as they are packed: sparse, under a name with the shape, where that is smaller."""
    data = packed(tensor.numpy()) if tensor.dtype == torch.float32 and tensor.dim() else None
    if data is None:
        return name, tensor
    return f"{_SPARSE}{'x'.join(map(str, tensor.shape))}:{name}", torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _header(record: RecordDict) -> str:
    header = record.config_records.get(_HEADER, {}).get(_JSON)
    if not isinstance(header, str):
        raise ReplyRejected("malformed_reply", "the message has no JSON header")
    return header


def _tensors(record: RecordDict, most_bytes: int) -> dict[str, torch.Tensor]:
    arrays = record.array_records.get(_TENSORS)
    if arrays is None:
        raise ReplyRejected("malformed_reply", "the message has no tensors record")
    if not arrays:
        return {}
    if list(arrays) != [_PACKED]:
        raise ReplyRejected(
            "malformed_reply", f"the message has {len(arrays)} arrays, expected one that is named {_PACKED}"
        )
    return _grown(_unpacked(arrays[_PACKED]), most_bytes)


def _unpacked(array: Array) -> dict[str, torch.Tensor]:
    """Return the float32 and uint8 tensors of a safetensors file."""
    if array.stype != _PACKED:
        raise ReplyRejected("malformed_reply", f"the tensors are serialized as {array.stype!r}, expected {_PACKED!r}")
    size, announced = len(array.data), int.from_bytes(array.data[:8], "little")
    if (array.dtype, tuple(array.shape)) != ("uint8", (size,)):
        raise ReplyRejected(
            "malformed_reply", f"the tensors are declared as {array.dtype} {tuple(array.shape)}; they have {size} bytes"
        )
    if announced > _MAX_HEADER:
        raise ReplyRejected(
            "malformed_reply", f"the tensors' header is said to have {announced} bytes, above {_MAX_HEADER}"
        )
    try:
        return {name: _tensor(name, **entry) for name, entry in deserialize(array.data)}
    except SafetensorError as error:
        raise ReplyRejected("malformed_reply", f"the tensors' header cannot be read: {str(error)[:200]}") from error


def _grown(stored: dict[str, torch.Tensor], most_bytes: int) -> dict[str, torch.Tensor]:
    """Return the tensors with those that are stored sparse in full."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in stored.items():
        if not name.startswith(_SPARSE):
            continue
        match = _SPARSE_NAME.fullmatch(name)
        if match is None or tensor.dtype != torch.uint8 or match[2] in stored:
            raise ReplyRejected("malformed_reply", f"the tensors hold {name[:100]!r}, which is no sparse tensor")
        shape = tuple(int(size) for size in match[1].split("x"))
        if math.prod(max(size, 1) for size in shape) >= 1 << 60:  # numpy could not address it, also where a size is 0
            raise ReplyRejected("malformed_reply", f"the tensors hold {name[:100]!r} with an impossible shape")
        shapes[name] = shape
    grown = 4 * sum(math.prod(shape) for shape in shapes.values())
    if grown > most_bytes:
        raise ReplyRejected(
            "malformed_reply", f"the sparse tensors of a message declare {grown} bytes, expected at most {most_bytes}"
        )
    whole = {name: tensor for name, tensor in stored.items() if name not in shapes}
    for name, shape in shapes.items():
        own = name.split(":", 2)[2]
        if own in whole:
            raise ReplyRejected("malformed_reply", f"the tensors hold {own[:100]!r} twice")
        values = unpacked(own[:100], stored[name].numpy().tobytes(), math.prod(shape))
        whole[own] = torch.from_numpy(values.reshape(shape))
    return whole


def _tensor(name: str, dtype: str, shape: list[int], data: bytearray) -> torch.Tensor:
    if dtype not in _FORMATS:
        raise ReplyRejected("malformed_reply", f"the tensors hold {name[:100]!r} as {dtype}, expected F32 or U8")
    try:
        return torch.from_numpy(np.ndarray(tuple(shape), _FORMATS[dtype], buffer=data))
    except (ValueError, OverflowError, RuntimeError) as error:  # a shape such as (0, 2**62), which needs no bytes
        raise ReplyRejected("malformed_reply", f"the tensors hold {name[:100]!r} with an impossible shape") from error
