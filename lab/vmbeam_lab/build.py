"""From sources to disks: everything that a machine needs before it can boot."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import sys
import typing

from . import cache, emulator, images, paths
from .errors import LabError
from .inventory import disk_ids
from .phases import phase
from .shell import run
from .topology import Machine, Topology


@dataclasses.dataclass(frozen=True)
class Artefacts:
    """What was built, by the content of its sources."""

    qemu: pathlib.Path  #: directory of the QEMU programs
    key: pathlib.Path  #: private SSH key for the dom0s
    disks: dict[str, dict[str, pathlib.Path]]  #: machine -> {"system": raw, "data": raw}
    guests: dict[str, pathlib.Path]  #: machine -> directory with its guests' xl files

    def digest(self) -> str:
        """Return what identifies a lab that was booted from these."""
        return cache.digest(
            self.qemu.name, sorted(str(path) for kinds in self.disks.values() for path in kinds.values())
        )


def ssh_key() -> pathlib.Path:
    """Return the lab's private SSH key, made once for this user."""

    def make(entry: pathlib.Path) -> None:
        run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "vmbeam-lab", "-f", entry / "id_ed25519"],
            timeout=60,
        )

    return cache.once("ssh", "lab", make) / "id_ed25519"


def build(topology: Topology, machines: list[Machine]) -> Artefacts:
    """Build, or take from the cache, what `machines` boot from."""
    key = ssh_key()
    with phase("emulator"):
        qemu = emulator.build()
    with phase("xen packages"):
        repository = _packages()
    with phase("base system"):
        base = images.base()
    with phase("guests' kernel and initramfs"):
        boot = _guest_boot(base)
    sources = _Sources(repository, key)
    # The two systems are Ansible's work, one process each.
    with concurrent.futures.ThreadPoolExecutor(max_workers=2) as pool:
        # The memory of a guest dom0 is a word of its boot entry: machines of one size share an image.
        goldens = {
            memory_mb: pool.submit(_golden, sources, memory_mb, boot)
            for memory_mb in sorted({machine.guest_dom0_memory_mb for machine in machines})
        }
        systems = {machine.name: pool.submit(_system, sources, topology, machine) for machine in machines}
        golden_images = {memory_mb: image.result() for memory_mb, image in goldens.items()}
        system = {name: image.result() for name, image in systems.items()}
    disks, guests = {}, {}
    for machine in machines:
        with phase(f"{machine.name}: disks"):
            guests[machine.name] = _guest_disks(topology, machine, boot)
            golden = golden_images[machine.guest_dom0_memory_mb]
            files: dict[str, pathlib.Path | str] = {
                "images/guest-hypervisor.raw": golden,
                # Spares the emulated host dom0 the reading of gigabytes.
                "images/guest-hypervisor.raw.sha256": golden.with_name(f"{golden.name}.sha256"),
            }
            for guest in machine.guests.values():
                for disk in disk_ids(guest.name, guest.type):
                    files[f"guests/{disk}.raw"] = guests[machine.name] / f"{disk}.raw"
            data = images.data_disk(machine.name, files, size_mb=12288, label="vmbeam-data")
            disks[machine.name] = {"system": system[machine.name], "data": data}
    return Artefacts(qemu=qemu, key=key, disks=disks, guests=guests)


_ROLES = paths.REPOSITORY / "roles"


@dataclasses.dataclass(frozen=True)
class _Sources:
    """What both system images are made of."""

    repository: pathlib.Path  #: apt repository with the patched Xen
    key: pathlib.Path

    def inputs(self) -> list[typing.Any]:
        return [self.repository.name, _ROLES / "hypervisor_common"]


def _golden(sources: _Sources, dom0_memory_mb: int, boot: pathlib.Path) -> pathlib.Path:
    """Return the disk image of host VMs whose guest dom0 has that much memory."""
    with phase(f"guest hypervisor image, guest dom0 of {dom0_memory_mb} MiB"):
        return images.golden(
            f"host_vm-{dom0_memory_mb}",
            key=sources.key,
            inputs=[
                *sources.inputs(),
                _ROLES / "guest_hypervisor",
                # The daemon of channels is the collection's code.
                *sorted((paths.REPOSITORY / "plugins" / "module_utils").glob("_channel_*.py")),
                paths.REPOSITORY / "plugins" / "module_utils" / "_zerocopy.py",
                _GUESTS / "scripts",
            ],
            variables={
                "golden_image_repo": str(sources.repository),
                "golden_image_size_mb": 2560,
                "golden_image_dom0_memory_mb": dom0_memory_mb,
            },
            build_variables={"lab_guest_boot_files": [str(boot / name) for name in ("vmlinux", "initramfs.img")]},
            tasks=["dom0.yml", "host_vm.yml"],
        )


