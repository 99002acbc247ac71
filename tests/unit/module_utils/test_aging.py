# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Indicators of aging: how they are read, kept and published."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import struct
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from ansible_collections.vmbeam.xen.plugins.module_utils import _aging_metrics, _aging_sampler
from ansible_collections.vmbeam.xen.plugins.module_utils._aging import KINDS, LAST_DOMID, Dom0, observe
from ansible_collections.vmbeam.xen.plugins.module_utils._aging_history import History, Sample, thin
from ansible_collections.vmbeam.xen.plugins.module_utils._errors import (
    CommandTimeout,
    UnexpectedOutput,
    XenUnavailable,
)
from ansible_collections.vmbeam.xen.plugins.module_utils._proc import Proc
from ansible_collections.vmbeam.xen.plugins.module_utils._process import Result
from ansible_collections.vmbeam.xen.plugins.module_utils._xenstore import Usage, Xenstore
from ansible_collections.vmbeam.xen.plugins.module_utils._xl import Xl

ROOT = Path(__file__).resolve().parents[3]
ROLE = ROOT / "roles" / "aging_monitor"

LIST = (
    "Name                                        ID   Mem VCPUs\tState\tTime(s)"
    "   UUID                            Reason-Code\tSecurity Label\n"
    "Domain-0                                     0   896     1     r-----     141.9"
    " 00000000-0000-0000-0000-000000000000        -                -\n"
    "web1                                         7   192     1     -b----    1293.4"
    " 3f4c1c9e-0a52-4a3b-8a3c-0d1a55b50c1e        -                -\n"
    "app1                                         3   160     2     -b----      93.4"
    " 3f4c1c9e-0a52-4a3b-8a3c-0d1a55b50c1f        -                -\n"
)
INFO = (
    "host                   : m1-a\nnr_cpus                : 1\ntotal_memory           : 3071\n"
    "free_memory            : 1720\nxen_extra              : .5\nxen_version            : 4.17.5\n"
)
# What Xen 4.17's xenstored and oxenstored answer.
C_USAGE = (
    "Domain 0:\nnodes           :      312\nwatches         :        0\ntransactions    :        0\n"
    "outstanding     :        0\nmemory          :    19396\n"
)
C_QUOTAS = (
    "Quota settings:\nnodes            :     1000 Nodes per domain\nwatches          :      128 Watches per domain\n"
    "transactions     :       10 Transactions per domain\noutstanding      :       20 Outstanding requests per domain\n"
    "transaction-nodes:     1024 Max. number of accessed nodes per transaction\n"
    "memory           :  2621440 Total Xenstore memory per domain (error level)\n"
    "node-size        :     2048 Max. size of a node\npath-max         :     2048 Max. length of a node path\n"
    "permissions      :        5 Max. number of permissions per node\n"
)
C = {
    ("quota", "0"): C_USAGE,
    ("quota", "7"): C_USAGE.replace("312", " 40").replace("19396", "  604"),
    ("quota",): C_QUOTAS,
}
OCAML = {
    ("quota", "0"): "dom0 quota: 312/1000",
    ("quota", "3"): "dom3 quota: 61/1000",
    ("quota", "7"): "dom7 quota: not set",
    ("quota",): "OK",
}
MEMINFO = (
    "MemTotal:         869632 kB\nMemFree:          512000 kB\nMemAvailable:     627200 kB\n"
    "SUnreclaim:        14336 kB\nHugePages_Total:       0\n"
)
LIMITS = (
    "Limit                     Soft Limit           Hard Limit           Units     \n"
    "Max processes             3341                 3341                 processes \n"
    "Max open files            1024                 524288               files     \n"
)


