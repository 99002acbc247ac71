# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Names, values and files that are rendered: the configuration of xl and the seed disk."""

from __future__ import annotations

import io
import tarfile

import pytest
from ansible_collections.vmbeam.xen.plugins.module_utils import _checks, _config, _seed
from ansible_collections.vmbeam.xen.plugins.module_utils._errors import InvalidInput


@pytest.mark.parametrize("name", ["web1", "m1-a", "a.b_c+d", "7up", "x" * 63])
def test_good_names(name):
    assert _checks.domain_name("name", name) == name


@pytest.mark.parametrize(
    "name",
    ["", "17", "Domain-0", "-x", "a b", "a\n", "x" * 64, "web--incoming", "web--migratedaway", "a/b", "a;b", "(null)"],
)
def test_bad_names_are_refused_with_the_option(name):
    with pytest.raises(InvalidInput, match="^host_vm: "):
        _checks.domain_name("host_vm", name)


@pytest.mark.parametrize("disk", ["web1-root", "a", "x" * 36, "0.5_b"])
def test_good_disks(disk):
    assert _checks.disk_id("disk", disk) == disk


@pytest.mark.parametrize("disk", ["", "x" * 37, "a,b", "a b", "-a", "a=b", "a\n"])
def test_bad_disks(disk):
    with pytest.raises(InvalidInput, match="^disk: "):
        _checks.disk_id("disk", disk)


@pytest.mark.parametrize("path", ["/a", "/dev/disk/by-id/scsi-0_x:1", "/srv/a.b-c_d/e@f%20+g=h"])
def test_good_paths(path):
    assert _checks.path("path", path) == path


@pytest.mark.parametrize(
    "path", ["", "/", "a", "/a,b", "/a b", "/a/../b", "/..", "/a//b", "/a/", '/a"b', "/a\nb", "/a'b", "/a$b"]
)
def test_bad_paths(path):
    with pytest.raises(InvalidInput, match="^path: "):
        _checks.path("path", path)


@pytest.mark.parametrize(
    ("check", "good", "bad"),
    [
        (
            _checks.address,
            ["10.0.2.22", "fd00::2%eth0", "m1-b.example.org"],
            ["", "-oProxyCommand=x", "a b", "a;b", "@"],
        ),
        (_checks.user, ["root", "_x-1"], ["", "-l", "a b", "1x", "a@b"]),
        (_checks.unit, ["ssh.service", "getty@tty1.service", r"a\x2db.mount"], ["", "-a", "a b", "a;b"]),
        (_checks.positive, [1, 0.5], [0, -1, float("nan")]),
    ],
)
def test_other_checks(check, good, bad):
    for value in good:
        assert check("option", value) == value
    for value in bad:
        with pytest.raises(InvalidInput, match="^option: "):
            check("option", value)


def test_config():
    text = _config.render(
        {"name": "m1-a", "memory": 4096, "hap": True, "usb": False, "disk": ["a,b", 'c"d\\'], "vif": [], "cpus": "1-2"}
    )
    assert text == (
        'name = "m1-a"\nmemory = 4096\nhap = 1\nusb = 0\ndisk = ["a,b", "c\\"d\\\\"]\nvif = []\ncpus = "1-2"\n'
    )


@pytest.mark.parametrize("value", [-1, 1.5, None, "a\nb", "a\x00b", {"a": 1}, [["a"]], ["a\n"]])
def test_config_refuses_what_xl_cannot_read_back(value):
    with pytest.raises(InvalidInput, match="^option: "):
        _config.render({"option": value})


@pytest.mark.parametrize("key", ["", "Name", "a b", "0a", "a=1\nb", "_a"])
def test_config_refuses_bad_names(key):
    with pytest.raises(InvalidInput, match="^extra_config: "):
        _config.render({key: 1})


FILES = [
    _seed.seed_file("/root/.ssh/id_ed25519", "sec\u00e4ret\n", "0600"),
    _seed.seed_file("/etc/hostname", "m1-b\n", "0644"),
]


def members(data):
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return {item.name: (item, tar.extractfile(item).read().decode()) for item in tar.getmembers()}


def test_archive():
    data = _seed.archive(FILES)
    assert len(data) % 512 == 0
    found = members(data)
    assert list(found) == ["etc/hostname", "root/.ssh/id_ed25519"]
    item, content = found["root/.ssh/id_ed25519"]
    assert (item.mode, item.uid, item.gid, item.uname, item.mtime) == (0o600, 0, 0, "root", 0)
    assert content == "sec\u00e4ret\n"
    assert found["etc/hostname"][0].mode == 0o644


def test_archive_depends_on_the_files_only():
    assert _seed.archive(FILES) == _seed.archive(reversed(FILES))
    assert _seed.archive(FILES) != _seed.archive(FILES[:1])


def test_empty_archive_is_one():
    assert members(_seed.archive([])) == {}


def test_long_paths_survive():
    path = "/" + "/".join(["d" * 60] * 4)
    assert list(members(_seed.archive([_seed.seed_file(path, "x", "0644")]))) == [path[1:]]


def test_archive_refuses_a_path_twice():
    with pytest.raises(InvalidInput, match="/etc/hostname is given twice"):
        _seed.archive([*FILES, FILES[1]])


@pytest.mark.parametrize("path", ["etc/x", "/", "/a/../b", "/a/./b", "/a//b", "", "/a/", "/a\0b"])
def test_seed_refuses_paths(path):
    with pytest.raises(InvalidInput, match="^seed_files: path"):
        _seed.seed_file(path, "", "0644")


@pytest.mark.parametrize("mode", ["", "644x", "0o644", "u=rw", "99", "0899"])
def test_seed_refuses_modes(mode):
    with pytest.raises(InvalidInput, match="^seed_files: mode"):
        _seed.seed_file("/a", "", mode)


def test_secret_content_is_not_shown():
    assert "sec" not in repr(FILES[0]).replace("seed", "")
