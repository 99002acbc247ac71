"""Builds the lab's disk images, with the roles that install real machines.

A root file system from mmdebstrap becomes a disk that Ansible configures (role golden_image). Needs root.
"""

from __future__ import annotations

import json
import pathlib
import shutil
import sys
import typing

import yaml

from . import ansible, cache, paths
from .shell import isolated, run

RELEASE = "bookworm"

#: Only what a lab machine's disks need: a small initramfs loads faster under emulation.
_INITRAMFS_MODULES = ("virtio_pci", "virtio_blk", "ahci", "sd_mod", "ext4")

_DPKG_EXCLUDE = (
    "/usr/share/man/*",
    "/usr/share/doc/*",
    "/usr/share/locale/*",
    "/usr/share/info/*",
    # The initramfs needs no udev: it is told its modules, and the kernel makes the nodes.
    "/usr/share/initramfs-tools/hooks/udev",
    "/usr/share/initramfs-tools/scripts/*/udev",
)

PLAYBOOKS = paths.LAB / "images"

#: Makes the golden image, here as anywhere.
GOLDEN_IMAGE = paths.REPOSITORY / "roles" / "golden_image"
#: Makes a disk of a root file system and a playbook, and leaves nothing behind when it is killed.
BUILDER = GOLDEN_IMAGE / "files" / "build_image.py"


def base() -> pathlib.Path:
    """Return the tarball of the plain Debian root file system."""
    modules = "\\n".join(_INITRAMFS_MODULES)
    hook = (
        'mkdir -p "$1/etc/initramfs-tools/conf.d" "$1/usr/share/initramfs-tools/modules.d"; '
        'echo MODULES=list > "$1/etc/initramfs-tools/conf.d/vmbeam-lab"; '
        f'printf "{modules}\\n" > "$1/usr/share/initramfs-tools/modules.d/vmbeam-lab"; '
        # Finds the root file system by its UUID; it would come with udev.
        'hook="$1/etc/initramfs-tools/hooks/vmbeam-lab"; mkdir -p "${hook%/*}"; '
        r'printf "#!/bin/sh\n[ \"\$1\" = prereqs ] && exit 0\n. /usr/share/initramfs-tools/hook-functions\n'
        r'copy_exec /sbin/blkid\n" > "$hook"; '
        'chmod 755 "$hook"'
    )
    # The kernel checks each module's signature and type information, a second or two apiece
    # in a host VM's dom0; without them there is nothing to check.
    strip = (
        'find "$1/usr/lib/modules" -name "*.ko" -print0 | '
        "xargs -0 -n 200 -P 2 strip --strip-debug --remove-section=.BTF; "
        'chroot "$1" update-initramfs -u -k all'
    )
    packages = yaml.safe_load((GOLDEN_IMAGE / "vars" / "main.yml").read_text())["_golden_image_packages"]
    argv = [
        "mmdebstrap",
        "--variant=minbase",
        "--mode=root",
        f"--include={','.join(packages)}",
        *[f"--dpkgopt=path-exclude={pattern}" for pattern in _DPKG_EXCLUDE],
        f"--essential-hook={hook}",
        f"--customize-hook={strip}",
        '--aptopt=Acquire::Retries "3"',
        RELEASE,
    ]

    def make(entry: pathlib.Path) -> None:
        # Its root file system is in the entry, so that it goes with what an interrupted build left.
        work = entry / "work"
        work.mkdir()
        environment = {"TMPDIR": str(work)}
        run(isolated([*argv, str(entry / "root.tar")]), timeout=1800, log=entry / "build.log", env=environment)
        shutil.rmtree(work)

    return cache.once("base", cache.digest(argv), make) / "root.tar"


