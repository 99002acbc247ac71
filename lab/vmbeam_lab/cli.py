"""The lab's commands; each is a make target of the same name (``lab-up`` ...)."""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import pathlib
import shutil
import signal
import sys
import typing

from . import ansible, build, cache, inventory, paths, phases, topology
from .errors import BootTimeout, LabError
from .machine import Emulated
from .phases import phase, say
from .shell import run

#: How long one cold boot of host hypervisor and host dom0 may take, in seconds. A quarter of
#: a minute to two minutes are usual; the bound is for a machine under other load.
BOOT_TIMEOUT = 420
#: How often a boot that hangs is tried again. Each retry is counted and printed.
BOOT_RETRIES = 2


def _playbook(playbook: pathlib.Path, *arguments: str) -> None:
    """Run a playbook on the running machines, its output to ours."""
    argv = ["ansible-playbook", "-i", str(paths.INVENTORY), str(playbook), *arguments]
    code = os.spawnvpe(os.P_WAIT, argv[0], argv, ansible.environment())
    if code:
        raise LabError(f"{playbook.name}: ansible-playbook ended with {code}; lab-logs collects what there is")


def side_by_side(machines: list[Emulated], act: typing.Callable[[Emulated], None]) -> None:
    """Do something that starts a machine to all of them at the same time.

    One that fails does not keep the others from finishing. An interruption ends the machines, so that nothing goes on
    waiting for them.

    :raises LabError: what went wrong with each that failed
    """
    with concurrent.futures.ThreadPoolExecutor(max_workers=max(len(machines), 1)) as pool:
        started = {machine: pool.submit(act, machine) for machine in machines}
        try:
            concurrent.futures.wait(started.values())
        except BaseException:
            # Again until the last is done: one may be about to start its QEMU.
            while concurrent.futures.wait(started.values(), timeout=1).not_done:
                for machine in machines:
                    machine.stop()
            for machine in machines:
                machine.stop()
            raise
    errors = [error for future in started.values() if (error := future.exception())]
    for error in errors:
        if not isinstance(error, LabError):
            raise error
    if errors:
        raise LabError("\n".join(str(error) for error in errors))


