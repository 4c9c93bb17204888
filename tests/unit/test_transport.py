"""The daemon's socket: who may connect, what is dropped, and that it says so."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq
from fakes import ipc_endpoint, until

from smartspec.daemon.transport import SOCKET_MODE, Server


@pytest.fixture
def endpoint() -> Iterator[str]:
    with ipc_endpoint() as made:
        yield made


@pytest.fixture
def server(endpoint: str) -> Iterator[Server]:
    made = Server(endpoint)
    yield made
    made.close()


@pytest.fixture
def client(endpoint: str, server: Server) -> Iterator[zmq.Socket[bytes]]:
    context = zmq.Context()
    made = context.socket(zmq.DEALER)
    made.linger = 0
    made.connect(endpoint)
    yield made
    made.close()
    context.term()


def peer_of(server: Server, client: zmq.Socket[bytes]) -> bytes:
    client.send(b"here")
    assert server.wait(5.0)
    received = server.receive()
    assert received is not None and received[1] == b"here"
    return received[0]


def test_socket_is_for_owner_and_group(endpoint: str, server: Server) -> None:
    path = Path(endpoint.removeprefix("ipc://"))
    assert stat.S_IMODE(path.stat().st_mode) & 0o666 == SOCKET_MODE
    assert not stat.S_IMODE(path.stat().st_mode) & stat.S_IRWXO


def test_connection_is_closed_when_a_frame_is_too_large() -> None:
    with ipc_endpoint() as endpoint, zmq.Context() as context:
        server = Server(endpoint, max_frame_bytes=5000)
        for size, received in ((5000, True), (5001, False)):
            with context.socket(zmq.DEALER) as client:
                client.linger = 0
                client.connect(endpoint)
                client.send(b"x" * size)
                assert server.wait(5.0 if received else 0.5) == received
                if received:
                    assert server.receive() is not None
        server.close()


def test_frames_go_both_ways(server: Server, client: zmq.Socket[bytes]) -> None:
    peer = peer_of(server, client)
    assert server.send(peer, b"there")
    assert client.poll(5000) and client.recv() == b"there"
    assert server.receive() is None
    assert not server.wait(0.01)


def test_message_of_several_frames_reads_as_an_empty_one(
    server: Server, client: zmq.Socket[bytes]
) -> None:
    client.send_multipart((b"one", b"two"))
    assert server.wait(5.0)
    received = server.receive()
    assert received is not None and received[1] == b""


def test_send_says_so_when_the_peer_has_gone(server: Server, client: zmq.Socket[bytes]) -> None:
    assert not server.send(b"nobody", b"x")
    assert server.num_unsendable == 1
    peer = peer_of(server, client)
    client.close()
    until(lambda: not server.send(peer, b"x"))


def test_frames_are_dropped_and_counted_when_the_peer_does_not_read(
    server: Server, client: zmq.Socket[bytes]
) -> None:
    peer = peer_of(server, client)
    for _ in range(5000):
        assert server.send(peer, bytes(1000))  # not gone, and never waited for
    assert server.num_unsendable > 0