def host(
    name: str, *, size_mb: int, inputs: list[typing.Any], variables: dict[str, typing.Any], key: pathlib.Path
) -> pathlib.Path:
    """Return the system disk of machine `name`, a bootable raw one made by ``lab/images/host.yml``.

    :param inputs: what besides the playbook decides the result (roles, packages)
    :param key: private key whose public half may log in as root
    """
    tarball = base()
    playbook = PLAYBOOKS / "host.yml"

    def make(entry: pathlib.Path) -> None:
        extra = entry / "variables.json"
        extra.write_text(json.dumps(variables))
        run(
            [
                *(sys.executable, BUILDER, "--base", tarball, "--size-mb", str(size_mb)),
                *("--playbook", playbook, "--variables", extra),
                *("--authorized-keys", key.with_suffix(".pub"), "--output", entry / "disk.raw"),
            ],
            timeout=3600,
            log=entry / "build.log",
            cwd=paths.REPOSITORY,
            env=ansible.environment(),
        )

    key_of_inputs = cache.digest(
        *(tarball.parent.name, BUILDER, playbook, PLAYBOOKS / "dom0.yml", PLAYBOOKS / "vars.yml"),
        *(variables, key.with_suffix(".pub"), size_mb, inputs),
    )
    return cache.once(f"image-host-{name}", key_of_inputs, make) / "disk.raw"


def golden(
    name: str,
    *,
    inputs: list[typing.Any],
    variables: dict[str, typing.Any],
    build_variables: dict[str, typing.Any],
    tasks: list[str],
    key: pathlib.Path,
) -> pathlib.Path:
    """Return the golden image of host VMs, with its checksum beside it, made by ``playbooks/golden_image.yml``.

    :param name: what the cache keeps it under; of each name it keeps the newest few
    :param inputs: what besides playbooks, variables and the lab's own files decides the result (roles, packages)
    :param variables: options of role golden_image
    :param build_variables: further variables of the lab's tasks
    :param tasks: files in ``lab/images`` with what only the lab needs
    :param key: private key whose public half may log in as root
    """
    tarball = base()
    playbook = paths.REPOSITORY / "playbooks" / "golden_image.yml"
    inside = [PLAYBOOKS / task for task in tasks]
    files = [PLAYBOOKS / "vars.yml", PLAYBOOKS / "host_vm_vars.yml"]

    def make(entry: pathlib.Path) -> None:
        extra = entry / "variables.json"
        options = {
            **variables,
            "golden_image_path": str(entry / "guest-hypervisor.raw"),
            "golden_image_base": str(tarball),
            "golden_image_authorized_keys": [key.with_suffix(".pub").read_text().strip()],
            # Not among what names the result: that is the same in another checkout.
            "golden_image_variables": {**build_variables, "lab_guest_scripts": str(paths.LAB / "guests" / "scripts")},
            "golden_image_variable_files": [str(path) for path in files],
            "golden_image_tasks": [str(path) for path in inside],
        }
        extra.write_text(json.dumps(options))
        run(
            isolated(["ansible-playbook", "-i", "localhost,", "-e", f"@{extra}", str(playbook)]),
            timeout=3600,
            log=entry / "build.log",
            cwd=paths.REPOSITORY,
            env=ansible.environment(),
        )

    key_of_inputs = cache.digest(
        *(tarball.parent.name, GOLDEN_IMAGE, playbook, playbook.with_name("_golden_image.yml"), files, inside),
        *(variables, build_variables, key.with_suffix(".pub"), inputs),
    )
    return cache.once(f"image-{name}", key_of_inputs, make) / "guest-hypervisor.raw"


def data_disk(name: str, files: dict[str, pathlib.Path | str], *, size_mb: int, label: str) -> pathlib.Path:
    """Return a raw ext4 disk that holds `files` (path in it -> source file or text)."""

    def make(entry: pathlib.Path) -> None:
        tree = entry / "tree"
        for where, source in files.items():
            target = tree / where
            target.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(source, pathlib.Path):
                run(["cp", "--sparse=always", "--reflink=auto", source, target], timeout=300)
            else:
                target.write_text(source)
        run(
            ["mke2fs", "-q", "-t", "ext4", "-L", label, "-d", tree, entry / "disk.raw", f"{size_mb}M"],
            timeout=600,
            log=entry / "build.log",
        )
        shutil.rmtree(tree)

    # The sources are cache entries, named by their own content.
    names = [(where, str(source)) for where, source in files.items()]
    return cache.once(f"data-{name}", cache.digest(names, size_mb, label), make) / "disk.raw"
