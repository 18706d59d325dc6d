"""A site that lies: its node, its relay and its socket are real, behind them is somebody else's program.

What leaves is a Flower message like any other, through proxy and SuperLink to the ServerApp.
"""

import json
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from flwr.app import Array, RecordDict

from protocol.cards import SiteCard
from protocol.frames import decode_frame, encode_frame, receive_frame, send_frame
from protocol.instructions import Instruction, Reply, ReplyHeader
from protocol.records import card_to_record, record_to_instruction, reply_to_record

__all__ = ["FORGERIES", "Forger"]

_LARGE = 6 << 20
"""Values of the oversized tensor: 24 MiB, sixty times the honest update."""


def _honest(asked: Instruction, site: str) -> Reply:
    header = asked.header
    return Reply(
        ReplyHeader(
            status="trained",
            site=site,
            round=header.round,
            plan_digest=header.plan_digest,
            base_digest=header.base_digest,
            adapter_digest=header.adapter_digest,
            steps=header.plan.local.steps,
        ),
        {name: torch.full_like(tensor, 0.01) for name, tensor in asked.tensors.items()},
    )


def _with_first(reply: Reply, tensor: Callable[[torch.Tensor], torch.Tensor]) -> Reply:
    first = min(reply.tensors)
    return replace(reply, tensors={**reply.tensors, first: tensor(reply.tensors[first])})


def _not_finite(reply: Reply) -> RecordDict:
    return reply_to_record(_with_first(reply, lambda tensor: torch.full_like(tensor, float("nan"))))


def _terabytes_in_the_header(reply: Reply) -> RecordDict:
    """One entry of the packed tensors' header claims 4 TB; its length is right."""
    record = reply_to_record(reply)
    arrays = record.array_records["tensors"]
    data = arrays["safetensors"].data
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header[min(reply.tensors)]["shape"] = [1_000_000, 1_000_000]
    written = json.dumps(header).encode()
    forged = len(written).to_bytes(8, "little") + written + data[8 + size :]
    arrays["safetensors"] = Array("uint8", (len(forged),), "safetensors", forged)
    return record


def _huge_count(reply: Reply) -> RecordDict:
    return reply_to_record(replace(reply, header=reply.header.model_copy(update={"steps": 10**15})))


def _oversized(reply: Reply) -> RecordDict:
    return reply_to_record(_with_first(reply, lambda tensor: torch.ones(_LARGE)))


FORGERIES: tuple[tuple[str, Callable[[Reply], RecordDict]], ...] = (
    ("not_finite", _not_finite),
    ("malformed_reply", _terabytes_in_the_header),
    ("wrong_steps", _huge_count),
    ("wrong_shape", _oversized),
)
"""Round after round, what is sent, and the code that the server must find."""


class Forger:
    """Answers at a site's socket, from this process."""

    def __init__(self, path: Path, site: str) -> None:
        self._site = site
        path.parent.mkdir(mode=0o700, parents=True)
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(path))
        self._socket.listen()
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        self._socket.close()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._socket.accept()
                threading.Thread(target=self._converse, args=(connection,), daemon=True).start()

    def _converse(self, connection: socket.socket) -> None:
        with connection, suppress(OSError):
            frame = receive_frame(connection, 1 << 30)
            if frame is not None:
                send_frame(connection, encode_frame("answer", self._answer(*decode_frame(frame))))

    def _answer(self, kind: str, record: RecordDict) -> RecordDict:
        if kind == "query":
            return card_to_record(SiteCard(cloister_version="0", site=self._site, published_records=300))
        asked = record_to_instruction(record)
        _, forge = FORGERIES[asked.header.round - 1]
        return forge(_honest(asked, self._site))
