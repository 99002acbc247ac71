"""Bringing the golden image to machines, by Ansible itself; and that build and role agree."""

import hashlib
import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from checkout import environment

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def bring(tmp_path):
    """Run the role's tasks distribute.yml against this computer; return Ansible's changed and failed counts."""
    source, destination = tmp_path / "golden.raw", tmp_path / "host" / "images" / "guest-hypervisor.raw"
    playbook = tmp_path / "play.yml"
    role = {"name": "vmbeam.xen.golden_image", "tasks_from": "distribute.yml"}
    play = {
        "hosts": "localhost",
        "connection": "local",
        "gather_facts": False,
        "tasks": [{"name": "Bring it", "ansible.builtin.include_role": role}],
    }
    playbook.write_text(yaml.safe_dump([play]))
    variables = {"vmbeam_golden_image": str(source), "vmbeam_guest_hypervisor_image": str(destination)}

    def run():
        done = subprocess.run(
            ["ansible-playbook", "-i", "localhost,", "-e", json.dumps(variables), playbook],
            cwd=ROOT,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        counts = dict(re.findall(r"(changed|failed)=(\d+)", done.stdout))
        return int(counts["changed"]), int(counts["failed"]), done.stdout

    return run, source, destination


def write(source, content):
    source.write_bytes(content)
    Path(f"{source}.sha256").write_text(f"{hashlib.sha256(content).hexdigest()}  {source.name}\n")


@pytest.mark.skipif(os.getuid() != 0, reason="files on a host dom0 are root's")
def test_an_image_is_brought_once_and_again_if_it_is_another(bring):
    run, source, destination = bring
    stated = Path(f"{destination}.sha256")

    changed, failed, output = run()
    assert failed == 1
    assert "playbooks/golden_image.yml" in output

    write(source, b"first")
    changed, failed, output = run()
    assert (changed > 0, failed) == (True, 0), output
    assert destination.read_bytes() == b"first"
    assert stated.read_text() == f"{hashlib.sha256(b'first').hexdigest()}  guest-hypervisor.raw\n"
    # Only so is it believed (module host_vm).
    assert stated.stat().st_mtime_ns >= destination.stat().st_mtime_ns

    assert run()[:2] == (0, 0)

    write(source, b"second")
    changed, failed, output = run()
    assert (changed > 0, failed) == (True, 0), output
    assert destination.read_bytes() == b"second"
    assert stated.read_text().startswith(hashlib.sha256(b"second").hexdigest())
