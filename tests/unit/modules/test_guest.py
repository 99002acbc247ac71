# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""guest, guest_info, guest_migrate and wait_for_xen against a fake xl."""

from __future__ import annotations

from functools import partial

import pytest
from ansible_collections.vmbeam.xen.plugins.module_utils import _migrate

LIVE = "-b----"
CONFIG = {
    "c_info": {"type": "pvh", "name": "web"},
    "disks": [
        {"pdev_path": "/dev/disk/by-id/scsi-0QEMU_QEMU_HARDDISK_web-root", "vdev": "xvda", "readwrite": 1},
        {"pdev_path": "/dev/vg0/scratch", "vdev": "xvdb"},
    ],
    "nics": [{"mac": "00:16:3e:00:02:01", "bridge": "xenbr0"}],
}
# libxl leaves out what has its default value.
TIED = {
    "c_info": {"type": "hvm", "name": "web"},
    "b_info": {"disable_migrate": "True", "vcpu_hard_affinity": [[2, 3]]},
    "pcidevs": [{"bus": 3, "dev": 31, "func": 1}],
    "usbdevs": [{"ctrl": 1, "port": 2}],
    "dtdevs": [{"path": "/soc/eth0"}],
}


@pytest.fixture
def guest(fake_xen, run, tmp_path):
    config = tmp_path / "web.cfg"
    config.write_text('# a guest\nname = "web"\nmemory = 512\n')
    return partial(run, "guest", name="web", config=str(config))


def state_of(fake_xen, flags, time=5.0):
    fake_xen.add("source", "web", flags=flags, time=time)


def changes(fake_xen):
    return [call for call in fake_xen.calls if call.split()[1] != "list"]


def test_start(fake_xen, guest):
    result = guest()
    assert result["changed"]
    assert (result["guest"]["name"], result["guest"]["state"], result["guest"]["memory_mb"]) == ("web", "running", 512)
    assert result["diff"]["before"] == {}
    assert guest()["changed"] is False


def test_start_paused(fake_xen, guest):
    assert guest(state="paused")["guest"]["state"] == "paused"
    assert fake_xen.seen("source") == {"web": "--p---"}
    assert guest(state="paused")["changed"] is False


@pytest.mark.parametrize(
    ("flags", "wanted", "call"),
    [
        (LIVE, "running", None),
        ("r-----", "running", None),
        ("--p---", "paused", None),
        (LIVE, "paused", "source pause 8"),
        ("--p---", "running", "source unpause 8"),
        (LIVE, "absent", "source shutdown -F 8"),
        ("---sc-", "absent", "source destroy 8"),
        ("---ss-", "absent", "source destroy 8"),
    ],
)
@pytest.mark.parametrize("check", [False, True])
def test_changes_of_state(fake_xen, guest, flags, wanted, call, check):
    state_of(fake_xen, flags)
    result = guest(check=check, state=wanted)
    assert result["changed"] is (call is not None)
    assert changes(fake_xen) == ([call] if call and not check else [])
    if wanted == "absent":
        assert result["guest"] is None
    elif call:
        assert result["guest"]["state"] in (wanted, "blocked")


def test_check_mode_of_a_start(fake_xen, guest):
    result = guest(check=True)
    assert result["changed"]
    assert result["guest"] == {"name": "web", "state": "running"}
    assert fake_xen.seen("source") == {}


@pytest.mark.parametrize("flags", ["---sc-", "---ss-", "---s--"])
def test_states_that_need_a_decision(fake_xen, guest, flags):
    state_of(fake_xen, flags)
    result = guest()
    assert result["msg"].startswith("name: web is ")
    assert "state=absent first" in result["msg"]
    assert changes(fake_xen) == []


@pytest.mark.parametrize("rest", ["web--incoming", "web--migratedaway"])
def test_no_second_copy_beside_a_migration(fake_xen, guest, rest):
    fake_xen.add("source", rest, flags="--p---", time=0.0)
    result = guest()
    assert f"{rest} exists" in result["msg"]
    assert changes(fake_xen) == []


def test_start_without_config(fake_xen, run):
    assert run("guest", name="web")["msg"].startswith("config: web does not exist here")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("memory = 1\n", "has no line"),
        ('name = "db"\n', "is the configuration of 'db', not of 'web'"),
        ('name = "web"\nname = "db"\n', "'db'"),
        ('#name = "web"\n', "has no line"),
    ],
)
def test_config_of_another_guest(fake_xen, guest, tmp_path, text, words):
    (tmp_path / "web.cfg").write_text(text)
    result = guest()
    assert result["msg"].startswith("config: ")
    assert words in result["msg"]
    assert changes(fake_xen) == []


def test_config_in_other_quotes(fake_xen, guest, tmp_path):
    (tmp_path / "web.cfg").write_text("memory=1\n  name  =  'web' # yes\n")
    assert guest(check=True)["changed"]


def test_config_that_is_missing(fake_xen, guest):
    result = guest(config="/no/such/file")
    assert result["msg"].startswith("config: /no/such/file cannot be read")


