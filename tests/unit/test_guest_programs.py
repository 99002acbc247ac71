"""The lab guests' programs must notice what a bad migration does.

They are compiled here as for the guests, and run on this machine.
"""

import contextlib
import http.client
import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

BUILD = Path(__file__).resolve().parents[2] / "lab" / "guests" / "build"
PAGE = 4096
RECORD = 512


@pytest.fixture(scope="session")
def tools(tmp_path_factory):
    """The path of the compiled program."""
    target = tmp_path_factory.mktemp("guest") / "guest-tools"
    subprocess.run([sys.executable, BUILD, "programs", "--output", target], check=True)
    return target


@contextlib.contextmanager
def running(*command):
    """A program that runs during the block."""
    process = subprocess.Popen([str(word) for word in command], stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def read_json(path):
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None


def await_status(path, condition, timeout=20):
    """The status file's content once it is as wanted; fails after timeout seconds."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        status = read_json(path)
        if status and condition(status):
            return status
        time.sleep(0.02)
    pytest.fail(f"not reached in {timeout} s: {read_json(path)}")


class Memory:
    """The pages of a running memcheck, as a migration could spoil them."""

    def __init__(self, process, mib):
        self._path = f"/proc/{process.pid}/mem"
        for line in Path(f"/proc/{process.pid}/maps").read_text().splitlines():
            start, end = (int(number, 16) for number in re.match(r"(\w+)-(\w+)", line).groups())
            # Neighbouring mappings may have been merged into one.
            if end - start >= mib << 20:
                self._start = start
                self.pages = (mib << 20) // PAGE
                break
        else:
            raise AssertionError("no such mapping")

    def read(self, page):
        with open(self._path, "rb", buffering=0) as memory:
            memory.seek(self._start + page * PAGE)
            return memory.read(PAGE)

    def write(self, page, data, offset=0):
        with open(self._path, "r+b", buffering=0) as memory:
            memory.seek(self._start + page * PAGE + offset)
            memory.write(data)


@pytest.fixture
def memcheck(tools, tmp_path):
    """A memcheck over 1 MiB that is asleep, its control file and its status file."""
    status, control = tmp_path / "memory", tmp_path / "rate"
    with running(
        tools, "memcheck", "--mib", "1", "--no-lock", "--rate-file", control,
        "--status", status, "--status-ms", "50",
    ) as process:  # fmt: skip
        await_status(status, lambda memory: memory["pages"] == 256)
        yield Memory(process, 1), control, status


def one_round(control, status):
    """Let every page be verified at least once; the status after that."""
    verified = read_json(status)["verified"]
    control.write_text("2000\n")
    return await_status(status, lambda memory: memory["verified"] >= verified + 256)


def test_memory_without_faults_has_no_errors(memcheck):
    _, control, status = memcheck
    result = one_round(control, status)
    assert result["errors"] == 0
    assert result["last_error"] is None
    assert result["rate"] == 2000
    assert result["round"] >= 2


@pytest.mark.parametrize("offset", [0, 8, 16, 24, 2000, PAGE - 1])
def test_memory_flipped_bit_is_corrupt(memcheck, offset):
    memory, control, status = memcheck
    memory.write(77, bytes([memory.read(77)[offset] ^ 1]), offset)
    result = one_round(control, status)
    assert (result["errors"], result["corrupt"]) == (1, 1)
    assert result["last_error"]["kind"] == "corrupt"
    assert result["last_error"]["page"] == 77


@pytest.mark.parametrize("byte", [b"\0", b"\xff"])
def test_memory_uniform_page_is_corrupt(memcheck, byte):
    memory, control, status = memcheck
    memory.write(0, byte * PAGE)
    assert one_round(control, status)["corrupt"] == 1


def test_memory_swapped_pages_are_misplaced(memcheck):
    memory, control, status = memcheck
    left, right = memory.read(3), memory.read(200)
    memory.write(3, right)
    memory.write(200, left)
    assert one_round(control, status)["misplaced"] == 2


def test_memory_old_copy_of_a_page_is_stale(memcheck):
    """What a forgotten dirty page looks like: sound in itself, but old."""
    memory, control, status = memcheck
    old = [memory.read(page) for page in range(memory.pages)]
    one_round(control, status)
    control.write_text("0\n")
    await_status(status, lambda status: status["rate"] == 0)
    memory.write(5, old[5])
    result = one_round(control, status)
    assert (result["errors"], result["stale"]) == (1, 1)
    assert result["last_error"]["found"] < result["last_error"]["expected"]


def test_memory_rate_is_kept(memcheck):
    _, control, status = memcheck
    control.write_text("400")
    result = await_status(status, lambda status: status["rate"] == 400 and status["achieved_rate"] > 0)
    result = await_status(status, lambda status: status["updated"] >= result["updated"] + 1)
    assert result["achieved_rate"] <= 600


@pytest.mark.parametrize("rate", ["-1", "much", "1000001", ""])
def test_memory_senseless_rate_is_ignored(memcheck, rate):
    _, control, status = memcheck
    control.write_text("20")
    await_status(status, lambda status: status["rate"] == 20)
    control.write_text(rate)
    later = read_json(status)["updated"] + 0.2
    assert await_status(status, lambda status: status["updated"] > later)["rate"] == 20


def check(tools, path, acknowledged=0):
    """The checker's exit status and its findings."""
    result = subprocess.run(
        [tools, "diskseq", "check", path, "--acknowledged", str(acknowledged)],
        stdout=subprocess.PIPE,
        check=False,
    )
    return result.returncode, json.loads(result.stdout)


def write_records(tools, ring, status, count):
    """Run the writer until it has acknowledged count records more; its last status."""
    status.unlink(missing_ok=True)
    with running(tools, "diskseq", "run", ring, "--interval-ms", "1", "--status", status):
        result = await_status(status, lambda disk: disk["sequence"] >= disk["recovered"] + count)
    return read_json(status) or result


@pytest.fixture
def ring(tools, tmp_path):
    """An empty ring of 64 records."""
    path = tmp_path / "sequence"
    subprocess.run([tools, "diskseq", "format", path, "--slots", "64"], check=True)
    return path


def test_disk_empty_ring_is_sound(tools, ring):
    returncode, found = check(tools, ring)
    assert returncode == 0
    assert (found["empty"], found["highest"], found["gaps"]) == (64, 0, [])


def test_disk_format_is_reproducible(tools, ring, tmp_path):
    other = tmp_path / "other"
    subprocess.run([tools, "diskseq", "format", other, "--slots", "64"], check=True)
    assert other.read_bytes() == ring.read_bytes()


@pytest.mark.parametrize("count", [20, 150])
def test_disk_written_sequence_is_sound(tools, ring, tmp_path, count):
    acknowledged = write_records(tools, ring, tmp_path / "disk", count)["sequence"]
    returncode, found = check(tools, ring, acknowledged)
    assert returncode == 0
    assert found["contiguous"] == found["highest"] >= acknowledged
    assert found["lowest"] == max(1, found["highest"] - 63)


def test_disk_sequence_goes_on_after_a_restart(tools, ring, tmp_path):
    first = write_records(tools, ring, tmp_path / "disk", 10)["sequence"]
    second = write_records(tools, ring, tmp_path / "disk", 10)
    assert second["recovered"] >= first
    assert second["readback_errors"] == second["write_errors"] == 0
    assert check(tools, ring, second["sequence"])[0] == 0


def test_disk_lost_acknowledged_write_is_found(tools, ring, tmp_path):
    highest = write_records(tools, ring, tmp_path / "disk", 10)["sequence"]
    highest = check(tools, ring)[1]["highest"]
    returncode, found = check(tools, ring, highest + 1)
    assert returncode == 1
    assert not found["sound"]


def slot_of(ring, sequence):
    return sequence % 64 * RECORD


def overwrite(path, offset, data):
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


@pytest.fixture
def written(tools, ring, tmp_path):
    """A ring with some records, not full, and its content before."""
    before = ring.read_bytes()
    write_records(tools, ring, tmp_path / "disk", 10)
    assert check(tools, ring)[1]["highest"] < 60, "too fast for this test"
    return ring, before


def test_disk_flipped_byte_is_corrupt(tools, written):
    ring, _ = written
    byte = ring.read_bytes()[slot_of(ring, 4) + 300]
    overwrite(ring, slot_of(ring, 4) + 300, bytes([byte ^ 0x10]))
    returncode, found = check(tools, ring)
    assert (returncode, found["corrupt"], found["gaps"], found["contiguous"]) == (1, 1, [[4, 4]], 3)


def test_disk_torn_record_is_corrupt(tools, written):
    ring, before = written
    offset = slot_of(ring, 6) + 256
    overwrite(ring, offset, before[offset : offset + 256])
    assert check(tools, ring)[1]["corrupt"] == 1


def test_disk_lost_write_is_a_gap(tools, written):
    ring, before = written
    for sequence in (3, 4, 8):
        offset = slot_of(ring, sequence)
        overwrite(ring, offset, before[offset : offset + RECORD])
    returncode, found = check(tools, ring)
    assert (returncode, found["gaps"], found["missing"], found["contiguous"]) == (1, [[3, 4], [8, 8]], 3, 2)


def test_disk_lost_overwrite_is_outdated(tools, ring, tmp_path):
    write_records(tools, ring, tmp_path / "disk", 10)
    old = ring.read_bytes()
    write_records(tools, ring, tmp_path / "disk", 100)
    overwrite(ring, slot_of(ring, 5), old[slot_of(ring, 5) :][:RECORD])
    returncode, found = check(tools, ring)
    assert (returncode, found["outdated"], found["missing"]) == (1, 1, 1)


def test_disk_duplicate_is_found(tools, written):
    ring, _ = written
    overwrite(ring, slot_of(ring, 62), ring.read_bytes()[slot_of(ring, 5) :][:RECORD])
    returncode, found = check(tools, ring)
    assert (returncode, found["duplicates"]) == (1, 1)


def test_disk_truncated_ring_is_found(tools, written):
    ring, _ = written
    os.truncate(ring, slot_of(ring, 5) + 100)
    returncode, found = check(tools, ring)
    assert returncode == 1
    assert found["corrupt"] == 1


def test_disk_something_else_is_not_sound(tools, tmp_path):
    other = tmp_path / "other"
    other.write_bytes(b"\0" * 8192)
    assert check(tools, other)[0] == 1


def test_disk_ring_is_found_in_a_raw_disk(tools, written, tmp_path):
    """The checker needs no file system: an image of the whole disk will do."""
    ring, _ = written
    disk = tmp_path / "disk.raw"
    disk.write_bytes(b"\xa5" * 12288 + ring.read_bytes() + b"\0" * 8192)
    assert check(tools, disk) == check(tools, ring)


@pytest.mark.parametrize("interval", ["20", "31"])
def test_disk_second_writer_is_noticed(tools, ring, tmp_path, interval):
    """Two guests with one identity: one of them at least sees the other."""
    one, other = tmp_path / "disk", tmp_path / "other"
    with running(tools, "diskseq", "run", ring, "--interval-ms", "20", "--status", one):
        await_status(one, lambda disk: disk["sequence"] >= 2)
        with running(tools, "diskseq", "run", ring, "--interval-ms", interval, "--status", other):
            await_status(
                other,
                lambda _: any(
                    disk["readback_errors"] + disk["foreign_records"] for disk in map(read_json, (one, other))
                ),
            )


def test_disk_back_in_time_is_noticed(tools, ring, tmp_path):
    """The disk of another host, or of another day, under a running guest."""
    before, status = ring.read_bytes(), tmp_path / "disk"
    with running(tools, "diskseq", "run", ring, "--interval-ms", "20", "--status", status):
        await_status(status, lambda disk: disk["sequence"] >= 2)

        def noticed(disk):
            # Between the program's read and its write the change is lost: put the past back each time.
            overwrite(ring, 0, before)
            return disk["readback_errors"] >= 1

        await_status(status, noticed)


def test_disk_is_left_alone_while_that_is_wanted(tools, ring, tmp_path):
    status, pause = tmp_path / "disk", tmp_path / "pause"
    argv = ["diskseq", "run", ring, "--interval-ms", "1", "--status", status, "--pause-file", pause]
    with running(tools, *argv):
        await_status(status, lambda disk: disk["sequence"] >= 2)
        pause.write_text("1\n")
        await_status(status, lambda disk: disk["paused"])
        before = ring.read_bytes()
        time.sleep(0.3)
        assert ring.read_bytes() == before
        pause.write_text("0\n")
        await_status(status, lambda disk: not disk["paused"])
    assert ring.read_bytes() != before


def test_data_left_behind_is_checked_on_the_disk(tools, tmp_path):
    disk, control, status = tmp_path / "image", tmp_path / "control", tmp_path / "behind"
    disk.write_bytes(bytes(4 << 20))
    with running(tools, "behind", disk, "--mib", "1", "--control", control, "--status", status):
        for flips in (0, 2):
            control.write_text("write\n")
            assert await_status(status, lambda behind: behind["done"] == "write")["pages"] == 256
            for page in range(flips):
                overwrite(disk, (3 << 20) + page * PAGE, b"other")
            control.write_text("check\n")
            assert await_status(status, lambda behind: behind["done"] == "check")["wrong"] == flips
    assert not any(disk.read_bytes()[: 3 << 20])


def test_ticks_are_counted_and_reset(tools, tmp_path):
    status, reset = tmp_path / "ticks", tmp_path / "reset"
    with running(
        tools, "ticker", "--interval-ms", "10", "--reset-file", reset,
        "--status", status, "--status-ms", "50",
    ):  # fmt: skip
        first = await_status(status, lambda ticks: ticks["ticks"] >= 20)
        assert first["reset"] == ""
        assert first["longest_gap_ms"]["monotonic"] >= 10
        reset.write_text("run-1\n")
        second = await_status(status, lambda ticks: ticks["reset"] == "run-1")
        assert second["since"] > first["since"]


def test_ticks_show_a_pause(tools, tmp_path):
    status = tmp_path / "ticks"
    command = (tools, "ticker", "--interval-ms", "10", "--long-ms", "700", "--status-ms", "50")
    with running(*command, "--status", status) as process:
        before = await_status(status, lambda ticks: ticks["ticks"] >= 20)
        process.send_signal(19)  # SIGSTOP
        time.sleep(0.8)
        process.send_signal(18)  # SIGCONT
        after = await_status(status, lambda ticks: ticks["long_gaps"] > before["long_gaps"])
        for clock in ("monotonic", "boottime", "realtime"):
            assert after["longest_gap_ms"][clock] >= 800


@pytest.fixture
def service(tools, tmp_path):
    """The HTTP service on a free port: (port, status directory, control directory)."""
    (tmp_path / "control").mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with running(
        tools, "statusd", "--name", "g1", "--directory", tmp_path, "--control", tmp_path / "control",
        "--address", "127.0.0.1", "--port", port,
    ):  # fmt: skip
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.02)
        yield port, tmp_path, tmp_path / "control"