@pytest.fixture
def proc(tmp_path):
    """A copy of /proc: xenstored with three files open, and two device models."""
    root = tmp_path / "proc"
    files = {
        "sys/kernel/random/boot_id": "0d3f8f0e-6d1f-4a0e-8d5d-1f4f0a4b6f10\n",
        "uptime": "5432.10 5001.22\n",
        "meminfo": MEMINFO,
        "sys/fs/file-nr": "736\t0\t84734\n",
        "loadavg": "0.10 0.20 0.30 2/148 4711\n",
        "sys/kernel/pid_max": "32768\n",
        "sys/kernel/threads-max": "6683\n",
        "1/comm": "systemd\n",
        "400/comm": "oxenstored\n",
        "400/statm": "5941 2560 873 162 0 1507 0\n",
        "400/limits": LIMITS,
        "400/fd/0": "",
        "400/fd/1": "",
        "400/fd/2": "",
        "500/comm": "xen-qemu-system\n",
        "500/statm": "90000 5120 900 1 0 80000 0\n",
        "501/comm": "qemu-system-i38\n",
        "501/statm": "90000 7680 900 1 0 80000 0\n",
        # It ends while it is looked at.
        "502/comm": "qemu-system-i38\n",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.fixture
def xenstored(tmp_path):
    """Starts a xenstored that knows some answers; returns its socket. A question it does not know is an error."""
    servers = []

    def start(answers, raw=None):
        path = tmp_path / f"xenstored{len(servers)}"
        server = socket.socket(socket.AF_UNIX)
        server.bind(str(path))
        server.listen()
        servers.append(server)

        def serve():
            with contextlib.suppress(OSError):  # the end of the test closes the socket
                while True:
                    with server.accept()[0] as connection:
                        converse(connection)

        def converse(connection):
            while header := connection.recv(16):
                kind, _request, _transaction, length = struct.unpack("=IIII", header)
                assert kind == 0, "no request but XS_CONTROL is for reading only"
                words = tuple(connection.recv(length).decode().rstrip("\0").split("\0"))
                assert words[0] == "quota"
                said = answers.get(words)
                body = b"ENOENT\0" if said is None else said.encode() + b"\0"
                answer = struct.pack("=IIII", 16 if said is None else 0, 0, 0, len(body)) + body
                connection.sendall(answer if raw is None else raw)
                if raw is not None:
                    return

        threading.Thread(target=serve, daemon=True).start()
        return str(path)

    yield start
    for server in servers:
        server.close()


def fake_xl(**answers):
    """An xl that answers by subcommand with text, or raises what is an error."""

    def run(argv, timeout):
        assert timeout == 5
        said = answers[argv[1]]
        if isinstance(said, Exception):
            raise said
        return Result(tuple(argv), 0, said, "")

    return Xl(run)


@pytest.fixture
def dom0(proc, xenstored):
    ticks = iter(range(0, 1000, 2))
    disks = {"/": (1, 2000), "/var": (1, 2000), "/var/lib/vmbeam": (2, 9000)}
    path = xenstored(OCAML)

    def disk(where):
        return SimpleNamespace(f_bavail=disks[where][1] * 256, f_blocks=10000 * 256, f_frsize=4096)

    return Dom0(
        xl=fake_xl(list=LIST, info=INFO),
        proc=Proc(proc),
        xenstore=lambda: Xenstore(path, 5),
        disk=disk,
        device=lambda where: disks[where][0],
        now=lambda: 1762419731.25,
        monotonic=lambda: float(next(ticks)),
        timeout=5,
    )


def seen(dom0, before=None):
    return {row["name"]: row for row in (indicator.as_dict() for indicator in observe(dom0, before).indicators)}


def values(dom0, before=None):
    return observe(dom0, before).values


def test_all_indicators(dom0):
    found = seen(dom0)
    assert {name: (row["value"], row["limit"], row["exhausted_at"]) for name, row in found.items()} == {
        "hypervisor_free_memory": (1720, 3071, 0),
        "hypervisor_own_memory": (103, 103 + 1720, 103 + 1720),
        "dom0_available_memory": (612.5, 849.25, 0),
        "dom0_unreclaimable_slab": (14, None, None),
        "dom0_threads": (148, 6683, 6683),
        "dom0_open_files": (736, 84734, 84734),
        "disk_free_root": (2000, 10000, 0),
        "disk_free_vmbeam": (9000, 10000, 0),
        "xenstore_nodes": (312 + 61, None, None),
        "xenstore_domain_nodes": (61, 1000, 1000),
        "xenstored_memory": (10, None, None),
        "xenstored_open_files": (3, 1024, 1024),
        "device_model_memory": (30, None, None),
        "highest_domid": (7, LAST_DOMID, LAST_DOMID),
        "toolstack_latency": (2, None, None),
        "uptime": (5432.1, None, None),
    }
    assert found["dom0_available_memory"] | {"value": 0} == {
        "name": "dom0_available_memory",
        "value": 0,
        "unit": "MiB",
        "limit": 849.25,
        "direction": "down",
        "exhausted_at": 0,
    }
    assert observe(dom0).unavailable == {}


def test_what_the_hypervisor_can_take_itself_is_what_no_domain_has(dom0):
    assert seen(dom0)["hypervisor_own_memory"]["exhausted_at"] == 3071 - 896 - 192 - 160
    # app1 moves away: it took 4 MiB more than its own memory.
    web1_only = "".join(line for line in LIST.splitlines(keepends=True) if "app1" not in line)
    dom0.xl = fake_xl(list=web1_only, info=INFO.replace(": 1720", ": 1884"))
    after = seen(dom0)["hypervisor_own_memory"]
    assert (after["value"], after["exhausted_at"]) == (99, 99 + 1884)


def test_the_other_xenstored_tells_sizes_too(dom0, xenstored):
    path = xenstored(C)
    dom0.xenstore = lambda: Xenstore(path, 5)
    found = seen(dom0)
    assert found["xenstore_nodes"]["value"] == 352
    assert found["xenstore_size"]["value"] == round(20000 / 1048576, 3)
    assert (found["xenstore_domain_nodes"]["value"], found["xenstore_domain_nodes"]["limit"]) == (40, 1000)


def test_a_domid_that_was_seen_is_remembered(dom0):
    assert values(dom0, {"highest_domid": 4711.0})["highest_domid"] == 4711
    assert values(dom0, {"highest_domid": 1.0})["highest_domid"] == 7


def test_a_toolstack_that_hangs_is_slow_and_the_rest_is_read(dom0):
    dom0.xl = fake_xl(list=CommandTimeout("xl list -v did not end within 5 s and was ended."))
    found = observe(dom0)
    assert found.values["toolstack_latency"] == 2
    assert found.values["dom0_available_memory"] == 612.5
    assert "did not end" in found.unavailable["xenstore_nodes"]
    assert set(found.unavailable) == {
        "highest_domid",
        "hypervisor_free_memory",
        "hypervisor_own_memory",
        "xenstore_nodes",
        "xenstore_domain_nodes",
        "xenstore_size",
    }


def test_what_cannot_be_read_is_told_and_the_rest_is_read(dom0, proc):
    dom0.xl = fake_xl(list=LIST, info="xen: on fire\n")
    dom0.xenstore = lambda: Xenstore("/no/such/socket")
    (proc / "meminfo").write_text("MemTotal: 12 kB\n")
    (proc / "loadavg").write_text("?\n")
    (proc / "sys/fs/file-nr").unlink()
    found = observe(dom0)
    assert "xen_version" in found.unavailable["hypervisor_free_memory"]
    assert "/no/such/socket" in found.unavailable["xenstore_nodes"]
    assert "MemAvailable" in found.unavailable["dom0_available_memory"]
    assert "loadavg" in found.unavailable["dom0_threads"]
    assert "file-nr" in found.unavailable["dom0_open_files"]
    assert found.values["highest_domid"] == 7
    assert set(found.values) | set(found.unavailable) | {"disk_free_var"} == set(KINDS)


def test_no_limit_where_linux_has_none(dom0, proc):
    (proc / "sys/fs/file-nr").write_text("736 0 9223372036854775807\n")
    (proc / "400/limits").write_text(LIMITS.replace("1024 ", "unlimited"))
    found = seen(dom0)
    assert found["dom0_open_files"]["limit"] is None
    assert found["dom0_open_files"]["exhausted_at"] is None
    assert found["xenstored_open_files"]["limit"] is None


def test_what_is_not_there_has_no_indicator(dom0, proc):
    for pid in ("400", "500", "501", "502"):
        (proc / pid / "comm").write_text("sleep\n")
    found = observe(dom0)
    assert not {"xenstored_memory", "xenstored_open_files", "device_model_memory"} & set(found.values)


class TestXenstore:
    @pytest.mark.parametrize(
        ("answers", "domid", "usage"),
        [
            (OCAML, 3, Usage(61, 1000, None)),
            (OCAML, 7, Usage(0, None, None)),
            (C, 0, Usage(312, 1000, 19396)),
            (C, 5, None),
            ({("quota", "0"): C_USAGE}, 0, Usage(312, None, 19396)),
        ],
    )
    def test_usage(self, xenstored, answers, domid, usage):
        with Xenstore(xenstored(answers), 5) as xenstore:
            assert xenstore.usage(domid) == usage

    def test_an_answer_of_unknown_form(self, xenstored):
        with Xenstore(xenstored({("quota", "0"): "OK"}), 5) as xenstore, pytest.raises(UnexpectedOutput):
            xenstore.usage(0)

    @pytest.mark.parametrize(
        ("raw", "error"),
        [
            (b"", XenUnavailable),
            (b"\0\0\0", XenUnavailable),
            (struct.pack("=IIII", 0, 0, 0, 10) + b"short", XenUnavailable),
            (struct.pack("=IIII", 0, 0, 0, 2**31), UnexpectedOutput),
        ],
    )
    def test_an_answer_that_is_cut_or_endless(self, xenstored, raw, error):
        with Xenstore(xenstored({}, raw), 5) as xenstore, pytest.raises(error):
            xenstore.usage(0)

    def test_silence_ends(self, tmp_path):
        server = socket.socket(socket.AF_UNIX)
        server.bind(str(tmp_path / "silent"))
        server.listen()
        with server, Xenstore(str(tmp_path / "silent"), 0.05) as xenstore, pytest.raises(XenUnavailable, match="timed"):
            xenstore.usage(0)


BOOT = "boot-1"


def sample(time, boot=BOOT, **found):
    return Sample(float(time), boot, {name: float(value) for name, value in found.items()})


class TestHistory:
    @pytest.fixture
    def path(self, tmp_path):
        return tmp_path / "aging" / "samples.jsonl"

    def test_what_is_kept_is_read(self, path):
        history = History(path)
        kept = [sample(time, a=time, b=1) for time in (1, 2, 3)]
        for one in kept:
            history.append(one, 10**6)
        assert history.read(BOOT, 0, 10) == kept
        assert history.read(BOOT, 2, 2.5) == kept[1:2]
        assert history.last() == kept[2]

    def test_nothing_kept(self, path):
        assert History(path).read(BOOT, 0, 10) == []
        assert History(path).last() is None

    def test_another_boot_is_another_life(self, path):
        history = History(path)
        for one in (sample(1, boot="boot-0"), sample(2), sample(3, boot="boot-0"), sample(4)):
            history.append(one, 10**6)
        assert [one.time for one in history.read(BOOT, 0, 10)] == [2, 4]

    def test_it_is_bounded_and_keeps_the_newest(self, path):
        history = History(path)
        for time in range(1000):
            history.append(sample(time, a=1), 4000)
            assert sum(file.stat().st_size for file in path.parent.iterdir()) <= 4000
        times = [one.time for one in history.read(BOOT, 0, 2000)]
        assert times == list(range(int(times[0]), 1000))
        assert len(times) > 25
        assert sorted(file.name for file in path.parent.iterdir()) == ["samples.jsonl", "samples.jsonl.1"]

    def test_half_a_line_costs_that_line_only(self, path):
        history = History(path)
        history.append(sample(1), 10**6)
        with path.open("ab") as file:
            file.write(b'{"time":2,"boot')
        assert history.last() is None or history.last() == sample(1)
        history.append(sample(3), 10**6)
        assert history.read(BOOT, 0, 10) == [sample(1), sample(3)]

    @pytest.mark.parametrize(
        "line", ["", "{}", "[]", "null", "7", '{"time":2,"boot_id":"boot-1","values":{"a":null}}', "\xff"]
    )
    def test_strange_lines_are_passed_over(self, path, line):
        path.parent.mkdir()
        path.write_bytes(line.encode("latin-1") + b"\n")
        history = History(path)
        history.append(sample(3), 10**6)
        assert history.read(BOOT, 0, 10) == [sample(3)]

    def test_a_clock_that_was_set_back(self, path):
        history = History(path)
        for time in (1, 2, 900, 901, 3, 4):
            history.append(sample(time), 10**6)
        assert [one.time for one in history.read(BOOT, 0, 5)] == [1, 2, 3, 4]
        assert [one.time for one in history.read(BOOT, 0, 1000)] == [1, 2, 900, 901]


class TestThin:
    def test_few_stay_as_they_are(self):
        assert thin([sample(1, a=5), sample(2, a=6, b=7)], 10) == {
            "times": [1, 2],
            "indicators": {"a": [5, 6], "b": [None, 7]},
        }

    def test_many_become_medians(self):
        found = thin([sample(time, a=1000 if time == 4 else time) for time in range(9)], 3)
        assert found == {"times": [1, 4, 7], "indicators": {"a": [1, 5, 7]}}

    @pytest.mark.parametrize("count", [1, 7, 100])
    def test_never_more_than_asked_for(self, count):
        found = thin([sample(time, a=time) for time in range(100)], count)
        assert len(found["times"]) == count == len(found["indicators"]["a"])
        assert found["times"] == sorted(found["times"])

    def test_none(self):
        assert thin([], 5) == {"times": [], "indicators": {}}
        assert thin([sample(1, a=1)], 0)["times"] == []


LINE = re.compile(r"# HELP (\w+) \S.*\.|# TYPE (\w+) gauge|(\w+) (-?[0-9.e+]+)")


def test_metrics(dom0):
    text = _aging_metrics.render(observe(dom0))
    assert text.endswith("\n")
    rows = [LINE.fullmatch(line) for line in text.splitlines()]
    assert all(rows), text
    # Each family has its help, its type and its value, in this order and once.
    names = [row[1] or row[2] or row[3] for row in rows]
    assert names[0::3] == names[1::3] == names[2::3]
    assert len(set(names)) == len(names) // 3
    found = {row[3]: float(row[4]) for row in rows if row[3]}
    assert found["vmbeam_aging_dom0_available_memory_bytes"] == 612.5 * 1048576
    assert found["vmbeam_aging_dom0_available_memory_exhausted_at_bytes"] == 0
    assert found["vmbeam_aging_xenstore_domain_nodes"] == 61
    assert found["vmbeam_aging_xenstore_domain_nodes_exhausted_at"] == 1000
    assert found["vmbeam_aging_toolstack_latency_seconds"] == 2
    assert found["vmbeam_aging_sample_time_seconds"] == 1762419731.25
    assert "vmbeam_aging_xenstore_nodes_exhausted_at" not in found


class TestSampler:
    @pytest.fixture
    def take(self, dom0, tmp_path):
        history, metrics = tmp_path / "h" / "samples.jsonl", tmp_path / "m" / "vmbeam_aging.prom"
        metrics.parent.mkdir()
        options = ["--history", str(history), "--timeout", "5"]

        def take(*more):
            assert _aging_sampler.main([*options, *more], dom0) == 0
            return [json.loads(line) for line in history.read_text().splitlines()]

        take.metrics = metrics
        return take

    def test_a_sample_is_added(self, take, dom0):
        first = take()
        assert first[0]["time"] == 1762419731.25
        assert first[0]["boot_id"] == dom0.proc.boot_id()
        assert first[0]["values"]["xenstore_nodes"] == 373
        assert len(take()) == 2

    def test_the_highest_domid_lasts_until_the_next_boot(self, take, dom0, proc):
        dom0.xenstore = lambda: Xenstore("/no/such/socket")
        take()
        dom0.xl = fake_xl(list=LIST.replace("web1     ", "gone     ").replace("  7   192", "  2   192"), info=INFO)
        assert [line["values"]["highest_domid"] for line in take()] == [7, 7]
        (proc / "sys/kernel/random/boot_id").write_text("another\n")
        assert [line["values"]["highest_domid"] for line in take()] == [7, 7, 3]

    def test_metrics_are_replaced_as_a_whole(self, take):
        take.metrics.write_text("old")
        old = os.open(take.metrics, os.O_RDONLY)
        take("--metrics", str(take.metrics))
        # Whoever has the old file open reads it to its end.
        assert os.read(old, 10) == b"old"
        os.close(old)
        assert "vmbeam_aging_uptime_seconds 5432.1" in take.metrics.read_text()
        assert [file.name for file in take.metrics.parent.iterdir()] == ["vmbeam_aging.prom"]
        assert take.metrics.stat().st_mode & 0o777 == 0o644

    def test_a_full_disk_costs_the_time_series_and_not_the_metrics(self, dom0, tmp_path):
        metrics = tmp_path / "vmbeam_aging.prom"
        options = ["--history", "/dev/full", "--timeout", "5", "--metrics", str(metrics)]
        with pytest.raises(OSError, match="No space left"):
            _aging_sampler.main(options, dom0)
        assert "vmbeam_aging_uptime_seconds 5432.1" in metrics.read_text()

    def test_the_journal_hears_what_could_not_be_read(self, take, dom0, capsys):
        dom0.xenstore = lambda: Xenstore("/no/such/socket")
        take()
        assert "xenstore_nodes: xenstored does not answer at /no/such/socket" in capsys.readouterr().err

    def test_as_the_role_installs_it(self, tmp_path):
        """The files that the role copies suffice, without any library of this computer's Python."""
        code = tmp_path / "lib" / "ansible_collections" / "vmbeam" / "xen" / "plugins" / "module_utils"
        code.mkdir(parents=True)
        for name in yaml.safe_load((ROLE / "vars" / "main.yml").read_text())["_aging_monitor_files"]:
            (code / name).write_text((ROOT / "plugins" / "module_utils" / name).read_text())
        command = tmp_path / "vmbeam-aging-sample"
        # Its first line is a comment of Jinja.
        text = (ROLE / "templates" / "vmbeam-aging-sample.j2").read_text().partition("\n")[2]
        command.write_text(text.replace("/usr/lib/vmbeam-aging", str(tmp_path / "lib")))
        done = subprocess.run(
            [sys.executable, "-IS", command, "--history", tmp_path / "samples.jsonl", "--metrics", tmp_path / "x.prom"],
            env={"PATH": "/nowhere"},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert "toolstack_latency: The command xl is not installed" in done.stderr
        found = json.loads((tmp_path / "samples.jsonl").read_text())["values"]
        assert found["dom0_available_memory"] > 0
        assert found["uptime"] > 0
        assert "vmbeam_aging_uptime_seconds" in (tmp_path / "x.prom").read_text()
