"""One emulated machine: its QEMU process, disks, console, snapshots and SSH."""

from __future__ import annotations

import asyncio
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import typing

from qemu.qmp import ConnectError, QMPClient
from qemu.qmp.qmp_client import GreetingError

from . import paths, wait
from .errors import BootTimeout, LabError
from .shell import run, tail
from .topology import Machine

#: What TCG emulates well enough for Xen in Xen. Each flag that is taken away has a reason:
#: smap/smep/umip: TCG's IRET at CPL 3 accesses memory as the kernel, which kills a PV dom0;
#: monitor: MWAIT raises #GP; rdtscp: its intercept is reported as RDTSC;
#: xsave* and what needs it: XCR0 is not switched across nested exits;
#: osvw: MSRs that TCG lacks.
#: What is added, our QEMU emulates: with PCIDs a system call of a PV dom0 keeps its translations; with the
#: virtual GIF, VMLOAD and VMSAVE a nested exit costs two exits instead of four; the PAUSE filter ends the spinning of a
#: guest's CPU that waits for another one.
CPU = (
    "EPYC,+pcid,+invpcid,+vgif,+v-vmsave-vmload,+pause-filter,"
    "-smap,-smep,-umip,-monitor,-rdtscp,-xsave,-xsaveopt,-xsavec,-xsaves,-xgetbv1,"
    "-avx,-avx2,-f16c,-fma,-misalignsse,-osvw"
)

_SOCKET_LIMIT = 107  #: bytes in a Unix socket's path (unix(7))
_CONNECTIONS = 5  #: attempts to get the monitor's greeting

_T = typing.TypeVar("_T")


_SSH = (
    *("-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"),
    *("-o", "LogLevel=ERROR", "-o", "ConnectTimeout=30", "-o", "BatchMode=yes"),
)


def host_dom0_ssh(machine: Machine, key: pathlib.Path, *options: str) -> list[str]:
    """Return the argv of an SSH client for the machine's host dom0.

    All clients share one connection: a handshake costs seconds of an emulated CPU.
    """
    return [
        *("ssh", "-i", str(key), "-p", str(machine.ssh_port), *_SSH),
        *("-o", "ControlMaster=auto", "-o", "ControlPersist=900"),
        *("-o", f"ControlPath={paths.STATE / machine.name / 'ssh'}"),
        *options,
        "root@127.0.0.1",
    ]


def guest_dom0_ssh(machine: Machine, slot: str, key: pathlib.Path) -> list[str]:
    """Return the argv of an SSH client for the guest dom0 in a slot, through the host dom0."""
    jump = shlex.join(host_dom0_ssh(machine, key, "-W", "%h:%p"))
    return ["ssh", "-i", str(key), *_SSH, "-o", f"ProxyCommand={jump}", f"root@{machine.slots[slot].address}"]


