"""Measures how fast bytes get from one guest dom0 to the other: through the channel, over the network, by memcpy.

Runs in a guest dom0, as a program on standard input: throughput.py channel SESSION | pipes SESSION |
network ADDRESS PORT | sink PORT | memcpy | load. Prints MiB per second (sink and load: "ready").

channel: memory of one dom0's daemon to memory of the other's. pipes: standard input of a command in one dom0 to that of
a command in the other, through both daemons. load: does what memcpy does for so long that the other dom0 can measure
beside it, or until nobody reads any more what it prints.
"""

import functools
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable

MIB = 1 << 20
SECONDS = 10.0
#: Of a load: with the time that the other side takes to begin.
LOAD_SECONDS = 60


def measure(send: Callable[[], object], seconds: float = SECONDS) -> tuple[float, int]:
    """Call send(), which moves a MiB, for some seconds; return when that began, and how often."""
    count, start = 0, time.monotonic()
    while time.monotonic() - start < seconds:
        send()
        count += 1
    return start, count


def channel(session: str) -> float:
    found = subprocess.run(["vmbeam-channel", "measure", session], stdout=subprocess.PIPE, check=True)
    return float(json.loads(found.stdout)["mib_per_s"])


def pipes(session: str) -> float:
    block = bytes(MIB)
    with subprocess.Popen(["vmbeam-channel", "discard", session], stdin=subprocess.PIPE) as sender:
        assert sender.stdin is not None  # noqa: S101 - for the type checker
        for _ in range(2):  # until everything is running, and buffers are full
            sender.stdin.write(block)
        start, count = measure(functools.partial(sender.stdin.write, block))
        sender.stdin.close()
        if sender.wait():
            sys.exit("the channel has failed")
    return count / (time.monotonic() - start)


def network(address: str, port: str) -> float:
    block = bytes(MIB)
    with socket.create_connection((address, int(port)), 60) as sender:
        for _ in range(2):
            sender.sendall(block)
        start, count = measure(lambda: sender.sendall(block))
        sender.shutdown(socket.SHUT_WR)
        sender.recv(1)
    return count / (time.monotonic() - start)


def sink(port: str) -> None:
    block = bytearray(256 << 10)
    with socket.create_server(("", int(port))) as server:
        print("ready", flush=True)
        receiver, _address = server.accept()
        with receiver:
            while receiver.recv_into(block):
                pass


def copier() -> Callable[[], None]:
    """Return what copies a MiB at each call."""
    # Larger than the caches, as a migration is.
    source = memoryview(bytes(range(256)) * (64 * MIB >> 8))
    # Filled, so that its pages are there.
    target = memoryview(bytearray(b"x") * (64 * MIB))
    place = 0

    def copy() -> None:
        nonlocal place
        target[place : place + MIB] = source[place : place + MIB]
        place = (place + MIB) % (64 * MIB)

    return copy


def memcpy() -> float:
    start, count = measure(copier())
    return count / (time.monotonic() - start)


def load() -> None:
    # Else Python ignores the signal that ends it.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    copy = copier()
    for _ in range(LOAD_SECONDS):
        print("ready", flush=True)
        measure(copy, 1.0)


ways: dict[str, Callable[..., float | None]] = {
    "channel": channel,
    "pipes": pipes,
    "network": network,
    "sink": sink,
    "memcpy": memcpy,
    "load": load,
}
result = ways[sys.argv[1]](*sys.argv[2:])
if result is not None:
    print(round(result, 3))