class Lab:
    """The machines chosen on the command line, and what they are made of."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.topology = topology.load(options.topology)
        self.machines = self.topology.select(options.machine)
        self.options = options
        self._artefacts: build.Artefacts | None = None

    @property
    def artefacts(self) -> build.Artefacts:
        if self._artefacts is None:
            self._artefacts = build.build(self.topology, self.machines)
        return self._artefacts

    def emulated(self) -> list[Emulated]:
        """Return the machines with the artefacts they were, or will be, started from."""
        return [Emulated(machine, self.artefacts.qemu, self.artefacts.key) for machine in self.machines]

    def running_only(self) -> list[Emulated]:
        """Return the machines without building anything: for commands that only look."""
        key = build.ssh_key()
        return [Emulated(machine, pathlib.Path("/nonexistent"), key) for machine in self.machines]

    # --- commands ------------------------------------------------------------------------

    def build(self) -> None:
        """Build images and tools, boot nothing."""
        print(json.dumps({name: {k: str(v) for k, v in d.items()} for name, d in self.artefacts.disks.items()}))

    def up(self) -> None:
        """Boot the machines, with a host VM in slot a and its guests; from a snapshot of all that if there is one."""
        machines = self.emulated()
        self._write_inventory()
        key = cache.digest(
            self.artefacts.digest(),
            paths.LAB / "playbooks",
            paths.REPOSITORY / "roles" / "host_vm",
            # How the host VM is set up, and what is recorded of it and its guests, outlive the boot.
            *(paths.REPOSITORY / "plugins" / "module_utils" / f"{name}.py" for name in ("_host_vm", "_guest_record")),
            repr(self.machines),
        )
        saved = None if self.options.cold or self.options.hosts_only else cache.lookup("booted", key)
        for emulated in machines:
            emulated.remove()
        if saved:
            with phase("restore the booted lab"):
                side_by_side(machines, lambda emulated: self._load(emulated, saved))
            return
        side_by_side(machines, self._boot)
        if self.options.hosts_only:
            return
        with phase("host VMs and guests"):
            _playbook(paths.LAB / "playbooks" / "up.yml")
        if self.options.cold:
            return
        with phase("save the booted lab"):
            cache.once("booted", key, lambda entry: self._store_all(machines, entry))

    def _write_inventory(self) -> None:
        inventory.write(self.topology, self.machines, self.artefacts.key, self.artefacts.guests)

    def _boot(self, emulated: Emulated) -> None:
        name = emulated.machine.name
        for attempt in range(BOOT_RETRIES + 1):
            emulated.create_disks(self.artefacts.disks[name])
            try:
                with phase(f"{name}: boot host hypervisor and host dom0"):
                    emulated.start()
                    emulated.wait_for_ssh(BOOT_TIMEOUT)
                return
            except BootTimeout as exc:
                emulated.stop()
                if attempt == BOOT_RETRIES:
                    raise
                say(f"{name}: BOOT RETRY {attempt + 1} of {BOOT_RETRIES}: {exc}")
                phases.record(f"{name}: boot retry {attempt + 1}", 0, "retry")

    def _store_all(self, machines: list[Emulated], entry: pathlib.Path) -> None:
        for emulated in machines:
            self._store(emulated, entry)

    def _store(self, emulated: Emulated, entry: pathlib.Path) -> None:
        """Save a running machine into `entry` and let it go on."""
        emulated.execute("stop")
        try:
            emulated.save("booted")
            for name in ("system", "data"):
                run(
                    [
                        "cp",
                        "--sparse=always",
                        "--reflink=auto",
                        emulated.directory / f"{name}.qcow2",
                        entry / f"{emulated.machine.name}-{name}.qcow2",
                    ],
                    timeout=600,
                )
        finally:
            emulated.execute("cont")

    def _load(self, emulated: Emulated, entry: pathlib.Path) -> None:
        emulated.take_images(self.artefacts.disks[emulated.machine.name])
        for name in ("system", "data"):
            run(
                [
                    "cp",
                    "--sparse=always",
                    "--reflink=auto",
                    entry / f"{emulated.machine.name}-{name}.qcow2",
                    emulated.directory / f"{name}.qcow2",
                ],
                timeout=600,
            )
        emulated.start(snapshot="booted")
        emulated.wait_for_ssh(BOOT_TIMEOUT)

    def demo(self) -> None:
        """Bring the lab up, show the plan, rejuvenate, and show what happened."""
        phases.reset()
        self.up()
        with phase("plan"):
            _playbook(paths.REPOSITORY / "playbooks" / "plan.yml")
        with phase("rejuvenate"):
            _playbook(paths.REPOSITORY / "playbooks" / "rejuvenate.yml", "-e", "vmbeam_force=true")
        self.status()

    def down(self) -> None:
        """End the machines and delete their disks; caches stay."""
        for emulated in self.running_only():
            say(f"{emulated.machine.name}: {'stopped' if emulated.pid() else 'was not running'}")
            emulated.remove()

    def status(self) -> None:
        """Show the machines, their host VMs and the recorded phases."""
        for emulated in self.running_only():
            name = emulated.machine.name
            if not emulated.pid():
                print(f"{name}: down")
                continue
            print(f"{name}: up, QEMU pid {emulated.pid()}, ssh -p {emulated.machine.ssh_port} root@127.0.0.1")
            print(emulated.ssh("xl", "list", timeout=60))
        print(phases.table())

    def console(self) -> None:
        """Attach to a machine's console (root, no password), or follow that of a host VM (--host-vm m1-a)."""
        if self.options.host_vm:
            self.machines = [inventory.machine_of(self.topology, self.options.host_vm)]
        elif len(self.machines) > 1:
            raise LabError("a console is one machine's: choose it with --machine")
        emulated = self.running_only()[0]
        if self.options.host_vm:
            argv = emulated.ssh_command("tail", "-n", "40", "-F", f"/var/log/xen/vmbeam/{self.options.host_vm}.console")
        else:
            say("leave with ctrl-]")
            argv = ["socat", "-,raw,echo=0,escape=0x1d", f"UNIX-CONNECT:{emulated.console_socket}"]
        os.execvp(argv[0], argv)

    def save(self) -> None:
        """Save the running machines under --tag, to return to with restore."""
        for emulated in self.running_only():
            with phase(f"{emulated.machine.name}: save {self.options.tag}"):
                emulated.save(self.options.tag)

    def restore(self) -> None:
        """Return the machines to the state saved under --tag, in a fresh QEMU."""
        self._write_inventory()
        side_by_side(self.emulated(), self._return_to_tag)

    def _return_to_tag(self, emulated: Emulated) -> None:
        with phase(f"{emulated.machine.name}: restore {self.options.tag}"):
            emulated.stop()
            emulated.start(snapshot=self.options.tag)
            emulated.wait_for_ssh(BOOT_TIMEOUT)

    def logs(self) -> None:
        """Collect consoles, xl and hypervisor logs below .lab/logs."""
        for emulated in self.running_only():
            target = paths.LOGS / emulated.machine.name
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir(parents=True)
            for log in emulated.directory.glob("*.log"):
                shutil.copy(log, target)
            if emulated.pid():
                for file, words in {
                    "xl-dmesg": ["xl", "dmesg"],
                    "xl-list": ["xl", "list", "-v"],
                    "journal": ["journalctl", "-b", "--no-pager"],
                    "var-log-xen": ["tail", "-n", "200", "-v", "/var/log/xen/*.log", "/var/log/xen/vmbeam/*"],
                }.items():
                    try:
                        (target / f"{file}.txt").write_text(emulated.ssh(*words, timeout=120))
                    except LabError as exc:
                        (target / f"{file}.txt").write_text(f"not collected: {exc}\n")
            say(f"logs in {target}")


def main(argv: list[str] | None = None) -> int:
    """Run one command; return the exit status."""
    parser = argparse.ArgumentParser(prog="lab", description=__doc__)
    parser.add_argument("--topology", type=pathlib.Path, default=paths.LAB / "topology.yml")
    parser.add_argument("--machine", action="append", help="a machine of the topology (default: its default_machines)")
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("build", "up", "demo", "down", "status", "console", "save", "restore", "logs"):
        command = commands.add_parser(name, help=getattr(Lab, name).__doc__)
        if name in ("up", "demo"):
            command.add_argument("--cold", action="store_true", help="do not use a saved boot, and save none")
            command.add_argument("--hosts-only", action="store_true", help="boot host dom0s, no host VM")
        if name == "console":
            command.add_argument("--host-vm", help="name of a host VM, e.g. m1-a")
        if name in ("save", "restore"):
            command.add_argument("--tag", default="saved", help="name of the saved state")
    options = parser.parse_args(argv)
    # An exception, so that what is mounted for an image is unmounted.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        getattr(Lab(options), options.command)()
    except LabError as exc:
        print(f"lab: {exc}", file=sys.stderr)
        return 1
    return 0