def test_half_made_guest_is_destroyed(fake_xen, guest):
    fake_xen.fault("create-fails-halfway")
    result = guest()
    assert "spawn failed" in result["msg"]
    assert fake_xen.seen("source") == {}


def test_half_made_guest_that_stays_is_told(fake_xen, guest):
    fake_xen.fault("create-fails-halfway")
    fake_xen.fault("destroy-source-fails")
    assert "web may be left" in guest()["left_behind"]


def test_guest_that_ignores_the_shutdown(fake_xen, guest):
    state_of(fake_xen, LIVE)
    fake_xen.fault("shutdown-ignored")
    assert guest(state="absent", timeout=0.5)["changed"]
    assert changes(fake_xen) == ["source shutdown -F 8", "source destroy 8"]


def test_guest_that_ignores_the_shutdown_is_left_as_it_is_unless_forced(fake_xen, guest):
    state_of(fake_xen, LIVE)
    fake_xen.fault("shutdown-ignored")
    assert "web to shut down" in guest(state="absent", timeout=0.5, force=False)["msg"]
    assert changes(fake_xen) == ["source shutdown -F 8"]
    assert fake_xen.seen("source") == {"web": LIVE}


@pytest.mark.parametrize(("flags", "call"), [(LIVE, "shutdown -F 8"), ("--p---", "destroy 8"), ("---s--", "destroy 8")])
def test_guest_that_is_only_asked_to_shut_down(fake_xen, guest, flags, call):
    state_of(fake_xen, flags)
    fake_xen.fault("shutdown-ignored")
    assert guest(state="absent", wait=False)["changed"]
    assert changes(fake_xen) == [f"source {call}"]


def test_guest_that_is_gone_before_it_is_destroyed(fake_xen, guest):
    """The xl that looks after it destroys it, too, once it has shut down."""
    state_of(fake_xen, LIVE)
    fake_xen.fault("daemon-destroys-first")
    assert guest(state="absent")["changed"]
    assert changes(fake_xen) == ["source shutdown -F 8", "source destroy 8"]
    assert fake_xen.seen("source") == {}


def test_remove_at_once(fake_xen, guest):
    state_of(fake_xen, LIVE)
    guest(state="absent", graceful=False)
    assert changes(fake_xen) == ["source destroy 8"]


def test_two_domains_of_one_name(fake_xen, guest):
    state_of(fake_xen, LIVE)
    state_of(fake_xen, LIVE)
    assert "2 domains have the name web" in guest()["msg"]


def test_info(fake_xen, run):
    fake_xen.add("source", "web")
    domains = fake_xen.read("source")
    domains[0]["config"] = CONFIG
    fake_xen.write("source", domains)
    fake_xen.add("source", "(null)", flags="---s-d")
    fake_xen.add("source", "bare")
    result = run("guest_info")
    assert [guest["name"] for guest in result["guests"]] == ["web", "bare"]
    assert result["guests"][0] == {
        "name": "web",
        "domid": 8,
        "uuid": "6f1a9b60-93b2-4d5c-9d0a-6c9c1e0f8a11",
        "state": "blocked",
        "type": "pvh",
        "memory_mb": 256,
        "vcpus": 1,
        "cpu_time": 12.5,
        "disks": [
            {"id": "web-root", "target": "/dev/disk/by-id/scsi-0QEMU_QEMU_HARDDISK_web-root", "vdev": "xvda"},
            {"id": None, "target": "/dev/vg0/scratch", "vdev": "xvdb"},
        ],
        "nics": [{"mac": "00:16:3e:00:02:01", "bridge": "xenbr0"}],
        "devices": [],
        "cpu_affinity": [],
        "migratable": True,
    }
    assert result["guests"][1]["type"] is None
    assert result["hypervisor"]["version"] == "4.17.5"
    assert [guest["name"] for guest in run("guest_info", name="bare")["guests"]] == ["bare"]
    assert run("guest_info", name="nobody")["guests"] == []
    assert changes(fake_xen) == ["source info"] * 3


def test_info_tells_what_ties_a_guest_to_its_host(fake_xen, run):
    fake_xen.add("source", "web")
    domains = fake_xen.read("source")
    domains[0]["config"] = TIED
    fake_xen.write("source", domains)
    web = run("guest_info")["guests"][0]
    assert web["devices"] == [
        {"type": "pci", "id": "0000:03:1f.1"},
        {"type": "usb", "id": "1-2"},
        {"type": "dt", "id": "/soc/eth0"},
    ]
    assert web["cpu_affinity"] == [[2, 3]]
    assert web["migratable"] is False


def test_info_of_an_empty_host(fake_xen, run):
    assert run("guest_info")["guests"] == []


def test_info_returns_configuration_files(fake_xen, run, tmp_path):
    (tmp_path / "web1.cfg").write_text('name = "web1"\n')
    (tmp_path / "notes").write_text("not a configuration")
    result = run("guest_info", config_directory=str(tmp_path))
    assert result["configurations"] == [{"path": f"{tmp_path}/web1.cfg", "content": 'name = "web1"\n'}]
    assert run("guest_info", config_directory=str(tmp_path / "absent"))["configurations"] == []
    assert "configurations" not in run("guest_info")


