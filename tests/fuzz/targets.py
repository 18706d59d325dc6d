"""Everything that decodes bytes from the network, as functions of bytes, and honest inputs to start from.

A target either returns, after it has compared what was decoded with what was asked for, or raises the refusal that the
decoder documents. Anything else (another exception, NaN, a wrong shape, too many bytes) is a finding.
"""

from __future__ import annotations

import json
import socket
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import cache

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from conf.compose import compose_experiment
from conf.schema import wire
from protocol.cards import SiteCard
from protocol.codecs.base import ENCODED, HEADER_BYTES, Codec, WireContext, value_count
from protocol.codecs.build import build_codec
from protocol.errors import ReplyRejected, SiteRefusal
from protocol.frames import decode_frame, encode_frame, receive_frame
from protocol.instructions import Instruction, InstructionHeader, Reply, ReplyHeader, client_plan
from protocol.records import (
    card_to_record,
    instruction_to_record,
    record_to_card,
    record_to_instruction,
    record_to_reply,
    reply_to_record,
)
from protocol.sparse import packed, unpacked
from protocol.tensors import Layout, NamedTensors, TensorShape, byte_count, layout_of
from strategies.lora.flora import flora

__all__ = ["REFUSALS", "TARGETS", "run", "seeds"]

REFUSALS = (ReplyRejected, SiteRefusal)
LAYOUTS: tuple[Layout, ...] = (
    {"b": TensorShape((3, 5)), "a": TensorShape((7,)), "scalar": TensorShape(())},
    {"m": TensorShape((40, 45)), "empty": TensorShape((0, 3))},
    {"q": TensorShape((16, 90)), "p": TensorShape((90, 16)), "head": TensorShape((2,))},
    {"w": TensorShape((128, 130))},
)
"""The last one has a block of the largest size."""
CODECS: dict[str, tuple[wire.Quantization, ...]] = {
    "none": (wire.NoQuantization(),),
    "half": (wire.BFloat16(), wire.Float16()),
    "eden": tuple(wire.Eden(bits=bits) for bits in (0.5, 1, 2, 2.5, 4, 8)),
    "uniform_entropy": tuple(wire.UniformEntropy(bits=bits) for bits in (1, 2, 4, 8)),
    "blockwise": (wire.Int8(), wire.Int4(), wire.Int4(block_size=8), wire.NF4()),
    "signsgd": (wire.SignSGD(),),
    "topk": (wire.TopK(fraction=0.05), wire.TopK(fraction=0.3)),
    "lattice": (wire.Lattice(), wire.Lattice(bits=5, max_summands=4), wire.Lattice(bits=9, max_summands=4)),
}
CONTEXT = WireContext("fuzz", 1, "harbor", "up")
WITH_HEADER = 0x80
"""Of the second byte: what follows is put behind the one header that a codec accepts."""
ROTATING = {"eden": 0, "uniform_entropy": 4}
"""Where the first scale is, after the header."""
LOUD = struct.pack("<f", 1e33)
"""The largest scale that is taken: of a block that rotates back to one spike it leaves float32."""
REPLY = ReplyHeader(status="trained", site="harbor", round=1, plan_digest="p")


def run(name: str, data: bytes) -> str:
    """Return how a target ends: `decoded`, or the code of its refusal. Anything else is raised."""
    try:
        TARGETS[name](data)
    except REFUSALS as error:
        refusal = error
    else:
        return "decoded"
    assert refusal.code, "a refusal without a code"
    assert len(str(refusal)) < 1000, "a refusal that repeats what it was sent"
    return refusal.code


def _fits(tensors: NamedTensors, layout: Layout) -> None:
    assert layout_of(tensors) == dict(layout), "decoded to another layout"
    assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()), "decoded to NaN or infinity"


@cache
def _codecs(family: str) -> tuple[Codec, ...]:
    return tuple(build_codec(config) for config in CODECS[family])


@cache
def _header(family: str, variant: int, number: int) -> bytes:
    """Return the header of an honest message."""
    zeros = {name: torch.zeros(each.shape) for name, each in LAYOUTS[number].items()}
    encoded = _codecs(family)[variant].encode(zeros, CONTEXT, CONTEXT.rounding())
    return encoded[ENCODED][:HEADER_BYTES].numpy().tobytes()


