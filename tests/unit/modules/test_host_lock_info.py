# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""host_lock_info tells what host_lock did, and makes nothing of its own."""

from __future__ import annotations


def test_it_tells_who_has_the_machine(run, tmp_path):
    file = tmp_path / "run" / "lock.json"
    nobody = run("host_lock_info", path=str(file))
    assert (nobody["changed"], nobody["holder"]) == (False, None)
    assert not file.parent.exists()

    run("host_lock", owner="one", path=str(file), ttl=3600, details={"user": "alice"})
    before = file.read_bytes()
    seen = run("host_lock_info", path=str(file))
    assert seen["changed"] is False
    assert seen["holder"]["owner"] == "one"
    assert seen["holder"]["details"] == {"user": "alice"}
    assert 3500 < seen["holder"]["expires_in_seconds"] <= 3600
    assert seen["holder"]["expired"] is False
    assert file.read_bytes() == before


def test_a_file_that_is_no_lock_is_an_error(run, tmp_path):
    file = tmp_path / "lock.json"
    file.write_text("{}")
    assert run("host_lock_info", path=str(file)).failed
