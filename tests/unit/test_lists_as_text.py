# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Lists given as text, all that -e name=value and a survey of AWX can have, as Ansible reads them."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from checkout import environment

ROOT = Path(__file__).resolve().parents[2]
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5 me@home, sweet home"
OTHER = "ecdsa-sha2-nistp256 AAAAE2VjZHNh you"
SLOTS = {
    slot: {"name": f"m1-{slot}", "address": f"192.0.2.2{number}/24", "mac": f"00:16:3e:00:00:0{number}"}
    for number, slot in enumerate("ab")
}
TEMPLATES = ROOT / "roles"
# What of role host_vm makes text of the lists.
SEEN = {
    "network": "{{ lookup('ansible.builtin.template', templates ~ '/host_vm/templates/bridge.network.j2') }}",
    "keys": "{{ host_vm_own_logins }}",
    "entries": "{{ host_vm_hosts }}",
    "bridge": "{{ lookup('ansible.builtin.template', templates ~ '/hypervisor_common/templates/bridge.network.j2') }}",
}


def run(folder: Path, *given: str) -> tuple[str, Any]:
    """Validate variables of role host_vm, each given to -e; return Ansible's words, and what came of the variables."""
    tasks = [
        {
            "ansible.builtin.import_role": {"name": "vmbeam.xen.host_vm", "tasks_from": "validate.yml"},
        },
        {"ansible.builtin.copy": {"content": "{{ seen | to_json }}", "dest": f"{folder}/seen.json"}},
    ]
    variables = {
        "vmbeam_slots": SLOTS,
        "vmbeam_host_vm_memory_mb": 1024,
        "templates": str(TEMPLATES),
        "_hypervisor_common_role": "host_hypervisor",
        "_hypervisor_common_bridge": {"addresses": "192.0.2.1/24 2001:db8::1/64", "dns": "192.0.2.53"},
        "seen": SEEN,
    }
    play = {"hosts": "m1", "connection": "local", "gather_facts": False, "vars": variables, "tasks": tasks}
    (folder / "play.yml").write_text(yaml.safe_dump([play]))
    done = subprocess.run(
        [
            "ansible-playbook",
            "-i",
            "m1,m1-a,m1-b",
            *[word for text in given for word in ("-e", text)],
            folder / "play.yml",
        ],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    seen = folder / "seen.json"
    return " ".join((done.stdout + done.stderr).split()), json.loads(seen.read_text()) if seen.exists() else None


def test_lists_of_a_host_vm_as_text(tmp_path):
    _words, seen = run(
        tmp_path,
        "vmbeam_dns_servers=192.0.2.53,192.0.2.54",
        json.dumps({"vmbeam_authorized_keys": f"{KEY}\n{OTHER}\n"}),
        """vmbeam_hosts_entries='[{"name": "db", "address": "192.0.2.9"}]'""",
    )
    assert [line for line in seen["network"].splitlines() if line.startswith("DNS=")] == [
        "DNS=192.0.2.53",
        "DNS=192.0.2.54",
    ]
    assert seen["keys"] == [KEY, OTHER]
    assert seen["entries"] == [{"name": "db", "address": "192.0.2.9"}]
    assert [line for line in seen["bridge"].splitlines() if "192.0.2.1" in line or "db8" in line] == [
        "Address=192.0.2.1/24",
        "Address=2001:db8::1/64",
    ]
    assert "DNS=192.0.2.53\n" in seen["bridge"]


def test_one_key_as_text_is_a_list_of_one(tmp_path):
    _words, seen = run(tmp_path, json.dumps({"vmbeam_authorized_keys": KEY}))
    assert seen["keys"] == [KEY]


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ("vmbeam_authorized_keys=/root/key.pub", "vmbeam_authorized_keys must be a list of public SSH keys"),
        ("vmbeam_dns_servers=[192.0.2.53]", "vmbeam_dns_servers is '[192.0.2.53]', which is not JSON"),
        ("vmbeam_hosts_entries=db", "vmbeam_hosts_entries is 'db': give a list, or one in JSON"),
    ],
)
def test_what_is_no_list_is_refused_by_its_name(tmp_path, given, error):
    words, seen = run(tmp_path, given)
    assert error in words
    assert seen is None