def _codec(family: str) -> Callable[[bytes], None]:
    def target(data: bytes) -> None:
        if len(data) < 2:
            return
        number, variant = data[0] % len(LAYOUTS), (data[1] & ~WITH_HEADER) % len(CODECS[family])
        payload, layout = data[2:], LAYOUTS[number]
        if data[1] & WITH_HEADER:
            payload = _header(family, variant, number) + payload
        encoded = {ENCODED: torch.frombuffer(bytearray(payload), dtype=torch.uint8)} if payload else {}
        _fits(_codecs(family)[variant].decode(encoded, layout, CONTEXT), layout)

    return target


def _plain(data: bytes) -> None:
    """Float32 tensors in a safetensors file, compared with a layout."""
    layout = LAYOUTS[data[0] % len(LAYOUTS)] if data else LAYOUTS[0]
    reply = record_to_reply(_record(REPLY.model_dump_json(), data[1:]), most_bytes=4 * value_count(layout))
    assert byte_count(reply.tensors) <= len(data) + 4 * value_count(layout), "more than was sent and allowed"
    _fits(_codecs("none")[0].decode(reply.tensors, layout, CONTEXT), layout)


def _record(header: str, data: bytes, flags: int = 0) -> RecordDict:
    """Return a record around the bytes of its one array; each bit of `flags` makes another part of it a lie."""
    array = Array(
        dtype="float32" if flags & 1 else "uint8",
        shape=(len(data) + 1,) if flags & 2 else (len(data),),
        stype="numpy.ndarray" if flags & 4 else "safetensors",
        data=data,
    )
    arrays = OrderedDict([("x" if flags & 8 else "safetensors", array)] if data else [])
    return RecordDict({"cloister": ConfigRecord({"json": header}), "tensors": ArrayRecord(arrays)})


def _message(data: bytes) -> RecordDict:
    """Return the record of some bytes: flags, the length of the JSON header, the header, the array."""
    size = int.from_bytes(data[1:3], "little")
    return _record(data[3 : 3 + size].decode("utf-8", "replace"), data[3 + size :], data[0] if data else 0)


def _reply(data: bytes) -> None:
    reply = record_to_reply(_message(data), most_bytes=1 << 16)
    assert byte_count(reply.tensors) <= len(data) + (1 << 16), "more than was sent and allowed"


def _instruction(data: bytes) -> None:
    told = record_to_instruction(_message(data), most_bytes=1 << 16)
    assert told.header.plan.digest == told.header.plan_digest
    assert byte_count(told.tensors) <= len(data) + (1 << 16), "more than was sent and allowed"


def _offsets(data: bytes) -> None:
    """What a strategy is sent besides the adapter."""
    extras = record_to_reply(_record(REPLY.model_dump_json(), data), most_bytes=1 << 16).tensors
    flora().client.verify_extras(extras, {"l.lora_A.weight": torch.zeros(2, 9), "l.lora_B.weight": torch.zeros(8, 2)})
    for tensor in extras.values():
        assert bool(torch.isfinite(tensor).all()), "an offset that is NaN or infinite"


def _card(data: bytes) -> None:
    assert record_to_card(_message(data)).published_records >= 1


def _frame(data: bytes) -> None:
    kind, record = decode_frame(data)
    again = decode_frame(encode_frame(kind, record))
    assert again[0] == kind
    assert sum(len(each.data) for arrays in record.array_records.values() for each in arrays.values()) <= len(data)
    for read in (record_to_instruction, record_to_reply, record_to_card):
        try:
            read(record)
        except REFUSALS:
            continue