def test_info_names_a_configuration_that_it_cannot_read(fake_xen, run, tmp_path):
    (tmp_path / "bad.cfg").write_bytes(b"\xff\xfe")
    result = run("guest_info", config_directory=str(tmp_path))
    assert result["failed"]
    assert "bad.cfg" in result["msg"]


@pytest.fixture
def migrate(fake_xen, run, tmp_path, monkeypatch):
    monkeypatch.setattr(_migrate.Migration.__init__, "__defaults__", (None, str(tmp_path)))
    return partial(run, "guest_migrate", name="web", destination="127.0.0.1", timeout=30)


@pytest.mark.processes
@pytest.mark.parametrize("transport", ["ssh", "tcp"])
def test_migrate(fake_xen, migrate, transport):
    fake_xen.add("source", "web")
    result = migrate(check=True, transport=transport)
    assert result["changed"]
    assert fake_xen.seen("source") == {"web": LIVE}
    assert result["diff"] == {"before": {"location": "source"}, "after": {"location": "destination"}}
    result = migrate(transport=transport, ssh_args=["-oPort=22"])
    assert result["changed"]
    assert result["location"] == "destination"
    assert result["migration"]["guest"] == "web"
    assert result["migration"]["strategy"] == "precopy"
    assert result["diff"]["before"] == {"location": "source"}
    assert fake_xen.seen("destination") == {"web": LIVE}
    for check in (True, False):
        again = migrate(check=check, transport=transport)
        assert again["changed"] is False
        assert again["location"] == "destination"


@pytest.mark.processes
def test_migrate_cold(fake_xen, migrate, tmp_path):
    fake_xen.add("source", "web")
    (tmp_path / "web.cfg").write_text('name = "web"\n')
    options = {"strategy": "cold", "config": str(tmp_path / "web.cfg")}
    assert migrate(check=True, **options)["diff"] == {
        "before": {"location": "source"},
        "after": {"location": "destination"},
    }
    assert fake_xen.seen("source") == {"web": LIVE}
    result = migrate(**options)
    assert result["changed"]
    assert result["location"] == "destination"
    assert fake_xen.seen("source") == {}
    assert migrate(**options)["changed"] is False


def test_migrate_cold_needs_a_configuration(fake_xen, migrate):
    assert migrate(strategy="cold")["msg"].startswith("config: ")
    assert fake_xen.calls == []


@pytest.mark.processes
def test_migrate_failure_tells_the_location(fake_xen, migrate):
    fake_xen.add("source", "web")
    fake_xen.fault("receiver-dies-early")
    result = migrate()
    assert result.failed
    assert result["location"] == "source"
    assert result["migration"]["seconds"] > 0
    assert "Migration failed, resuming at sender." in result["migration"]["log_tail"]


@pytest.mark.processes
@pytest.mark.parametrize("check", [False, True])
def test_migrate_with_both_ends_running(fake_xen, migrate, check):
    fake_xen.add("source", "web")
    fake_xen.add("destination", "web")
    result = migrate(check=check)
    assert result["location"] == "both"
    assert "Nothing was touched" in result["msg"]
    assert changes(fake_xen) == []


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("name", "web--incoming"),
        ("destination", "-oProxyCommand=x"),
        ("destination_user", "a b"),
        ("timeout", 0),
    ],
)
def test_bad_arguments_of_a_migration(fake_xen, migrate, argument, value):
    result = migrate(**{argument: value})
    assert result["msg"].startswith(f"{argument}: ")
    assert fake_xen.calls == []


@pytest.fixture
def systemctl(tmp_path, fake_xen):
    program = tmp_path / "bin" / "systemctl"
    program.write_text('#!/bin/sh\n[ "$2" = good.service ] && echo active || { echo failed; exit 3; }\n')
    program.chmod(0o755)


def test_wait(fake_xen, systemctl, run):
    fake_xen.add("source", "web")
    result = run("wait_for_xen", guests=["web"], units=["good.service"])
    assert result["changed"] is False
    assert result["elapsed"] > 0
    assert result["checks"] == {
        "xl": True,
        "xenstore": True,
        "guests": {"web": "blocked"},
        "units": {"good.service": "active"},
    }


def test_wait_says_what_is_missing(fake_xen, systemctl, run):
    result = run("wait_for_xen", guests=["web"], units=["bad.service"], timeout=0.5)
    assert result["msg"] == "timeout: after 0.5 s still guest web is absent, unit bad.service is failed."
    assert result["checks"]["guests"] == {"web": "absent"}
    assert result["elapsed"] >= 0.5


def test_wait_passes_on_what_xl_says(fake_xen, run):
    fake_xen.fault("xenstored-down-source")
    result = run("wait_for_xen", timeout=0.5)
    assert "still xl does not answer. xl says: xl cannot reach" in result["msg"]
    assert result["checks"]["xl"] is False


@pytest.mark.parametrize(("argument", "value"), [("guests", ["17"]), ("units", ["a b"]), ("timeout", 0)])
def test_bad_arguments_of_wait(fake_xen, run, argument, value):
    assert run("wait_for_xen", **{argument: value})["msg"].startswith(f"{argument}: ")