def request(connection, method, path, body=None):
    connection.request(method, path, body)
    response = connection.getresponse()
    return response.status, response.read().decode()


@pytest.fixture
def connection(service):
    connection = http.client.HTTPConnection("127.0.0.1", service[0], timeout=10)
    yield connection
    connection.close()


def test_http_document(service, connection):
    _, directory, _ = service
    (directory / "memory").write_text('{"errors":0}\n')
    status, body = request(connection, "GET", "/status")
    document = json.loads(body)
    assert status == 200
    assert document["name"] == "g1"
    assert document["boot_id"] == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert document["uptime"] > 0
    assert document["memory"] == {"errors": 0}
    assert document["disk"] is None
    assert document["ticks"] is None
    assert document["behind"] is None


def test_http_connection_stays_open(service, connection):
    for _ in range(50):
        assert request(connection, "GET", "/status.json")[0] == 200


def test_http_boot_id(service, connection):
    assert request(connection, "GET", "/boot_id")[1] == Path("/proc/sys/kernel/random/boot_id").read_text()


def test_http_control_stores_one_word(service, connection):
    assert request(connection, "POST", "/control/memory-rate", "5000")[0] == 202
    assert (service[2] / "memory-rate").read_text() == "5000\n"


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/../etc/passwd", None, 404),
        ("GET", "/control/memory-rate", None, 404),
        ("POST", "/control/../memory", "1", 400),
        ("POST", "/control/", "1", 400),
        ("POST", "/control/x", "two words", 400),
        ("POST", "/control/x", "", 400),
        ("POST", "/control/x", "9" * 100, 400),
        ("POST", "/status", "1", 404),
        ("DELETE", "/status", None, 405),
    ],
)
def test_http_bad_requests(service, connection, method, path, body, status):
    assert request(connection, method, path, body)[0] == status
    assert list(service[2].iterdir()) == []


