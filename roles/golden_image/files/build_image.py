"""Makes a bootable raw disk of a root file system that a playbook configures.

A tarball is unpacked on a loop-mounted disk; ansible-playbook configures it, as host ``image``, over SSH into a chroot
(``sshd -i`` behind ProxyCommand needs no network and no running system); then GRUB is installed. Needs root.

All of it happens with PIDs and mounts of its own and on a loop device that its last user frees: however the build ends,
by SIGKILL too, the kernel ends its processes, undoes its mounts and frees the device.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import errno
import fcntl
import json
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

#: Command -> Debian package.
TOOLS = {
    "ansible-playbook": "ansible-core",
    "blkid": "util-linux",
    "mkfs.ext4": "e2fsprogs",
    "partx": "util-linux",
    "setpriv": "util-linux",
    "sfdisk": "fdisk",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "unshare": "util-linux",
}

#: Debian's grub-pc would write such a file; a virtual machine has a serial port and no screen.
GRUB = """\
GRUB_DISTRIBUTOR=Debian
GRUB_DEFAULT=0
GRUB_TIMEOUT=0
GRUB_TERMINAL=serial
GRUB_SERIAL_COMMAND="serial --unit=0 --speed=115200"
GRUB_DISABLE_OS_PROBER=true
"""

#: Seconds for the playbook, and for each other step.
PLAYBOOK_TIMEOUT = 1800
STEP_TIMEOUT = 600

# linux/loop.h
_LOOP_CTL_GET_FREE = 0x4C82
_LOOP_CONFIGURE = 0x4C0A
_LO_FLAGS_AUTOCLEAR = 4
_LO_FLAGS_PARTSCAN = 8


class _LoopInfo64(ctypes.Structure):
    _fields_ = (
        ("device", ctypes.c_uint64 * 5),  # device, inode, rdevice, offset, size limit
        ("number", ctypes.c_uint32 * 3),  # number, encryption type and key size
        ("flags", ctypes.c_uint32),
        ("names", ctypes.c_uint8 * (64 + 64 + 32)),
        ("init", ctypes.c_uint64 * 2),
    )


class _LoopConfig(ctypes.Structure):
    _fields_ = (
        ("fd", ctypes.c_uint32),
        ("block_size", ctypes.c_uint32),
        ("info", _LoopInfo64),
        ("reserved", ctypes.c_uint64 * 8),
    )


class BuildError(Exception):
    """The image cannot be made."""


def run(*argv: str | Path, timeout: float = STEP_TIMEOUT, stdin: str = "", capture: bool = False) -> str:
    """Run a command, its output to ours as it comes; return it instead if `capture` is set.

    :raises BuildError: it failed or took longer than `timeout` seconds
    """
    words = [str(word) for word in argv]
    print("+", *words, flush=True)
    try:
        done = subprocess.run(
            words, input=stdin, stdout=subprocess.PIPE if capture else None, text=True, timeout=timeout, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise BuildError(f"{words[0]}: {exc}") from exc
    if done.returncode:
        raise BuildError(f"{' '.join(words)}: exit status {done.returncode}")
    return done.stdout or ""


def attach(image: Path) -> tuple[str, int]:
    """Make a loop device of a file.

    losetup cannot make one that is free again as soon as nobody has it open.

    :return: the device, and a file descriptor that keeps it
    """
    with open(image, "r+b") as backing, open("/dev/loop-control", "rb") as control:
        for _attempt in range(64):
            name = f"/dev/loop{fcntl.ioctl(control, _LOOP_CTL_GET_FREE)}"
            device = os.open(name, os.O_RDWR | os.O_CLOEXEC)
            config = _LoopConfig(fd=backing.fileno())
            config.info.flags = _LO_FLAGS_AUTOCLEAR | _LO_FLAGS_PARTSCAN
            try:
                fcntl.ioctl(device, _LOOP_CONFIGURE, config)
            except OSError as exc:
                os.close(device)
                if exc.errno != errno.EBUSY:  # another process was quicker
                    raise
                continue
            return name, device
    raise BuildError("no free loop device")


def populate_dev(dev: Path, loop: str, uuid: str) -> None:
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
        os.mknod(dev / Path(node).name, stat.S_IFBLK | 0o660, os.stat(node).st_rdev)
    (dev / "disk" / "by-uuid").mkdir(parents=True)
    (dev / "disk" / "by-uuid" / uuid).symlink_to(f"/dev/{Path(loop).name}p1")
    (dev / "fd").symlink_to("/proc/self/fd")
    (dev / "shm").mkdir()
    (dev / "pts").mkdir()


@contextlib.contextmanager
def no_services(root: Path):
    """Keep packages from starting what they install."""
    policy = root / "usr" / "sbin" / "policy-rc.d"
    policy.parent.mkdir(parents=True, exist_ok=True)
    policy.write_text("#!/bin/sh\nexit 101\n")
    policy.chmod(0o755)
    yield
    policy.unlink()


def configure(root: Path, scratch: Path, playbook: Path, variables: list[Path]) -> None:
    """Run the playbook against the chroot, through an SSH daemon with keys that live no longer than the build."""
    inside = root / "run" / "vmbeam-image"
    inside.mkdir(parents=True, mode=0o700)
    (root / "run" / "sshd").mkdir(parents=True, exist_ok=True)
    run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", inside / "host_key")
    run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", scratch / "key")
    shutil.copy(scratch / "key.pub", inside / "authorized_keys")
    daemon = "/usr/sbin/sshd -i -o UseDNS=no -o UsePAM=no -h /run/vmbeam-image/host_key"
    proxy = f"chroot {root} {daemon} -o AuthorizedKeysFile=/run/vmbeam-image/authorized_keys"
    host = {
        "ansible_host": "image",
        "ansible_user": "root",
        "ansible_python_interpreter": "/usr/bin/python3",
        "ansible_ssh_private_key_file": str(scratch / "key"),
        "ansible_ssh_common_args": (
            f"-o ProxyCommand='{proxy}' -o StrictHostKeyChecking=no "
            "-o UserKnownHostsFile=/dev/null -o LogLevel=ERROR -o ControlPath=none"
        ),
    }
    inventory = scratch / "inventory.json"
    inventory.write_text(json.dumps({"all": {"hosts": {"image": host}}}))
    extra = [word for path in variables for word in ("-e", f"@{path}")]
    run("ansible-playbook", "-i", inventory, *extra, playbook, timeout=PLAYBOOK_TIMEOUT)


def build(options: argparse.Namespace, scratch: Path) -> None:
    """Make the image. Mounts are undone at the end, so that the file system is whole; after a failure by the kernel."""
    image, root = options.output, scratch / "root"
    with open(image, "wb") as handle:
        handle.truncate(options.size_mb << 20)
    run("sfdisk", "--quiet", "--label", "dos", image, stdin="2048,,L,*\n")
    loop, keep = attach(image)
    part = f"{loop}p1"
    if not os.path.exists(part):
        # Without udev in charge the kernel's devtmpfs makes the node.
        run("partx", "--update", loop)
    run("mkfs.ext4", "-q", "-O", "^metadata_csum_seed,^orphan_file", part)
    uuid = run("blkid", "-o", "value", "-s", "UUID", part, capture=True).strip()
    root.mkdir()
    run("mount", part, root)
    run("tar", "-x", "--numeric-owner", "-f", options.base, "-C", root)
    for directory in ("boot/grub", "dev", "etc/default", "proc", "run", "sys"):
        (root / directory).mkdir(parents=True, exist_ok=True)
    shutil.copy("/etc/resolv.conf", root / "etc" / "resolv.conf")
    (root / "etc" / "fstab").write_text(f"UUID={uuid} / ext4 rw,noatime 0 0\n")
    (root / "etc" / "default" / "grub").write_text(GRUB)
    if options.authorized_keys:
        ssh = root / "root" / ".ssh"
        ssh.mkdir(mode=0o700, parents=True, exist_ok=True)
        shutil.copyfile(options.authorized_keys, ssh / "authorized_keys")
        (ssh / "authorized_keys").chmod(0o600)
    for where in ("dev", "run"):
        run("mount", "-t", "tmpfs", "-o", "mode=755", where, root / where)
    run("mount", "-t", "proc", "proc", root / "proc")
    run("mount", "-t", "sysfs", "sys", root / "sys")
    populate_dev(root / "dev", loop, uuid)
    with no_services(root):
        configure(root, scratch, options.playbook, options.variables)
    run("chroot", root, "update-grub")
    run("chroot", root, "grub-install", "--target=i386-pc", "--no-floppy", loop)
    for waste in ("var/cache/apt/archives/*.deb", "var/lib/apt/lists/*"):
        for path in root.glob(waste):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    config = (root / "boot" / "grub" / "grub.cfg").read_text()
    if not re.search(r"multiboot2?\s.*xen", config):
        raise BuildError("no Xen entry in grub.cfg")
    run("umount", "--recursive", root)
    os.close(keep)


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, required=True, help="tarball of a Debian root file system")
    parser.add_argument("--size-mb", type=int, required=True, help="size of the disk in MiB")
    parser.add_argument("--playbook", type=Path, required=True, help="makes of it what is wanted, on host image")
    parser.add_argument(
        "--variables", type=Path, action="append", default=[], help="file of variables for it (again: more)"
    )
    parser.add_argument("--authorized-keys", type=Path, help="who may log in to the image as root")
    parser.add_argument("--output", type=Path, required=True, help="the raw image; OUTPUT.work is used meanwhile")
    parser.add_argument("--log", type=Path, help="file for what is done; its end is told after a failure")
    parser.add_argument("--isolated", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Make an image; return the exit status."""
    options = parse(argv)
    missing = sorted({package for command, package in TOOLS.items() if not shutil.which(command)})
    if missing:
        print(f"build_image: commands are missing, of the Debian packages {' '.join(missing)}", file=sys.stderr)
        return 1
    if not options.isolated:
        alone = [
            *("setpriv", "--pdeathsig", "KILL"),
            *("unshare", "--mount", "--propagation", "slave", "--pid", "--mount-proc", "--fork", "--kill-child"),
        ]
        os.execvp(alone[0], [*alone, sys.executable, __file__, *argv, "--isolated"])
    errors = sys.stderr
    if options.log:
        errors = os.fdopen(os.dup(sys.stderr.fileno()), "w")
        with open(options.log, "wb") as log:
            for stream in (sys.stdout, sys.stderr):
                os.dup2(log.fileno(), stream.fileno())
    scratch = options.output.with_name(f"{options.output.name}.work")
    try:
        # What was mounted below it, the kernel has undone with the build that did not come to its end.
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(mode=0o700)
        build(options, scratch)
        # Not after a failure, with everything still mounted below.
        shutil.rmtree(scratch)
    except (BuildError, OSError) as exc:
        if options.log:
            print("...", *options.log.read_text(errors="replace").splitlines()[-40:], sep="\n", file=errors)
        print(f"build_image: {exc}", file=errors)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