def _system(sources: _Sources, topology: Topology, machine: Machine) -> pathlib.Path:
    """Return the image of a machine's system disk."""
    with phase(f"{machine.name}: host hypervisor image"):
        return images.host(
            machine.name,
            size_mb=4096,
            key=sources.key,
            inputs=[*sources.inputs(), _ROLES / "host_hypervisor"],
            variables={
                "lab_hostname": machine.name,
                "host_hypervisor_bridge": {
                    "interface": "eth0",
                    "name": "xenbr0",
                    "addresses": [f"{machine.address}/{topology.prefix}"],
                    "gateway": topology.gateway,
                },
                "host_hypervisor_repo": str(sources.repository),
                "host_hypervisor_dom0_memory_mb": machine.host_dom0_memory_mb,
            },
        )


#: Which hypervisors the lab runs (VMBEAM_XEN_FLAVOUR) -> options of packaging/build.
_FLAVOURS: dict[str, list[str]] = {"release": [], "debug": ["--debug"]}


def _packages() -> pathlib.Path:
    """Return the directory with the patched Xen's apt repository (VMBEAM_XEN_REPO: one built before)."""
    given = os.environ.get("VMBEAM_XEN_REPO")
    if given:
        return pathlib.Path(given)
    flavour = os.environ.get("VMBEAM_XEN_FLAVOUR") or "release"
    if flavour not in _FLAVOURS:
        raise LabError(f"VMBEAM_XEN_FLAVOUR is {flavour!r}: not one of {', '.join(_FLAVOURS)}")
    argv: list[str | pathlib.Path] = [paths.REPOSITORY / "packaging" / "build", *_FLAVOURS[flavour]]
    return pathlib.Path(run(argv, timeout=3600, errors=paths.STATE / "packages.log").splitlines()[-1])


_GUESTS = paths.LAB / "guests"


def guest_boot() -> pathlib.Path:
    """Return the directory with what every guest boots, as `build boot` of lab/guests/README.md makes it."""
    return _guest_boot(images.base())


def _guest_boot(base: pathlib.Path) -> pathlib.Path:
    """Return the directory with the kernel and the initramfs that all guests boot."""

    def make(entry: pathlib.Path) -> None:
        with _kernel_tree(base, entry) as tree:
            run(
                [sys.executable, _GUESTS / "build", "boot", "--root", tree, "--output", entry],
                timeout=600,
                log=entry / "build.log",
            )

    return cache.once("guest-boot", cache.digest(base.parent.name, _GUESTS), make)


@contextlib.contextmanager
def _kernel_tree(base: pathlib.Path, entry: pathlib.Path) -> typing.Iterator[pathlib.Path]:
    """Unpack the kernel package of the base system below `entry` for a while."""
    tree = entry / "tree"
    tree.mkdir()
    run(["tar", "-x", "-f", base, "-C", tree, "--wildcards", "./boot/*", "./usr/lib/modules/*"], timeout=300)
    try:
        yield tree
    finally:
        shutil.rmtree(tree)


def single_program(source: pathlib.Path, modules: typing.Sequence[str]) -> pathlib.Path:
    """Return a directory with vmlinux and initramfs.img of a system that runs one C program, and nothing else.

    :param modules: kernel modules for it to load, listed in /modules/order
    """
    base = images.base()
    boot = _guest_boot(base)

    flags = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-static", "-s"]

    def make(entry: pathlib.Path) -> None:
        program = entry / "program"
        run(["gcc", *flags, "-o", program, source], timeout=120)
        with _kernel_tree(base, entry) as tree:
            run(
                [
                    *(sys.executable, _GUESTS / "build", "single", "--root", tree, "--program", program),
                    *(word for module in modules for word in ("--module", module)),
                    *("--output", entry / "initramfs.img"),
                ],
                timeout=300,
            )
        (entry / "vmlinux").symlink_to(boot / "vmlinux")

    return cache.once("single", cache.digest(boot.name, source, flags, list(modules)), make)


def _guest_disks(topology: Topology, machine: Machine, boot: pathlib.Path) -> pathlib.Path:
    """Return the directory with the disks and xl files of a machine's guests."""
    described = [
        {
            "name": guest.name,
            "type": guest.type,
            "memory_mb": guest.memory_mb,
            "vcpus": guest.vcpus,
            "mac": guest.mac,
            "address": guest.address,
            "prefix": topology.prefix,
            "gateway": topology.gateway,
            "memory_writer_mb": guest.memory_writer_mb,
            "memory_writer_rate": guest.memory_writer_rate,
        }
        for guest in machine.guests.values()
    ]

    def make(entry: pathlib.Path) -> None:
        (entry / "guests.json").write_text(json.dumps(described))
        run(
            [
                sys.executable,
                _GUESTS / "build",
                "guests",
                "--boot",
                boot,
                "--guests",
                entry / "guests.json",
                "--output",
                entry,
                "--direct-scripts",
            ],
            timeout=300,
            log=entry / "build.log",
        )

    return cache.once(f"guests-{machine.name}", cache.digest(boot.name, described, _GUESTS), make)