def test_http_silent_connections_do_not_block(service):
    """More silent peers than there is room for: a new one is still served."""
    with contextlib.ExitStack() as stack:
        for _ in range(40):
            stack.enter_context(socket.create_connection(("127.0.0.1", service[0])))
        connection = http.client.HTTPConnection("127.0.0.1", service[0], timeout=10)
        assert request(connection, "GET", "/status")[0] == 200
        connection.close()


@pytest.mark.parametrize(
    "raw", [b"x" * 4000, b"GET\r\n\r\n", b"POST /control/x HTTP/1.1\r\nContent-Length: 9999999\r\n\r\n"]
)
def test_http_nonsense_is_hung_up_on(service, raw):
    with socket.create_connection(("127.0.0.1", service[0]), timeout=10) as peer:
        peer.sendall(raw)
        with contextlib.suppress(ConnectionResetError):
            assert peer.recv(100) == b""


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["memcheck", "--mib", "0", "--status", "x"],
        ["memcheck", "--mib", "1"],
        ["memcheck", "--mib", "-1", "--status", "x"],
        ["diskseq", "run", "/nonexistent", "--status", "x"],
        ["diskseq", "check", "/nonexistent"],
        ["behind", "/nonexistent", "--mib", "1", "--control", "x", "--status", "x"],
        ["behind", "/dev/null", "--mib", "0", "--control", "x", "--status", "x"],
        ["ticker", "--interval-ms", "none", "--status", "x"],
        ["statusd", "--name", "two words"],
    ],
)
def test_bad_arguments_are_refused(tools, arguments):
    result = subprocess.run([tools, *arguments], capture_output=True, timeout=10, check=False)
    assert result.returncode == 2
    assert result.stderr
