"""docs/zero-copy-by-hand.md installs vmbeam-channel as role guest_hypervisor does."""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys

import yaml

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
ROLE = REPOSITORY / "roles/guest_hypervisor"
GUIDE = REPOSITORY / "docs/zero-copy-by-hand.md"


def test_the_commands_install_what_the_role_does(tmp_path):
    [commands] = re.findall(r"^```sh\n(.*?)^```$", GUIDE.read_text(), re.M | re.S)
    subprocess.run(
        ["sh", "-euc", commands], cwd=REPOSITORY, env={"PATH": "/usr/bin:/bin", "root": str(tmp_path)}, check=True
    )

    role = yaml.safe_load((ROLE / "vars/main.yml").read_text())
    code = tmp_path / role["_guest_hypervisor_channel_code"].lstrip("/")
    assert sorted(path.name for path in code.iterdir()) == sorted(role["_guest_hypervisor_channel_files"])
    options = (tmp_path / role["_guest_hypervisor_shared_pages_file"].lstrip("/")).read_text()
    assert options == f"options xen-gntalloc limit={role['_guest_hypervisor_shared_pages']}\n"
    assert (tmp_path / "etc/systemd/system/vmbeam-channel.service").exists()
    modules = (tmp_path / "etc/modules-load.d/vmbeam-channel.conf").read_text().split()
    assert set(modules) <= set(role["_guest_hypervisor_kernel_modules"])

    program = (tmp_path / "usr/sbin/vmbeam-channel").read_text()
    assert program.startswith("#!")
    run = subprocess.run(
        [sys.executable, "-IS", "-c", program.replace("/usr/lib/vmbeam", f"{tmp_path}/usr/lib/vmbeam")],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.stderr.startswith("usage: vmbeam-channel receive GUEST"), run.stderr
    # Without exec the time limit of xl would end the shell only.
    for told in (run.stderr, GUIDE.read_text()):
        assert re.findall(r'xl migrate --zero-copy -s "" \w+ "(\w+) vmbeam-channel receive', told) == ["exec"]