class Emulated:
    """A machine of the topology in this checkout's state directory."""

    def __init__(self, machine: Machine, qemu: pathlib.Path, key: pathlib.Path) -> None:
        """:param qemu: directory of the QEMU programs; :param key: private SSH key"""
        self.machine = machine
        self.qemu = qemu
        self.key = key
        self.directory = paths.STATE / machine.name
        self.console = self.directory / "console.log"
        self.console_socket = self.directory / "console.sock"
        self.qmp = self.directory / "qmp.sock"
        self.pid_file = self.directory / "qemu.pid"

    # --- process -------------------------------------------------------------------------

    def pid(self) -> int | None:
        """Return the id of this machine's running QEMU, or None."""
        try:
            pid = int(self.pid_file.read_text())
            command = pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()
        except (OSError, ValueError):
            return None
        return pid if str(self.qmp).encode() in command else None

    def take_images(self, images: dict[str, pathlib.Path]) -> None:
        """Make `images` ({"system": raw, "data": raw}) what the overlays of the same names lie over.

        By links, so that they last as long as the machine, whatever the cache removes meanwhile.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        for name, image in images.items():
            link = self.directory / f"{name}.raw"
            link.unlink(missing_ok=True)
            try:
                link.hardlink_to(image)
            except OSError:  # another file system
                link.symlink_to(image)

    def create_disks(self, images: dict[str, pathlib.Path]) -> None:
        """Lay fresh overlays over `images` ({"system": raw, "data": raw})."""
        self.take_images(images)
        for name in images:
            overlay = self.directory / f"{name}.qcow2"
            overlay.unlink(missing_ok=True)
            run(
                [self.qemu / "qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", f"{name}.raw", overlay],
                timeout=60,
            )

    def start(self, snapshot: str | None = None, extra: typing.Sequence[str] = ()) -> None:
        """Start QEMU; from the saved state `snapshot` if given.

        :raises LabError: it is running already, or dies at once
        """
        if self.pid():
            raise LabError(f"{self.machine.name} is running already (lab-down ends it)")
        if len(str(self.console_socket).encode()) > _SOCKET_LIMIT:
            raise LabError(f"{self.console_socket}: too long for a socket; set VMBEAM_LAB_STATE to a shorter directory")
        forwards = [f"hostfwd=tcp:127.0.0.1:{self.machine.ssh_port}-{self.machine.address}:22"] + [
            f"hostfwd=tcp:127.0.0.1:{guest.http_port}-{guest.address}:80" for guest in self.machine.guests.values()
        ]
        argv = [
            str(self.qemu / "qemu-system-x86_64"),
            *("-name", f"vmbeam-{self.machine.name}"),
            *("-L", "/usr/share/seabios", "-L", "/usr/share/qemu"),
            *("-machine", "q35", "-accel", "tcg,thread=multi,tb-size=2047", "-cpu", CPU),
            *("-smp", str(self.machine.cpus), "-m", f"{self.machine.memory_mb}M"),
            *("-nodefaults", "-display", "none", "-no-reboot"),
            *("-chardev", f"socket,id=console,path={self.console_socket},server=on,wait=off,logfile={self.console}"),
            *("-serial", "chardev:console"),
            *("-qmp", f"unix:{self.qmp},server=on,wait=off"),
            *("-netdev", ",".join(["user", "id=net0", *forwards])),
            *("-device", f"virtio-net-pci,netdev=net0,mac={self.machine.mac},romfile="),
        ]
        for name in ("system", "data"):
            argv += [
                *(
                    "-blockdev",
                    f"driver=file,node-name={name}-file,filename={self.directory / name}.qcow2,cache.direct=off",
                ),
                *("-blockdev", f"driver=qcow2,node-name={name},file={name}-file,cache.no-flush=on,discard=unmap"),
                *("-device", f"virtio-blk-pci,drive={name},serial={name}"),
            ]
        if snapshot:
            argv += ["-loadvm", snapshot]
        self.qmp.unlink(missing_ok=True)
        self.console.touch()
        with open(self.directory / "qemu.log", "ab") as log:
            process = subprocess.Popen(
                [*argv, *extra], stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        self.pid_file.write_text(str(process.pid))
        wait.until(
            lambda: self.qmp.exists() or process.poll() is not None,
            timeout=30,
            failure=lambda: LabError("QEMU opened no monitor in 30 s"),
            interval=0.05,
        )
        if process.poll() is not None:
            raise LabError(f"QEMU ended at once:\n{tail(self.directory / 'qemu.log')}")

    def stop(self) -> bool:
        """End this machine's QEMU; return whether it ran."""
        pid = self.pid()
        if not pid:
            return False
        os.kill(pid, signal.SIGTERM)
        try:
            wait.until(
                lambda: self.pid() is None,
                timeout=20,
                failure=lambda: LabError("QEMU ignores SIGTERM"),
                interval=0.1,
            )
        except LabError:
            os.kill(pid, signal.SIGKILL)
        self.pid_file.unlink(missing_ok=True)
        return True

    def remove(self) -> None:
        """Stop the machine and delete its disks and logs."""
        self.stop()
        shutil.rmtree(self.directory, ignore_errors=True)

    # --- monitor -------------------------------------------------------------------------

    def _converse(self, what: str, talk: typing.Callable[[QMPClient], typing.Awaitable[_T]], timeout: float) -> _T:
        """Return what `talk` returns of one connection to the monitor, which may take `timeout` seconds."""

        async def session() -> _T:
            client = await self._monitor()
            try:
                return await talk(client)
            finally:
                await client.disconnect()

        try:
            return asyncio.run(asyncio.wait_for(session(), timeout))
        except Exception as exc:
            raise LabError(f"{self.machine.name}: monitor: {what}: {exc!r}") from exc

    async def _monitor(self) -> QMPClient:
        """Connect to the monitor.

        QEMU sends an event that happens while it accepts a connection ahead of the greeting (monitor/qmp.c: the
        state of the former connection counts until CHR_EVENT_OPENED was handled). The next connection does better.
        """
        left = _CONNECTIONS
        while True:
            client = QMPClient(f"lab-{self.machine.name}")
            left -= 1
            try:
                await client.connect(str(self.qmp))
                return client
            except ConnectError as exc:
                if not (left and isinstance(exc.exc, GreetingError)):
                    raise

    def execute(self, command: str, arguments: dict[str, typing.Any] | None = None, timeout: float = 120) -> typing.Any:
        """Run one QMP command and return its result."""
        return self._converse(command, lambda client: client.execute(command, arguments), timeout)

    def _job(self, command: str, arguments: dict[str, typing.Any], timeout: float) -> None:
        """Run a QMP command that is a job, and wait for its end."""
        job = f"{command}-job"

        async def conclude(client: QMPClient) -> dict[str, typing.Any]:
            with client.listener("JOB_STATUS_CHANGE") as changes:
                await client.execute(command, {"job-id": job, **arguments})
                async for change in changes:
                    if change["data"] == {"id": job, "status": "concluded"}:
                        break
            jobs = typing.cast(list[dict[str, typing.Any]], await client.execute("query-jobs"))
            [entry] = [entry for entry in jobs if entry["id"] == job]
            await client.execute("job-dismiss", {"id": job})
            return entry

        entry = self._converse(command, conclude, timeout)
        if entry.get("error"):
            raise LabError(f"{self.machine.name}: {command}: {entry['error']}")

    def save(self, tag: str) -> None:
        """Save the running machine, memory and disks, inside its disks as `tag`."""
        self._job("snapshot-delete", {"tag": tag, "devices": ["system", "data"]}, timeout=120)
        self._job("snapshot-save", {"tag": tag, "vmstate": "system", "devices": ["system", "data"]}, timeout=600)

    # --- access --------------------------------------------------------------------------

    def ssh_command(self, *words: str) -> list[str]:
        """Return the argv that runs `words` in host dom0."""
        return [*host_dom0_ssh(self.machine, self.key), *words]

    def ssh(self, *words: str, timeout: float = 60) -> str:
        """Run a command in host dom0 and return its output."""
        return run(self.ssh_command(*words), timeout=timeout)

    def wait_for_ssh(self, timeout: float) -> None:
        """Wait until host dom0 answers and its Xen toolstack does.

        :raises BootTimeout: with the last console lines
        """
        last = "no attempt finished"

        def answers() -> bool:
            nonlocal last
            if not self.pid():
                raise LabError(f"{self.machine.name}: QEMU died:\n{tail(self.directory / 'qemu.log')}")
            try:
                self.ssh("xl", "list", timeout=30)
                return True
            except LabError as exc:
                last = str(exc)
                return False

        wait.until(
            answers,
            timeout=timeout,
            failure=lambda: BootTimeout(
                f"{self.machine.name}: host dom0 not ready after {timeout:.0f} s; last: {last}\n"
                f"--- console\n{tail(self.console)}"
            ),
            interval=1,
        )