def _socket(data: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(data[:65536])
        theirs.shutdown(socket.SHUT_WR)
        ours.settimeout(600)
        frame = receive_frame(ours, 4096)
    assert frame is None or len(frame) <= 4096


def _sparse(data: bytes) -> None:
    count = int.from_bytes(data[:2], "little")
    values = unpacked("x", data[2:], count)
    assert values.shape == (count,)
    assert packed(values) in (None, data[2:]), "an array has one form"


TARGETS: dict[str, Callable[[bytes], None]] = {
    **{family: _codec(family) for family in CODECS if family != "none"},
    "none": _plain,
    "sparse": _sparse,
    "reply": _reply,
    "instruction": _instruction,
    "offsets": _offsets,
    "card": _card,
    "frame": _frame,
    "socket": _socket,
}


def seeds(name: str) -> Iterator[bytes]:
    """Yield inputs that an honest sender writes, and a few that took thought: coverage alone does not find them."""
    honest = Reply(REPLY, {"a": torch.ones(2, 3), "z": torch.eye(12)})
    if name in CODECS:
        yield from _encodings(name)
    elif name == "sparse":
        yield (144).to_bytes(2, "little") + (packed(torch.eye(12).numpy()) or b"")
    elif name == "offsets":
        offset = {"l.lora_offset_left": torch.ones(8, 3), "l.lora_offset_right": torch.ones(3, 9)}
        yield _array(reply_to_record(Reply(REPLY, offset)))
        yield _array(reply_to_record(Reply(REPLY, {"l.lora_offset_left": torch.full((8, 3), torch.inf)})))
    elif name == "reply":
        yield _bytes_of(reply_to_record(honest))
        refusal = {"status": "refused", "site": "harbor", "round": 1, "plan_digest": "p", "code": "no_budget"}
        yield _bytes_of(_record(json.dumps(refusal), b""))
        yield _bytes_of(_record("[" * 3000, b""))
    elif name == "card":
        yield _bytes_of(card_to_record(SiteCard(cloister_version="1", site="harbor", published_records=9)))
    elif name == "instruction":
        yield _bytes_of(_instructed(honest.tensors))
    elif name == "frame":
        yield encode_frame("round", _instructed(honest.tensors))
        yield encode_frame("card", reply_to_record(honest))
    else:
        frame = encode_frame("card", reply_to_record(honest))
        yield len(frame).to_bytes(8, "big") + frame
        yield (1 << 62).to_bytes(8, "big") + frame


def _instructed(tensors: NamedTensors) -> RecordDict:
    plan = client_plan(compose_experiment(["experiment=smoke"]), "fuzz")
    header = InstructionHeader(round=1, plan=plan, plan_digest=plan.digest, base_digest="b", adapter_digest="a")
    return instruction_to_record(Instruction(header, tensors))


def _encodings(family: str) -> Iterator[bytes]:
    for number, layout in enumerate(LAYOUTS):
        generator = torch.Generator().manual_seed(number)
        drawn = {name: torch.randn(each.shape, generator=generator) for name, each in layout.items()}
        sparse = {name: tensor * (tensor.abs() > 2) for name, tensor in drawn.items()}
        spike = {name: torch.zeros_like(tensor) for name, tensor in drawn.items()}
        next(tensor for tensor in spike.values() if tensor.numel()).view(-1)[0] = 9e29
        for variant, codec in enumerate(_codecs(family)):
            for given in (drawn, sparse, spike):
                if family == "none":
                    yield bytes([number]) + _array(reply_to_record(Reply(REPLY, given)))
                    continue
                encoded = codec.encode(given, CONTEXT, CONTEXT.rounding())[ENCODED].numpy().tobytes()
                yield bytes([number, variant]) + encoded
                yield bytes([number, variant | WITH_HEADER]) + encoded[HEADER_BYTES:]
                if family in ROTATING and given is spike:
                    at = HEADER_BYTES + ROTATING[family]
                    yield bytes([number, variant]) + encoded[:at] + LOUD + encoded[at + 4 :]


def _array(record: RecordDict) -> bytes:
    return record.array_records["tensors"]["safetensors"].data


def _bytes_of(record: RecordDict) -> bytes:
    """Return what `_message` reads."""
    header = str(record.config_records["cloister"]["json"]).encode()
    arrays = record.array_records["tensors"]
    return bytes([0]) + len(header).to_bytes(2, "little") + header + (_array(record) if arrays else b"")
