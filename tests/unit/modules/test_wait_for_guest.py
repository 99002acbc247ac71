# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""wait_for_guest with a fake xl, a fake libxenctrl, and a xenstored that answers over its socket."""

from __future__ import annotations

import socketserver
import struct
import threading
from types import SimpleNamespace

import pytest
from ansible_collections.vmbeam.xen.plugins.module_utils import _xenctrl, _xenstore
from ansible_collections.vmbeam.xen.plugins.module_utils._errors import XenUnavailable

HEADER = struct.Struct("=IIII")


class Xenstored(socketserver.ThreadingUnixStreamServer):
    """Nodes by path; a client may list and read them."""

    daemon_threads = True

    def __init__(self, path: str) -> None:
        super().__init__(path, Connection)
        self.nodes: dict[str, str] = {}

    def device(self, domid: int, kind: str, number: int, state: str) -> None:
        backend = f"/local/domain/0/backend/{kind}/{domid}/{number}"
        self.nodes |= {f"/libxl/{domid}/device/{kind}/{number}/backend": backend, f"{backend}/state": state}


class Connection(socketserver.StreamRequestHandler):
    server: Xenstored

    def handle(self) -> None:
        while header := self.rfile.read(HEADER.size):
            kind, request, transaction, length = HEADER.unpack(header)
            path = self.rfile.read(length).rstrip(b"\0").decode()
            below = sorted(
                {
                    node.removeprefix(f"{path}/").split("/")[0]
                    for node in self.server.nodes
                    if node.startswith(f"{path}/")
                }
            )
            said = {1: "".join(f"{name}\0" for name in below) if below else None, 2: self.server.nodes.get(path)}[kind]
            payload = b"ENOENT\0" if said is None else said.encode()
            self.wfile.write(HEADER.pack(16 if said is None else kind, request, transaction, len(payload)) + payload)


@pytest.fixture
def xenstored(tmp_path, monkeypatch):
    with Xenstored(str(tmp_path / "xenstored")) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setattr(_xenstore.Xenstore.__init__, "__defaults__", (server.server_address, 10.0))
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def cpu(monkeypatch):
    """What libxenctrl says of CPU times: nanoseconds at each look, the last again and again."""
    times = [5]
    closed = []

    def used(_handle, domid, vcpu):
        assert (domid.value, vcpu.value) == (8, 0)
        return times.pop(0) if len(times) > 1 else times[0]

    library = SimpleNamespace(
        xc_interface_open=lambda *_arguments: 7,
        xc_interface_close=closed.append,
        xc_domain_get_cpu_usage=used,
    )
    monkeypatch.setattr(_xenctrl, "library", lambda: library)
    yield times
    assert len(closed) == 1


@pytest.fixture
def wait(run, fake_xen, xenstored):
    def wait_for_web(timeout: float = 0.5):
        return run("wait_for_guest", name="web", timeout=timeout)

    return wait_for_web


def test_a_guest_whose_cpus_run_and_whose_drivers_are_there_is_alive(wait, fake_xen, xenstored, cpu):
    domid = fake_xen.add("source", "web")
    xenstored.device(domid, "vbd", 51712, "4")
    xenstored.device(domid, "vif", 0, "4")
    cpu[:] = [1_000_000_000, 1_000_000_000, 1_000_050_000]
    result = wait(20)
    assert not result.failed
    assert result["heartbeat"] == {
        "state": "blocked",
        "cpu_seconds": 0.00005,
        "devices": {"vbd 51712": "connected", "vif 0": "connected"},
    }


def test_a_guest_that_hangs_is_blocked_too_but_does_not_run(wait, fake_xen, cpu):
    fake_xen.add("source", "web")
    result = wait()
    assert result.failed
    assert result["msg"] == ("web shows no sign of life after 0.5 s: it is blocked, but its virtual CPUs have not run.")
    assert result["elapsed"] >= 0.5


def test_a_driver_that_does_not_come_back_is_named(wait, fake_xen, xenstored, cpu):
    domid = fake_xen.add("source", "web")
    xenstored.device(domid, "vbd", 51712, "4")
    xenstored.device(domid, "vif", 0, "2")
    cpu[:] = [1, *range(2, 100)]
    assert wait()["msg"].endswith("0.5 s: its vif 0 is waiting for the guest's driver.")


@pytest.mark.parametrize("flags", ["--p---", "---sc-"])
def test_a_guest_that_does_not_run_is_not_alive(wait, fake_xen, cpu, flags):
    fake_xen.add("source", "web", flags)
    cpu[:] = [1, *range(2, 100)]
    assert wait().failed


def test_a_guest_that_is_not_there(wait, cpu):
    assert wait()["msg"].endswith("it is absent.")


def test_without_libxenctrl_the_tenths_of_seconds_of_xl_have_to_do(wait, fake_xen, monkeypatch):
    def none():
        raise XenUnavailable("none")

    monkeypatch.setattr(_xenctrl, "library", none)
    fake_xen.add("source", "web", time=12.5)
    assert "have not run" in wait()["msg"]
    [web] = fake_xen.read("source")
    later = threading.Timer(0.5, lambda: fake_xen.write("source", [{**web, "time": 12.6}]))
    later.start()
    result = wait(20)
    later.join()
    assert result["heartbeat"]["cpu_seconds"] == 0.1


def test_a_silent_xenstored_is_said(run, fake_xen, cpu, tmp_path, monkeypatch):
    monkeypatch.setattr(_xenstore.Xenstore.__init__, "__defaults__", (str(tmp_path / "none"), 10.0))
    fake_xen.add("source", "web")
    assert "xenstored does not answer" in run("wait_for_guest", name="web", timeout=0.5)["msg"]
