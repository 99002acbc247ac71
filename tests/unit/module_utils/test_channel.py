# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Rings and streams of a channel, in memory of this process."""

from __future__ import annotations

import asyncio
import mmap
import multiprocessing
import os
import select
import socket
import struct
import subprocess
import threading
from contextlib import suppress
from functools import partial

import pytest
from ansible_collections.vmbeam.xen.plugins.module_utils import (
    _channel_client,
    _channel_daemon,
    _channel_link,
    _channel_measure,
)
from ansible_collections.vmbeam.xen.plugins.module_utils._channel_link import (
    MORE,
    PIPE,
    WIDE,
    WINDOW,
    Kind,
    Link,
)
from ansible_collections.vmbeam.xen.plugins.module_utils._channel_pages import runs
from ansible_collections.vmbeam.xen.plugins.module_utils._channel_ring import (
    LIMIT,
    PAGE,
    ProtocolError,
    Reader,
    Writer,
    geometry,
    greet,
    greeted,
)

FRAMES = 1 + 2 * (2 * LIMIT // PAGE + 1)
SIZE = geometry(FRAMES)
HEADER = 64
#: Bytes of it that say something.
FIELDS = 24
PATIENCE = 20.0


@pytest.fixture
def memory() -> memoryview:
    shared = memoryview(bytearray(FRAMES * PAGE))
    for side in (0, 1):
        greet(shared, side, FRAMES)
    return shared


# --- rings


def rings(memory, side=0):
    return Reader(memory, side, SIZE), Writer(memory, side, SIZE)


def test_frames_arrive_in_order_and_wrap(memory):
    reader, writer = rings(memory)
    for turn in range(50):
        sent = os.urandom(1 + 977 * turn % LIMIT)
        writer.send(Kind.DATA, turn, sent)
        frame = reader.next()
        assert frame is not None
        assert (frame.kind, frame.stream, frame.data()) == (Kind.DATA, turn, sent)
        reader.release()
        assert reader.next() is None


def test_a_frame_may_fill_what_is_left_exactly(memory):
    reader, writer = rings(memory)
    while (room := writer.room()) >= 0:
        writer.send(Kind.DATA, 1, bytes(room))
    while reader.next():
        reader.release()
    assert writer.room() == LIMIT


def test_each_side_has_a_ring_of_its_own(memory):
    from_source, to_destination = rings(memory, 0)
    from_destination, to_source = rings(memory, 1)
    to_destination.send(Kind.DATA, 0, b"there")
    to_source.send(Kind.DATA, 0, b"back")
    assert from_source.next().data() == b"there"
    assert from_destination.next().data() == b"back"


@pytest.mark.parametrize("index", [SIZE + 1, -1, 1 << 63, 5])
def test_an_index_of_the_other_side_that_cannot_be_is_refused(memory, index):
    reader, _writer = rings(memory)
    memory[:PAGE].cast("Q")[16] = index & (1 << 64) - 1
    with pytest.raises(ProtocolError):
        reader.next()


def test_a_consumer_that_claims_what_was_never_sent_is_refused(memory):
    _reader, writer = rings(memory)
    memory[:PAGE].cast("Q")[24] = 1
    with pytest.raises(ProtocolError):
        writer.room()


@pytest.mark.parametrize("at", [*range(FIELDS), *range(HEADER, HEADER + 4)])
def test_any_changed_byte_is_noticed(memory, at):
    reader, writer = rings(memory)
    writer.send(Kind.DATA, 3, b"abcd")
    memory[PAGE + at] ^= 0x40
    with pytest.raises(ProtocolError):
        reader.next()


def test_a_changed_byte_is_noticed_past_the_end_of_the_ring(memory):
    reader, writer = rings(memory)
    while writer.room() >= LIMIT:
        writer.send(Kind.DATA, 1, bytes(LIMIT))
        reader.next()
        reader.release()
        if writer.space(LIMIT)[1:]:
            break
    writer.send(Kind.DATA, 1, bytes(LIMIT))
    memory[PAGE] ^= 1
    with pytest.raises(ProtocolError, match="checksum"):
        reader.next()


def test_a_replayed_frame_is_refused(memory):
    reader, writer = rings(memory)
    writer.send(Kind.DATA, 3, b"")
    frame = bytes(memory[PAGE : PAGE + HEADER])
    reader.next()
    reader.release()
    memory[PAGE + HEADER : PAGE + 2 * HEADER] = frame
    memory[:PAGE].cast("Q")[16] = 2 * HEADER
    with pytest.raises(ProtocolError, match="bad header"):
        reader.next()


def test_handshake():
    memory = memoryview(bytearray(FRAMES * PAGE))
    assert not greeted(memory, 0, FRAMES)
    greet(memory, 0, FRAMES)
    assert greeted(memory, 0, FRAMES)
    assert not greeted(memory, 1, FRAMES)
    struct.pack_into("<I", memory, 512 + 8, 7)
    with pytest.raises(ProtocolError, match="version 7"):
        greeted(memory, 0, FRAMES)


def test_a_channel_can_be_too_small():
    with pytest.raises(ProtocolError, match="too small"):
        geometry(9)


def test_pages_are_mapped_together_where_the_file_has_them_together():
    offsets = [0, PAGE, 2 * PAGE, 9 * PAGE, 4 * PAGE, 5 * PAGE]
    assert runs(offsets, {0}) == [(0, 3, 0), (3, 1, 9 * PAGE), (4, 2, 4 * PAGE)]
    assert runs([], set()) == []


def test_pages_of_two_allocations_are_not_mapped_together():
    assert runs([0, PAGE, 2 * PAGE], {0, PAGE}) == [(0, 1, 0), (1, 2, PAGE)]


# --- notifications


def test_only_who_waits_is_notified(memory):
    reader, writer = rings(memory)
    writer.send(Kind.DATA, 1, b"")
    assert writer.due()  # nobody has looked yet
    writer.send(Kind.DATA, 1, b"")
    assert not writer.due()
    for _turn in range(2):
        assert reader.next()
        reader.release()
    assert reader.due()  # nobody has said that there is room enough
    assert not reader.ask()
    assert not writer.due()
    writer.send(Kind.DATA, 1, b"")
    writer.send(Kind.DATA, 1, b"")
    assert writer.due()


def test_who_asks_too_late_is_told_that_it_is_there(memory):
    reader, writer = rings(memory)
    assert reader.next() is None
    writer.send(Kind.DATA, 1, b"")
    writer.due()
    assert reader.ask()
    while writer.room() >= 0:
        writer.send(Kind.DATA, 1, bytes(writer.room()))
    while reader.next():
        reader.release()
    reader.due()
    assert writer.ask(LIMIT)


def test_room_is_notified_of_once_when_a_quarter_is_free(memory):
    reader, writer = rings(memory)
    frames = 0
    while writer.room() >= 4096:
        writer.send(Kind.DATA, 1, bytes(4096))
        frames += 1
    assert not writer.ask(4096)
    told = []
    for taken in range(frames):
        assert reader.next()
        reader.release()
        if reader.due():
            told.append(taken)
    assert len(told) == 1
    assert frames // 4 - 1 <= told[0] <= frames // 4 + 1


@pytest.mark.parametrize("word", [80, 88])
@pytest.mark.parametrize("index", [0, 1, SIZE, (1 << 64) - 1])
def test_whatever_the_other_side_waits_for_does_no_harm(memory, word, index):
    reader, writer = rings(memory)
    for _turn in range(3):
        memory[:PAGE].cast("Q")[word] = index
        writer.send(Kind.DATA, 1, b"x")
        assert writer.due() in (True, False)
        assert reader.next().data() == b"x"
        reader.release()
        assert reader.due() in (True, False)


#: Each side sleeps thousands of times; without the second look in ask() one of them does not wake up again.
STRESS_FRAMES = 50_000


def _doze(event: int) -> None:
    if not select.select([event], [], [], PATIENCE)[0]:
        raise TimeoutError("a wake-up was lost")
    os.eventfd_read(event)


def _exchange(memory, events, side: int) -> None:
    """Sends frames of all sizes to the other side, which does the same, and never more than three ahead of it."""
    reader, writer = Reader(memory, 1 - side, SIZE), Writer(memory, side, SIZE)
    received = sent = 0
    while received < STRESS_FRAMES or sent < STRESS_FRAMES:
        size = sent * 7919 % LIMIT if sent % 16 == 0 else 0
        if sent < STRESS_FRAMES and sent < received + 3 and (writer.room() >= size or writer.ask(size)):
            writer.send(Kind.DATA, sent & 0xFFFF, bytes(size))
            sent += 1
        elif frame := reader.next():
            assert frame.stream == received & 0xFFFF
            reader.release()
            received += 1
        elif not reader.ask():
            _doze(events[side])
        if writer.due() | reader.due():
            os.eventfd_write(events[1 - side], 1)


def test_no_wake_up_is_lost_between_two_processes():
    memory = memoryview(mmap.mmap(-1, FRAMES * PAGE))
    events = [os.eventfd(0) for _side in range(2)]
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=_exchange, args=(memory, events, side)) for side in (0, 1)]
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(6 * PATIENCE)
        assert [process.exitcode for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
        for event in events:
            os.close(event)


# --- streams


class Ends:
    """Two links that share memory. The second runs shell commands."""

    def __init__(self, memory) -> None:
        loop = asyncio.get_running_loop()
        self.failures: list[str] = []
        self.notifications = 0
        self.children: list[subprocess.Popen] = []

        def notify(other: int):
            def send() -> None:
                self.notifications += 1
                loop.call_soon(self.wake, other)

            return send

        self.links = [
            Link(
                (Reader(memory, 1 - side, SIZE), Writer(memory, side, SIZE)),
                side,
                notify(1 - side),
                self.run,
                self.failures.append,
            )
            for side in (0, 1)
        ]

    def wake(self, side: int) -> None:
        if self.links[side].wake():
            asyncio.get_running_loop().call_soon(self.wake, side)

    def run(self, stream, request):
        if "shell" not in request:
            raise ValueError("no shell")
        child = subprocess.Popen(["sh", "-c", request["shell"]], **dict.fromkeys(("stdin", "stdout", "stderr"), -1))
        self.children.append(child)
        ends = [os.dup(pipe.fileno()) for pipe in (child.stdin, child.stdout, child.stderr)]
        for pipe in (child.stdin, child.stdout, child.stderr):
            pipe.close()
        stream.attach(sources={Kind.DATA: ends[1], Kind.ERROR: ends[2]}, sinks={Kind.DATA: ends[0]})
        loop = asyncio.get_running_loop()
        process = os.pidfd_open(child.pid)

        def exited() -> None:
            loop.remove_reader(process)
            os.close(process)
            stream.exited(child.wait())

        loop.add_reader(process, exited)
        return lambda _outcome: None

    def call(self, shell: str, side: int = 0):
        """The stream, pipes to its input and from its output and error, and what it comes to."""
        outcome = asyncio.get_running_loop().create_future()
        stream = self.links[side].call({"shell": shell}, outcome.set_result)
        pipes = [os.pipe() for _stream in range(3)]
        stream.attach(sources={Kind.DATA: pipes[0][0]}, sinks={Kind.DATA: pipes[1][1], Kind.ERROR: pipes[2][1]})
        return stream, (pipes[0][1], pipes[1][0], pipes[2][0]), outcome


def within(coroutine):
    async def bounded():
        async with asyncio.timeout(PATIENCE):
            return await coroutine

    return asyncio.run(bounded())


async def everything(fd: int) -> bytes:
    return await asyncio.to_thread(lambda: open(fd, "rb").read())


def test_a_command_gets_its_input_and_gives_output_error_and_code(memory):
    async def body():
        ends = Ends(memory)
        _stream, (to, out, err), outcome = ends.call("cat; echo oops >&2; exit 3")
        os.write(to, b"hello")
        os.close(to)
        assert await outcome == 3
        assert await everything(out) == b"hello"
        assert await everything(err) == b"oops\n"
        assert [link.streams for link in ends.links] == [0, 0]

    within(body())


@pytest.mark.parametrize("side", [0, 1])
def test_many_megabytes_pass_both_ways(memory, side):
    data = os.urandom(5 << 20)

    async def body():
        ends = Ends(memory)
        _stream, (to, out, _err), outcome = ends.call("cat", side)

        def feed() -> None:
            with open(to, "wb") as pipe:
                pipe.write(data)

        _fed, received = await asyncio.gather(asyncio.to_thread(feed), everything(out))
        assert received == data
        assert await outcome == 0
        # Not one for each thing that there is to know.
        assert ends.notifications < 2 * 2 * len(data) / (PAGE << 3)

    within(body())


def test_a_stream_that_nobody_reads_does_not_hold_up_another(memory):
    async def body():
        ends = Ends(memory)
        stuck = ends.call("cat /dev/zero")
        _stream, (to, out, _err), outcome = ends.call("cat")
        os.write(to, b"still here")
        os.close(to)
        assert await outcome == 0
        assert await everything(out) == b"still here"
        stuck[0].reset("enough")
        assert await stuck[2] == "enough"
        while ends.links[1].streams:
            await asyncio.sleep(0)
        # It wrote into a pipe that nobody has any more.
        assert await asyncio.to_thread(ends.children[0].wait) != 0

    within(body())


def test_a_caller_that_goes_away_ends_the_stream(memory):
    async def body():
        ends = Ends(memory)
        _stream, (to, out, _err), outcome = ends.call("cat")
        os.close(out)
        os.write(to, b"x")
        assert "gone" in await outcome
        assert await asyncio.to_thread(ends.children[0].wait) == 0

    within(body())


def test_a_request_can_be_refused(memory):
    async def body():
        ends = Ends(memory)
        outcome = asyncio.get_running_loop().create_future()
        ends.links[0].call({}, outcome.set_result)
        assert await outcome == "refused: no shell"
        assert not ends.failures

    within(body())


def test_more_than_there_is_room_for_ends_the_channel(memory):
    async def body():
        ends = Ends(memory)
        _stream, _pipes, outcome = ends.call("sleep 100")
        while not ends.children:
            await asyncio.sleep(0)
        writer = ends.links[0]._writer
        # It would notice that it is given credit for what it had none for.
        ends.links[0].wake = lambda: False
        left = WINDOW + MORE + LIMIT + PIPE
        while left > 0 and not ends.failures:
            if writer.room() >= LIMIT:
                writer.send(Kind.DATA, 0, bytes(LIMIT))
                left -= LIMIT
            ends.links[1].wake()
            await asyncio.sleep(0)
        assert "room" in ends.failures[0]
        ends.children[0].kill()
        ends.links[0].fail("test")
        assert await outcome == "test"

    within(body())


def test_some_streams_may_have_more_in_flight_and_all_of_them_not_too_much(memory):
    async def body():
        ends = Ends(memory)
        calls = [ends.call("cat > /dev/null") for _stream in range(WIDE + 2)]
        poured = threading.Barrier(len(calls))
        fed = [
            asyncio.to_thread(_pour, to, WINDOW + MORE if number else 4096, poured)
            for number, (_stream, (to, _out, _err), _outcome) in enumerate(calls)
        ]
        windows: set[int] = set()
        gathered = asyncio.gather(*fed)
        while not gathered.done():
            windows.add(sum(stream.window - WINDOW for stream in ends.links[1]._streams.values()))
            await asyncio.sleep(0)
        assert max(windows) == WIDE * MORE
        assert await asyncio.gather(*(outcome for _stream, _pipes, outcome in calls)) == [0] * len(calls)
        assert not ends.failures
        assert Link._wide == 0

    within(body())


def test_streams_of_all_channels_have_that_much_more_between_them(memory):
    async def body():
        both = [Ends(memory), Ends(memoryview(bytearray(memory)))]
        calls = [ends.call("cat > /dev/null") for ends in both for _stream in range(WIDE)]
        poured = threading.Barrier(len(calls))
        fed = [asyncio.to_thread(_pour, to, WINDOW + MORE, poured) for _stream, (to, _out, _err), _outcome in calls]
        windows: set[int] = set()
        gathered = asyncio.gather(*fed)
        while not gathered.done():
            takers = [stream for ends in both for stream in ends.links[1]._streams.values()]
            windows.add(sum(stream.window - WINDOW for stream in takers))
            await asyncio.sleep(0)
        assert max(windows) == WIDE * MORE
        assert await asyncio.gather(*(outcome for _stream, _pipes, outcome in calls)) == [0] * len(calls)
        assert Link._wide == 0

    within(body())


def _pour(fd: int, size: int, poured: threading.Barrier | None = None) -> None:
    """Writes so many bytes and ends the input; if a barrier is given, after all others have written theirs."""
    with open(fd, "wb") as pipe:
        pipe.write(bytes(size))
        pipe.flush()
        if poured:
            poured.wait(PATIENCE)


def test_a_stream_of_which_a_pipe_is_full_may_have_no_more_in_flight(memory):
    async def body():
        ends = Ends(memory)
        stream, (to, _out, _err), _outcome = ends.call("exec sleep 60")
        fed = asyncio.create_task(asyncio.to_thread(_pour, to, WINDOW + PIPE))
        while ends.links[1].bytes["received"] < WINDOW + PIPE:
            await asyncio.sleep(0)
        await fed
        assert [taker.window for taker in ends.links[1]._streams.values()] == [WINDOW]
        stream.reset("enough")
        ends.children[0].kill()
        await asyncio.to_thread(ends.children[0].wait)

    within(body())


def test_memory_that_turns_to_zeros_ends_the_channel(memory):
    async def body():
        ends = Ends(memory)
        _stream, (to, _out, _err), outcome = ends.call("cat")
        os.write(to, b"x")
        while not ends.links[1].bytes["received"]:
            await asyncio.sleep(0)
        memory[:] = bytes(len(memory))
        ends.links[1].wake()
        assert "protocol error" in ends.failures[0]
        await asyncio.to_thread(ends.children[0].wait)
        # The daemon finds out by asking the hypervisor.
        ends.links[0].fail("aborted")
        assert await outcome == "aborted"

    within(body())


def test_a_side_that_is_silent_is_given_up(memory, monkeypatch):
    monkeypatch.setattr(_channel_link, "QUIET", 0.05)
    monkeypatch.setattr(_channel_link, "DEAD", 0.2)

    async def body():
        ends = Ends(memory)
        ends.links[1].wake = lambda: False
        _stream, _pipes, outcome = ends.call("cat")
        assert "silent" in await outcome

    within(body())


def test_a_side_that_answers_is_not_given_up(memory, monkeypatch):
    monkeypatch.setattr(_channel_link, "QUIET", 0.05)
    monkeypatch.setattr(_channel_link, "DEAD", 0.5)

    async def body():
        ends = Ends(memory)
        _stream, (to, _out, _err), outcome = ends.call("cat")
        await asyncio.sleep(1.0)
        assert not outcome.done()
        os.close(to)
        assert await outcome == 0

    within(body())


def frame_of(memory, kind, payload):
    """Sends a frame that no link of ours would send, and lets the other side look at it."""

    async def body():
        ends = Ends(memory)
        ends.links[0]._writer.send(kind, 2, payload)
        ends.links[1].wake()
        await asyncio.sleep(0)
        return ends.failures

    return within(body())


@pytest.mark.parametrize(
    "payload",
    [b"[" * 4000, b"{" + b" " * 4096 + b"}", b"[]", b"not JSON", b"\xff"],
    ids=["deep", "long", "list", "text", "binary"],
)
def test_a_request_that_is_none_ends_the_channel(memory, payload):
    assert "protocol error" in frame_of(memory, Kind.CALL, payload)[0]


def test_a_side_that_asks_and_never_listens_ends_the_channel(memory):
    async def body():
        ends = Ends(memory)
        ends.links[0].wake = lambda: False
        answers = ends.links[1]._writer
        while (room := answers.room()) >= 0:
            answers.send(Kind.PONG, 0, bytes(room))
        writer = ends.links[0]._writer
        while not ends.failures:
            if writer.room() >= 0:
                writer.send(Kind.PING, 0, b"")
            ends.links[1].wake()
            await asyncio.sleep(0)
        assert "does not take" in ends.failures[0]

    within(body())


def test_a_command_that_has_read_enough_tells_its_exit_code(memory):
    async def body():
        ends = Ends(memory)
        _stream, (to, _out, err), outcome = ends.call("exec <&-; echo enough >&2; exit 75")
        with open(to, "wb", buffering=0) as pipe:
            while not outcome.done():
                with suppress(BrokenPipeError):
                    await asyncio.to_thread(pipe.write, bytes(4096))
        assert await outcome == 75
        assert await everything(err) == b"enough\n"

    within(body())


def test_output_may_be_limited(memory):
    async def body():
        ends = Ends(memory)
        outcome = asyncio.get_running_loop().create_future()
        stream = ends.links[0].call({"shell": "cat /dev/zero"}, outcome.set_result)
        stream.end()
        stream.attach(sources={}, sinks={Kind.DATA: os.open("/dev/null", os.O_WRONLY)}, limit=1 << 20)
        assert "more to say" in await outcome

    within(body())


def test_input_that_cannot_be_waited_for_ends_only_its_stream(memory):
    async def body():
        ends = Ends(memory)
        outcome = asyncio.get_running_loop().create_future()
        stream = ends.links[0].call({"shell": "cat"}, outcome.set_result)
        stream.attach(sources={Kind.DATA: os.open("/dev/null", os.O_RDONLY)}, sinks={})
        assert "Use a pipe" in await outcome
        assert not ends.failures

    within(body())


# --- measurements


class FakePages:
    """One side's memory of a channel between two of these."""

    session = 1
    frames = FRAMES

    def __init__(self, memory, side: int) -> None:
        self.memory = memory
        self.side = side
        self.other: _channel_daemon.Channel | None = None

    def join(self) -> bool:
        return True

    def notify(self) -> None:
        asyncio.get_running_loop().call_soon(self.wake_other)

    def wake_other(self) -> None:
        if self.other and self.other.wake():
            self.notify()

    def end(self) -> None:
        self.other = None


def channels():
    """Two daemons' ends of a channel that is up."""
    memory = memoryview(bytearray(FRAMES * PAGE))
    pages = [FakePages(memory, side) for side in (0, 1)]
    both = [_channel_daemon.Channel(None, one, lambda: None, lambda _channel: None) for one in pages]
    for one, other in zip(pages, reversed(both), strict=True):
        one.other = other
    for channel in (*both, both[0]):
        channel.wake()
    assert [channel.status()["up"] for channel in both] == [True, True]
    return both


def test_however_often_the_other_side_notifies_memory_is_asked_for_now_and_then(monkeypatch):
    monkeypatch.setattr(_channel_daemon, "JOIN_PAUSE", 0.01)

    async def body():
        attempts, wanted = [], asyncio.Event()

        class Unshared(FakePages):
            def join(self) -> bool:
                attempts.append(self)
                return False

        channel = _channel_daemon.Channel(None, Unshared(None, 1), wanted.set, lambda _channel: None)
        for _notification in range(100):
            channel.wake()
        assert len(attempts) == 1
        await wanted.wait()  # the notifications that came in the pause
        channel.wake()
        assert len(attempts) == 2
        wanted.clear()
        while channel._pausing:
            await asyncio.sleep(0)
        assert not wanted.is_set()  # none has come since

    within(body())


@pytest.fixture
def little(monkeypatch):
    """Measurements with less memory, that take less time."""
    monkeypatch.setattr(_channel_measure, "SIZE", 2 * LIMIT)
    monkeypatch.setattr(_channel_measure, "WARM", LIMIT)
    drains = []

    class Kept(_channel_measure.Drain):
        def __init__(self, *arguments) -> None:
            super().__init__(*arguments)
            self.memory = self._memory
            drains.append(self)

    monkeypatch.setattr(_channel_daemon, "Drain", Kept)
    return drains


async def measured(channel, seconds: float):
    supply = _channel_measure.Supply(seconds)
    outcome = asyncio.get_running_loop().create_future()
    channel.measure({"command": "measure"}, supply, outcome.set_result)
    return supply, await outcome


@pytest.mark.parametrize("side", [0, 1])
def test_a_measurement_copies_memory_to_the_other_side(little, side):
    async def body():
        both = channels()
        supply, outcome = await measured(both[side], 0.2)
        assert outcome == 0
        result = supply.result()
        assert result["seconds"] >= 0.2
        assert result["mib_per_s"] == pytest.approx(result["bytes"] / (1 << 20) / result["seconds"], rel=0.01)
        # All of it, with that before the clock ran.
        received = both[1 - side].status()["bytes"]["received"]
        assert LIMIT + result["bytes"] <= received < 3 * LIMIT + result["bytes"]
        assert little[0].memory[:LIMIT] == bytes(range(256)) * (LIMIT // 256)
        assert [channel.link.streams for channel in both] == [0, 0]

    within(body())


def test_a_stream_that_has_much_sends_several_frames_each_turn(little):
    class Counted(_channel_measure.Supply):
        turns = reads = 0

        def watch(self, readable) -> None:
            def turn() -> None:
                self.turns += 1
                readable()

            super().watch(turn)

        def read(self, pieces) -> int:
            self.reads += 1
            return super().read(pieces)

    async def body():
        supply = Counted(0.05)
        outcome = asyncio.get_running_loop().create_future()
        channels()[0].measure({"command": "measure"}, supply, outcome.set_result)
        assert await outcome == 0
        assert supply.reads > 1.5 * supply.turns

    within(body())


def test_memory_for_measurements_is_bounded_and_given_back(little):
    async def body():
        source, destination = channels()
        client, daemon = socket.socketpair()
        with client, daemon:
            supply = _channel_measure.Supply(PATIENCE)
            call = partial(source.measure, {"command": "measure"}, supply)
            first = asyncio.create_task(_channel_daemon._outcome(call, daemon))
            while not little:
                await asyncio.sleep(0)
            assert "another measurement" in (await measured(source, 0.1))[1]
            client.close()
            assert await first == {"error": "the client has gone"}
        while destination.link.streams:
            await asyncio.sleep(0)
        assert not little[0]._memory
        assert not supply._memory
        assert (await measured(source, 0.05))[1] == 0

    within(body())


def test_a_measurement_for_which_there_is_no_memory_is_refused(little, monkeypatch):
    class Huge(_channel_measure.Drain):
        def __init__(self, *_arguments) -> None:
            raise MemoryError

    async def body():
        source, _destination = channels()
        with monkeypatch.context() as patched:
            patched.setattr(_channel_daemon, "Drain", Huge)
            assert "too little memory" in (await measured(source, 0.05))[1]
        assert (await measured(source, 0.05))[1] == 0

    within(body())


def test_a_measurement_of_nothing_has_no_result():
    with pytest.raises(ValueError, match="nothing was sent"):
        _channel_measure.Supply(1.0).result()


# --- what another host VM can have run


@pytest.mark.parametrize(
    "request_",
    [
        {},
        {"command": "sh"},
        {"command": ["list"]},
        {"command": "receive"},
        {"command": "receive", "guest": "a; reboot"},
        {"command": "receive", "guest": "../x"},
        {"command": "receive", "guest": "-o"},
        {"command": "receive", "guest": 7},
        {"command": "receive", "guest": "7"},
        {"command": "receive", "guest": "Domain-0"},
    ],
)
def test_other_commands_are_refused(request_):
    with pytest.raises(ValueError, match=r"^(command|guest): "):
        _channel_daemon.command(request_, 1)


@pytest.mark.parametrize("receiver", ["receive", "receive-copy", "restore"])
def test_the_destination_cannot_have_the_source_receive(receiver):
    with pytest.raises(ValueError, match="only the source"):
        _channel_daemon.command({"command": receiver, "guest": "web1"}, 0)


@pytest.mark.parametrize(
    ("receiver", "words"),
    [
        ("receive", ["migrate-receive", "--zero-copy"]),
        ("receive-copy", ["migrate-receive"]),
        ("restore", ["restore", "-p", "/dev/stdin"]),
    ],
)
def test_the_receivers_are_the_modules(receiver, words):
    command, argv = _channel_daemon.command({"command": receiver, "guest": "web1"}, 1)
    assert command.service
    assert argv == ["flock", "-n", "-o", "-E", "75", "/run/lock/vmbeam-receive-web1.lock", "xl", *words]


# --- the command


@pytest.mark.parametrize(
    "arguments",
    [[], ["receive"], ["restore"], ["list", "x"], ["receive", "web1", "1", "2"], ["reboot"], ["status", "-1"]],
)
def test_wrong_usage(arguments):
    assert _channel_client._request(arguments) is None


def test_a_session_may_be_named():
    assert _channel_client._request(["measure", "3"]) == {"command": "measure", "session": 3}
    for receiver in ("receive", "receive-copy", "restore"):
        request = {"command": receiver, "guest": "web1", "session": 3}
        assert _channel_client._request([receiver, "web1", "3"]) == request
