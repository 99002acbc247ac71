"""From sources to disks: everything that a machine needs before it can boot."""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib

from . import cache, emulator, images, paths
from .inventory import disk_ids
from .phases import phase
from .shell import run
from .topology import Machine, Topology

_GUEST_DISK_DIRECTORY = "guests"


@dataclasses.dataclass(frozen=True)
class Artefacts:
    """What was built, by the content of its sources."""

    qemu: pathlib.Path  #: directory of the QEMU programs
    key: pathlib.Path  #: private SSH key for the dom0s
    disks: dict[str, dict[str, pathlib.Path]]  #: machine -> {"system": raw, "data": raw}
    golden_sha256: str  #: of the guest hypervisor's golden image

    def digest(self) -> str:
        """Return what identifies a lab that was booted from these."""
        return cache.digest(
            self.qemu.name,
            {name: {kind: str(path) for kind, path in disks.items()} for name, disks in self.disks.items()},
        )


def ssh_key() -> pathlib.Path:
    """Return the lab's private SSH key, made once for this user."""

    def make(entry: pathlib.Path) -> None:
        run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "vmbeam-lab", "-f", entry / "id_ed25519"],
            timeout=60,
        )

    return cache.once("ssh", "lab", make) / "id_ed25519"


def _sha256(path: pathlib.Path) -> str:
    beside = path.with_suffix(".sha256")
    if not beside.exists():
        with open(path, "rb") as handle:
            beside.write_text(hashlib.file_digest(handle, "sha256").hexdigest())
    return beside.read_text()


def build(topology: Topology, machines: list[Machine]) -> Artefacts:
    """Build, or take from the cache, what `machines` boot from."""
    key = ssh_key()
    with phase("emulator"):
        qemu = emulator.build()
    with phase("xen packages"):
        repository = pathlib.Path(
            run([paths.REPOSITORY / "packaging" / "build"], timeout=3600).splitlines()[-1]
        )
    with phase("base system"):
        base = images.base()
    with phase("guest images"):
        guests = _guest_files(base)
    roles = paths.REPOSITORY / "roles"
    with phase("guest hypervisor image"):
        golden = images.disk(
            "host_vm",
            size_mb=3072,
            key=key,
            inputs=[
                repository.name,
                roles / "guest_hypervisor",
                roles / "xen_packages",
                images.PLAYBOOKS / "dom0.yml",
                guests.name,
            ],
            variables={
                "lab_hostname": "host-vm",
                "guest_hypervisor_repo": str(repository),
                "guest_hypervisor_dom0_memory_mb": machines[0].guest_dom0_memory_mb,
                "lab_guest_boot_files": [str(guests / "vmlinuz"), str(guests / "initramfs.img")],
            },
        )
    disks = {}
    for machine in machines:
        with phase(f"{machine.name}: disks"):
            system = images.disk(
                "host",
                size_mb=4096,
                key=key,
                inputs=[
                    repository.name,
                    roles / "host_hypervisor",
                    roles / "xen_packages",
                    images.PLAYBOOKS / "dom0.yml",
                ],
                variables={
                    "lab_hostname": machine.name,
                    "lab_address": f"{machine.address}/{topology.prefix}",
                    "lab_gateway": topology.gateway,
                    "host_hypervisor_repo": str(repository),
                    "host_hypervisor_dom0_memory_mb": machine.host_dom0_memory_mb,
                },
            )
            files: dict[str, pathlib.Path | str] = {"images/guest-hypervisor.raw": golden}
            for guest in machine.guests.values():
                for disk in disk_ids(guest.name, guest.type):
                    source = "hvm-root.raw" if disk.endswith("-root") else "data.raw"
                    files[f"{_GUEST_DISK_DIRECTORY}/{disk}.raw"] = guests / source
            data = images.data_disk(machine.name, files, size_mb=12288, label="vmbeam-data")
            disks[machine.name] = {"system": system, "data": data}
    return Artefacts(qemu=qemu, key=key, disks=disks, golden_sha256=_sha256(golden))


def _guest_files(base: pathlib.Path) -> pathlib.Path:
    """Return the directory with the guests' kernel, initramfs and disks."""
    sources = paths.LAB / "guests"

    def make(entry: pathlib.Path) -> None:
        tree = entry / "tree"
        tree.mkdir()
        run(
            ["tar", "-x", "-f", base, "-C", tree, "--wildcards", "./boot/*", "./usr/lib/modules/*"],
            timeout=300,
        )
        run([sources / "build", "--root", tree, "--output", entry], timeout=600, log=entry / "build.log")
        run(["rm", "-rf", tree], timeout=60)

    return cache.once("guests", cache.digest(base.parent.name, sources), make)
