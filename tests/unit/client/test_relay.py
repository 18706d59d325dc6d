"""A site's process that hangs, that dies, and that says it is still at work, as its relay sees it."""

import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from flwr.app import RecordDict

from client.relay import relay
from protocol.errors import SiteRefusal
from protocol.frames import ALIVE, encode_frame, receive_frame, refusal_record, send_frame

Behave = Callable[[socket.socket, threading.Event], None]
QUIET_S = 0.2


def hang(_: socket.socket, over: threading.Event) -> None:
    """Accept, and do nothing: not even read."""
    over.wait()


def hang_after_alive(connection: socket.socket, over: threading.Event) -> None:
    receive_frame(connection, 1 << 20)
    send_frame(connection, ALIVE)
    over.wait()


def hang_in_the_answer(connection: socket.socket, over: threading.Event) -> None:
    receive_frame(connection, 1 << 20)
    connection.sendall((1000).to_bytes(8, "big") + b"half")
    over.wait()


def die(connection: socket.socket, _: threading.Event) -> None:
    receive_frame(connection, 1 << 20)


def answer_after_a_while(connection: socket.socket, over: threading.Event) -> None:
    receive_frame(connection, 1 << 20)
    for _ in range(6):
        send_frame(connection, ALIVE)
    send_frame(connection, encode_frame("answer", refusal_record("busy", "harbor")))


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Callable[[Behave], Path]]:
    """Start a site's socket that behaves in some way to the first who connects."""
    path, over, threads = tmp_path / "s", threading.Event(), list[threading.Thread]()
    with socket.socket(socket.AF_UNIX) as listener:

        def start(behave: Behave) -> Path:
            listener.bind(str(path))
            listener.listen()

            def serve() -> None:
                connection, _ = listener.accept()
                with connection:
                    behave(connection, over)

            threads.append(threading.Thread(target=serve, daemon=True))
            threads[-1].start()
            return path

        yield start
        over.set()
        for thread in threads:
            thread.join(600)
            assert not thread.is_alive()


@pytest.mark.parametrize("behave", [hang, hang_after_alive, hang_in_the_answer])
def test_a_process_that_hangs_is_silent(behave: Behave, site: Callable[[Behave], Path]) -> None:
    with pytest.raises(SiteRefusal, match=r"said nothing for 0\.2 s") as refused:
        relay(site(behave), "train", RecordDict(), silence_s=QUIET_S)
    assert refused.value.code == "site_silent"


def test_a_process_that_ends_is_down(site: Callable[[Behave], Path]) -> None:
    with pytest.raises(SiteRefusal, match="ended before it answered") as refused:
        relay(site(die), "train", RecordDict(), silence_s=600)
    assert refused.value.code == "site_down"


def test_a_process_at_work_is_waited_for(site: Callable[[Behave], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each word that it is alive starts the silence that is allowed anew."""
    allowed: list[float | None] = []

    def receive(connection: socket.socket, most: int) -> bytes | None:
        allowed.append(connection.gettimeout())
        return receive_frame(connection, most)

    monkeypatch.setattr("client.relay.receive_frame", receive)
    answer = relay(site(answer_after_a_while), "train", RecordDict(), silence_s=600)
    assert '"code": "busy"' in str(answer.config_records["cloister"]["json"])
    assert allowed == [600] * 7
