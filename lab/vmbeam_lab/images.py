"""Builds the lab's disk images, with the roles that install real machines.

A root file system from mmdebstrap is unpacked on a loop-mounted disk; Ansible
configures it over SSH into a chroot (``sshd -i`` behind ProxyCommand needs no
network and no running system), then GRUB is installed. Needs root.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import re
import shutil
import stat
import typing

from . import ansible, cache, paths
from .errors import LabError
from .shell import run

RELEASE = "bookworm"

#: What a dom0 of the lab has before any role runs on it.
_PACKAGES = (
    "systemd",
    "systemd-sysv",
    "dbus",
    "udev",
    "kmod",
    "procps",
    "iproute2",
    "openssh-server",
    "openssh-client",
    "python3",
    "python3-apt",
    "ca-certificates",
    "initramfs-tools",
    "zstd",
    "linux-image-amd64",
    "e2fsprogs",
    "grub2-common",
    "grub-pc-bin",
)

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

#: Debian's grub-pc would write such a file; a lab machine has a serial port and no screen.
_GRUB = """\
GRUB_DISTRIBUTOR=Debian
GRUB_DEFAULT=0
GRUB_TIMEOUT=0
GRUB_TERMINAL=serial
GRUB_SERIAL_COMMAND="serial --unit=0 --speed=115200"
GRUB_DISABLE_OS_PROBER=true
"""


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
    argv = [
        "mmdebstrap",
        "--variant=minbase",
        "--mode=root",
        f"--include={','.join(_PACKAGES)}",
        *[f"--dpkgopt=path-exclude={pattern}" for pattern in _DPKG_EXCLUDE],
        f"--essential-hook={hook}",
        f"--customize-hook={strip}",
        '--aptopt=Acquire::Retries "3"',
        RELEASE,
    ]

    def make(entry: pathlib.Path) -> None:
        run([*argv, entry / "root.tar"], timeout=1800, log=entry / "build.log")

    return cache.once("base", cache.digest(argv), make) / "root.tar"


@contextlib.contextmanager
def _loop(disk: pathlib.Path) -> typing.Iterator[str]:
    device = run(["losetup", "--find", "--show", "--partscan", disk], timeout=60).strip()
    try:
        yield device
    finally:
        run(["losetup", "--detach", device], timeout=60)


@contextlib.contextmanager
def _mounted(argv: list[str], target: pathlib.Path) -> typing.Iterator[None]:
    target.mkdir(parents=True, exist_ok=True)
    run(["mount", *argv, target], timeout=60)
    try:
        yield
    finally:
        run(["umount", "--recursive", target], timeout=120)


def _populate_dev(dev: pathlib.Path, loop: str, uuid: str) -> None:
    """Give the chroot the few nodes it needs, so that nothing on this computer is touched.

    The link by UUID is what grub-mkconfig looks for before it writes root=UUID=.
    """
    for name, major, minor in (
        ("null", 1, 3),
        ("zero", 1, 5),
        ("full", 1, 7),
        ("random", 1, 8),
        ("urandom", 1, 9),
        ("tty", 5, 0),
    ):
        os.mknod(dev / name, stat.S_IFCHR | 0o666, os.makedev(major, minor))
        os.chmod(dev / name, 0o666)  # noqa: S103 (as on every Unix)
    for node in (loop, f"{loop}p1"):
        device = os.stat(node).st_rdev
        os.mknod(dev / pathlib.Path(node).name, stat.S_IFBLK | 0o660, device)
    (dev / "disk" / "by-uuid").mkdir(parents=True)
    (dev / "disk" / "by-uuid" / uuid).symlink_to(f"/dev/{pathlib.Path(loop).name}p1")
    (dev / "fd").symlink_to("/proc/self/fd")
    (dev / "shm").mkdir()
    (dev / "pts").mkdir()


def _configure(
    root: pathlib.Path, playbook: pathlib.Path, variables: dict, key: pathlib.Path, log: pathlib.Path
) -> None:
    """Run `playbook` against the chroot."""
    (root / "run" / "sshd").mkdir(parents=True, exist_ok=True)
    ssh = root / "root" / ".ssh"
    ssh.mkdir(mode=0o700, exist_ok=True)
    shutil.copy(key.with_suffix(".pub"), ssh / "authorized_keys")
    (ssh / "authorized_keys").chmod(0o600)
    policy = root / "usr" / "sbin" / "policy-rc.d"
    policy.write_text("#!/bin/sh\nexit 101\n")
    policy.chmod(0o755)
    proxy = f"chroot {root} /usr/sbin/sshd -i -o UseDNS=no -o UsePAM=no"
    inventory = {
        "all": {
            "hosts": {
                "image": {
                    "ansible_host": "image",
                    "ansible_user": "root",
                    "ansible_python_interpreter": "/usr/bin/python3",
                    "ansible_ssh_private_key_file": str(key),
                    "ansible_ssh_common_args": (
                        f"-o ProxyCommand='{proxy}' -o StrictHostKeyChecking=no "
                        "-o UserKnownHostsFile=/dev/null -o LogLevel=ERROR -o ControlPath=none"
                    ),
                }
            }
        }
    }
    hosts = log.with_name(f"{playbook.stem}-inventory.json")
    hosts.write_text(json.dumps(inventory))
    extra = log.with_name(f"{playbook.stem}-variables.json")
    extra.write_text(json.dumps(variables))
    try:
        run(
            ["ansible-playbook", "-i", hosts, "-e", f"@{extra}", playbook],
            timeout=1800,
            log=log,
            cwd=paths.REPOSITORY,
            env=ansible.environment(),
        )
    finally:
        policy.unlink()


def disk(
    kind: str,
    name: str,
    *,
    size_mb: int,
    inputs: list,
    variables: dict,
    key: pathlib.Path,
) -> pathlib.Path:
    """Return a bootable raw disk made by ``lab/images/<kind>.yml``.

    :param name: what the cache keeps it under; of each name it keeps the newest few
    :param inputs: what besides the playbook decides the result (roles, packages)
    :param key: private key whose public half may log in as root
    """
    tarball = base()
    playbook = PLAYBOOKS / f"{kind}.yml"

    def make(entry: pathlib.Path) -> None:
        image, root, log = entry / "disk.raw", entry / "root", entry / "build.log"
        with open(image, "wb") as handle:
            handle.truncate(size_mb << 20)
        run(
            ["sh", "-c", 'printf "2048,,L,*\\n" | sfdisk --quiet --label dos "$0"', image],
            timeout=60,
            log=log,
        )
        with _loop(image) as loop:
            part = f"{loop}p1"
            if not os.path.exists(part):
                # Without udev in charge the kernel's devtmpfs makes the node.
                run(["partx", "--update", loop], timeout=60, log=log)
            run(["mkfs.ext4", "-q", "-O", "^metadata_csum_seed,^orphan_file", part], timeout=120, log=log)
            uuid = run(["blkid", "-o", "value", "-s", "UUID", part], timeout=60).strip()
            with _mounted([part], root):
                run(["tar", "-x", "--numeric-owner", "-f", tarball, "-C", root], timeout=600, log=log)
                shutil.copy("/etc/resolv.conf", root / "etc" / "resolv.conf")
                (root / "etc" / "fstab").write_text(f"UUID={uuid} / ext4 rw,noatime 0 0\n")
                with contextlib.ExitStack() as stack:
                    for argv, where in (
                        (["-t", "tmpfs", "dev"], "dev"),
                        (["-t", "proc", "proc"], "proc"),
                        (["-t", "sysfs", "sys"], "sys"),
                    ):
                        stack.enter_context(_mounted(argv, root / where))
                    _populate_dev(root / "dev", loop, uuid)
                    (root / "boot" / "grub").mkdir(exist_ok=True)
                    (root / "etc" / "default" / "grub").write_text(_GRUB)
                    _configure(root, playbook, variables, key, log)
                    run(["chroot", root, "update-grub"], timeout=120, log=log)
                    run(
                        [
                            "chroot",
                            root,
                            "grub-install",
                            "--target=i386-pc",
                            "--no-floppy",
                            f"/dev/{pathlib.Path(loop).name}",
                        ],
                        timeout=120,
                        log=log,
                    )
                run(
                    ["sh", "-c", f"rm -rf '{root}'/var/cache/apt/archives/*.deb '{root}'/var/lib/apt/lists/*"],
                    timeout=60,
                )
                config = (root / "boot" / "grub" / "grub.cfg").read_text()
                if not re.search(r"multiboot2?\s.*xen", config):
                    raise LabError(f"{kind} image: no Xen entry in grub.cfg; see {log}")
            root.rmdir()

    return (
        cache.once(
            f"image-{name}",
            cache.digest(tarball.parent.name, _GRUB, playbook, variables, key.with_suffix(".pub"), size_mb, inputs),
            make,
        )
        / "disk.raw"
    )


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
