# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A machine for the roles of the hypervisors: a folder in place of its files, and commands that are not there."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import yaml
from checkout import ROOT, environment

ROLES = ("host_hypervisor", "hypervisor_common")
# What would act on this computer, or tells of it.
COMMANDS = ("apt-cache", "apt-get", "dpkg-query", "systemctl", "update-grub", "xl")
PATHS = re.compile(r"(?<![\w./])/(?=(boot|etc|proc|run|sys|usr|var)/)")


class Machine:
    """Machine m1, a booted Debian 12, and the roles to run on it: copies that have its folder where paths begin."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.root = folder / "root"
        self.facts = {"distribution": "Debian", "distribution_release": "bookworm", "is_chroot": False}
        collection = folder / "collections" / "ansible_collections" / "vmbeam" / "xen"
        collection.mkdir(parents=True)
        for name in ("galaxy.yml", "meta", "plugins"):
            (collection / name).symlink_to(ROOT / name)
        for role in ROLES:
            shutil.copytree(ROOT / "roles" / role, collection / "roles" / role, copy_function=self._copy)
        (self.root / "run" / "systemd" / "system").mkdir(parents=True)
        for name in COMMANDS:
            self.program(name)
        (folder / "library").mkdir()
        self.boots_into(None)

    def _copy(self, source: str, destination: str) -> None:
        # Ansible does not reboot the computer that it runs on.
        text = Path(source).read_text().replace("ansible.builtin.reboot:", "ansible.legacy.boot:")
        Path(destination).write_text(PATHS.sub(f"{self.root}/", text))

    def write(self, path: str, content: str | bytes) -> None:
        """Give the machine a file."""
        file = self.root / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.encode() if isinstance(content, str) else content)

    def files(self) -> dict[str, bytes | None]:
        """What files the machine has, and folders."""
        return {
            f"/{path.relative_to(self.root)}": path.read_bytes() if path.is_file() else None
            for path in self.root.rglob("*")
        }

    def program(self, name: str, *lines: str, library: str = "", then: str = "") -> None:
        """Give the machine a command that prints these lines, or a module of this library."""
        path = self.folder / library / name
        log = f"printf '%s\\n' \"{name} $*\" >>{self.folder}/calls\n" if not library else ""
        path.write_text(f"#!/bin/sh\n{log}{then}\ncat <<'END'\n" + "".join(f"{line}\n" for line in lines) + "END\n")
        path.chmod(0o755)

    def boots_into(self, capabilities: str | None) -> None:
        """Say what /proc/xen/capabilities has after a reboot; None: there is no such file."""
        file = self.root / "proc" / "xen" / "capabilities"
        found = f"mkdir -p {file.parent}\nprintf %s '{capabilities}' >{file}" if capabilities is not None else ""
        then = f"echo reboot >>{self.folder}/calls\nrm -f {file}\n{found}"
        self.program("boot", '{"changed": true, "rebooted": true}', library="library", then=then)

    @property
    def calls(self) -> list[str]:
        """The commands that were run, in order, and each reboot."""
        log = self.folder / "calls"
        return log.read_text().splitlines() if log.exists() else []

    def run(
        self, role: str, *arguments: str, tasks_from: str = "main", **variables: Any
    ) -> subprocess.CompletedProcess[str]:
        self.program("find_facts", json.dumps({"ansible_facts": self.facts}), library="library")
        include = {"name": f"vmbeam.xen.{role}", "tasks_from": tasks_from}
        tasks = [{"ansible.legacy.find_facts": {}}, {"ansible.builtin.include_role": include}]
        play = {"hosts": "m1", "connection": "local", "gather_facts": False, "tasks": tasks}
        (self.folder / "play.yml").write_text(yaml.safe_dump([play]))
        done = subprocess.run(
            ["ansible-playbook", "-i", "m1,", "-e", json.dumps(variables), *arguments, self.folder / "play.yml"],
            env=environment(
                PATH=f"{self.folder}:{os.environ['PATH']}", ANSIBLE_COLLECTIONS_PATH=f"{self.folder}/collections"
            ),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        print(done.stdout, done.stderr)
        return done
