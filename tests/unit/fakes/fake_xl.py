# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A stand-in for xl: the commands and the migration protocol that the collection relies on.

It follows tools/xl of Xen 4.17 in what it prints, in which order it changes things, and in what it leaves
behind when something breaks. State is in files: see FakeXen in conftest.py.
"""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time

FOLDER = os.environ["FAKE_XEN"]
SIDE = os.environ["FAKE_SIDE"]
IMAGE = b"memory" * 50_000


def say(text):
    print(text, file=sys.stderr, flush=True)


def fault(name):
    return os.path.exists(f"{FOLDER}/faults/{name}")


class State:
    """The domains of this side, locked while in use."""

    def __enter__(self):
        self.lock = open(f"{FOLDER}/{SIDE}.lock", "w")
        fcntl.flock(self.lock, fcntl.LOCK_EX)
        with open(f"{FOLDER}/{SIDE}.json") as file:
            self.domains = json.load(file)
        return self

    def __exit__(self, *_error):
        with open(f"{FOLDER}/{SIDE}.json", "w") as file:
            json.dump(self.domains, file)
        self.lock.close()

    def find(self, key):
        for domain in self.domains:
            if key in (str(domain["domid"]), domain["name"]):
                return domain
        say(f"{key} is an invalid domain identifier (rc=-6)")
        sys.exit(1)


def change(domid, **values):
    with State() as state:
        state.find(str(domid)).update(values)


def add(name, uuid, flags="--p---"):
    with State() as state:
        domid = max([20, *(domain["domid"] for domain in state.domains)]) + 1
        state.domains.append({"name": name, "domid": domid, "uuid": uuid, "flags": flags, "time": 0.0})
    return domid


def destroy(domid):
    with State() as state:
        state.domains.remove(state.find(str(domid)))


def main_list(arguments):
    with State() as state:
        domains = list(state.domains)
    if "-l" in arguments:
        print(json.dumps([{"domid": d["domid"], "config": d.get("config", {})} for d in domains]))
        return
    print(
        "Name                                        ID   Mem VCPUs\tState\tTime(s)   UUID"
        "                            Reason-Code\tSecurity Label"
    )
    for d in domains:
        print(
            "%-40s %5d %5d %5d     %s  %8.1f %s %8s %16s"
            % (d["name"], d["domid"], d.get("memory", 256), 1, d["flags"], d["time"], d["uuid"], "-", "-")
        )


def main_destroy(arguments):
    if fault(f"destroy-{SIDE}-fails"):
        say("libxl: error: libxl_domain.c:1183:domain_destroy_callback: Domain 8:Unable to destroy guest")
        sys.exit(1)
    destroy(arguments[0])
    if fault("daemon-destroys-first"):
        say("libxl: error: libxl_domain.c:1008:libxl_domain_destroy: Domain 8:Non-existent domain")
        sys.exit(1)


def main_pause(arguments):
    change(arguments[0], flags="--p---")


def main_unpause(arguments):
    if fault(f"unpause-{SIDE}-fails"):
        say("libxl: error: libxl_domain.c: Failed to unpause domain")
        sys.exit(1)
    change(arguments[0], flags="-b----")


def main_rename(arguments):
    change(arguments[0], name=arguments[1])


def read_exactly(stream, size):
    data = b""
    while len(data) < size:
        part = stream.read(size - len(data))
        if not part:
            raise EOFError
        data += part
    return data


def suspend(domain):
    change(domain["domid"], flags="---ss-")
    say(
        f"libxl: debug: libxl_dom_suspend.c:353:suspend_common_wait_guest_check: Domain {domain['domid']}:"
        "guest has suspended"
    )


def resume(domain):
    change(domain["domid"], flags="-b----")


def main_save(arguments):
    option, key, path = arguments
    with State() as state:
        domain = dict(state.find(key))
    if option == "-c":  # of a guest that does not answer: the request times out, and xl resumes it
        if not fault("resume-fails"):
            resume(domain)
        sys.exit(1)
    if fault("save-hangs"):
        time.sleep(60)
    header = json.dumps(domain).encode()
    try:
        with open(path, "wb") as stream:
            stream.write(len(header).to_bytes(4, "big") + header)
            stream.write(len(IMAGE).to_bytes(4, "big"))
            suspend(domain)
            if fault("save-fails"):
                raise OSError("no")
            stream.write(IMAGE)
    except OSError:
        say("Failed to save domain, resuming domain")
        resume(domain)
        sys.exit(1)
    change(key, flags="-b----" if fault("save-does-not-pause") else "--p---")


def receive(stream):
    """Makes the domain, then reads its memory; destroys it if the stream breaks."""
    header = json.loads(read_exactly(stream, int.from_bytes(read_exactly(stream, 4), "big")))
    name = header["name"]
    domid = add(name, header["uuid"])
    try:
        size = int.from_bytes(read_exactly(stream, 4), "big")
        if fault("receiver-hangs"):
            time.sleep(60)
        if fault("receiver-dies-early"):
            raise EOFError
        if fault("receiver-killed-early"):
            os.kill(os.getpid(), signal.SIGKILL)
        read_exactly(stream, size)
    except EOFError:
        say("xc: error: Failed to read 8 bytes from fd")
        destroy(domid)
        sys.exit(1)
    return domid, name


def main_restore(arguments):
    with open(arguments[1], "rb") as stream:
        domid, _name = receive(stream)
    if fault("restore-fails-late"):
        destroy(domid)
        sys.exit(1)
    if fault("restore-hangs-late"):
        time.sleep(60)
    if fault("cut-after-receive"):
        open(f"{FOLDER}/faults/unreachable", "w").close()
        sys.exit(1)


def session(event=None):
    """What became of the one zero-copy session; with an event, notes it."""
    path = f"{FOLDER}/session"
    if event:
        with open(path, "w") as file:
            file.write(event)
    try:
        with open(path) as file:
            return file.read()
    except FileNotFoundError:
        return None


def main_migrate_recover(arguments):
    """Ends a zero-copy migration on this side, as its session says (our patched xl)."""
    with State() as state:
        domain = dict(state.find(arguments[0]))
    state, domid = session(), domain["domid"]
    if state in (None, "closed" if SIDE == "destination" else None):
        say(f"Domain {domid} isn't part of a zero-copy session.")
        sys.exit(1)
    name = domain["name"].removesuffix("--incoming").removesuffix("--migratedaway")
    if SIDE == "destination":
        if state == "committed":
            change(domid, name=name, flags="-b----")
            session("closed")
        else:
            destroy(domid)
            session("aborted")
    elif state == "closed":
        destroy(domid)
    elif state == "committed":
        say(f"The target hasn't started domain {domid} yet, but may do so any time.")
        sys.exit(1)
    else:
        change(domid, name=name)
        resume(domain)


def main_migrate(arguments):
    zero_copy = arguments[0].startswith("--zero-copy")
    arguments = arguments[zero_copy:]
    assert arguments[:2] == ["-s", ""], arguments
    assert zero_copy == arguments[3].count(" --zero-copy"), arguments
    with State() as state:
        domain = dict(state.find(arguments[2]))
    if zero_copy:
        session("open")
    transport = subprocess.Popen(["sh", "-c", arguments[3]], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    out, back = transport.stdin, transport.stdout
    name = domain["name"]

    def failed_resume(why):
        say(why)
        out.close()
        say("Migration failed, resuming at sender.")
        resume(domain)
        sys.exit(1)

    try:
        if read_exactly(back, 6) != b"banner":
            raise EOFError
    except EOFError:
        say("libxl: error: libxl_utils.c: file/stream truncated reading banner from migration receiver stream")
        say(f"libxl: info: migration transport process [{transport.pid}] exited with error status {transport.wait()}")
        sys.exit(1)
    header = json.dumps({**domain, "name": name + "--incoming"}).encode()
    try:
        out.write(len(header).to_bytes(4, "big") + header + len(IMAGE).to_bytes(4, "big"))
        out.flush()
        for _part in range(3 if fault("receiver-hangs") else 1):  # more than fits into pipes
            out.write(IMAGE)
            out.flush()
        suspend(domain)
        if zero_copy:
            say("xc: info: Zero-copy session 7: 32760 frames shared, 5 copied")
        if fault("sender-killed"):
            os.kill(os.getpid(), signal.SIGKILL)
        if read_exactly(back, 5) != b"ready":
            raise EOFError
    except (OSError, EOFError):
        failed_resume("libxl: error: file/stream truncated reading ready message from migration receiver stream")
    say("migration sender: Target has acknowledged transfer.")
    change(domain["domid"], name=name + "--migratedaway")
    if zero_copy:
        if fault("sender-killed-before-commit"):
            os.kill(os.getpid(), signal.SIGKILL)
        session("committed")
    say("migration sender: Giving target permission to start.")
    try:
        out.write(b"go")
        out.flush()
        if zero_copy:
            say(
                "migration sender: Zero-copy session 7: 32760 pages passed on, 8 copied, 91 calls, 24 4KiB and "
                "126 2MiB entries written."
            )
        report = read_exactly(back, 1)
    except (OSError, EOFError):
        say("** Migration failed during final handshake **")
        say("Domain state is now undefined !")
        sys.exit(1)
    if report != b"0":
        say("migration sender: Target reports startup failure (status code 3).")
        change(domain["domid"], name=name)
        resume(domain)
        say("Migration failed due to problems at target.")
        sys.exit(1)
    say("migration sender: Target reports successful startup.")
    destroy(domain["domid"])
    say("Migration successful.")


def main_migrate_receive(_arguments):
    say("migration target: Ready to receive domain.")
    os.write(1, b"banner")
    stream = os.fdopen(0, "rb", 0)
    domid, incoming = receive(stream)
    say("migration target: Transfer complete, requesting permission to start domain.")
    os.write(1, b"ready")
    if fault("receiver-killed-before-go"):
        sys.exit(1)
    read_exactly(stream, 2)
    if fault("receiver-refuses"):
        destroy(domid)
        os.write(1, b"3")
        sys.exit(0)
    say("migration target: Got permission, starting domain.")
    change(domid, name=incoming.removesuffix("--incoming"))
    if fault("receiver-killed-before-unpause"):
        sys.exit(1)
    if not fault("receiver-does-not-unpause"):
        change(domid, flags="-b----")
        if session():
            session("closed")
    say("migration target: Domain started successsfully.")
    if fault("receiver-killed-after-start"):
        sys.exit(1)
    os.write(1, b"0")


def main_info(_arguments):
    print("host                   : m1")
    print("release                : 6.1.0-28-amd64")
    print("nr_cpus                : 3")
    print("virt_caps              : pv hvm hap shadow")
    print("total_memory           : 16383")
    print(f"free_memory            : {100 if fault('no-memory') else 9000}")
    print("xen_major              : 4")
    print("xen_minor              : 17")
    print("xen_extra              : .5")
    print("xen_version            : 4.17.5")
    print("xen_commandline        : placeholder dom0_mem=1G com1=115200,8n1")


def main_create(arguments):
    with open(arguments[-1]) as file:
        config = dict(line.strip().split(" = ", 1) for line in file if " = " in line)
    if fault("create-refuses") or fault(f"create-refuses-{SIDE}"):
        say("libxl: error: libxl_create.c:1303:initiate_domain_create: Unable to create domain")
        sys.exit(3)
    domid = add(config["name"].strip('"'), "22222222-2222-2222-2222-222222222222")
    change(domid, memory=int(config.get("memory", 256)))
    if fault("create-fails-halfway") or fault(f"create-fails-halfway-{SIDE}"):
        say("libxl: error: libxl_dm.c:3131:device_model_spawn_outcome: Domain 9:domain 9 device model: spawn failed")
        sys.exit(3)
    if fault("create-hangs") or fault(f"create-hangs-{SIDE}"):
        time.sleep(60)
    if fault("create-crashes"):
        change(domid, flags="---sc-", time=0.3)
    elif arguments[0] != "-p":
        change(domid, flags="r-----", time=0.3)


def power_off(key):
    if fault("daemon-destroys-first"):  # or soon
        change(key, flags="---s--")
    elif not fault("shutdown-ignored"):
        destroy(key)


def main_shutdown(arguments):
    assert arguments[0] == "-F"
    power_off(arguments[1])


def main_trigger(arguments):
    assert arguments[1] == "power"
    power_off(arguments[0])


def main_qemu_monitor_command(arguments):
    """QEMU's monitor (block/monitor/block-hmp-cmds.c), with the line ends that QMP gives."""
    key, command = arguments
    if fault("monitor-dead"):
        say("libxl: error: libxl_qmp.c:1399:qmp_ev_fd_callback: Domain 8:Failed to connect to QMP: Connection refused")
        sys.exit(1)
    verb, _space, rest = command.partition(" ")
    options = dict(part.split("=", 1) for part in rest.replace("0 if", "if").split(",") if "=" in part)
    name = options.get("id", rest)
    with State() as state:
        drives = state.find(key).setdefault("drives", {})
        if command == "info block":
            said = "ide0-hd0 (#block123): /var/lib/vmbeam/host-vms/m1-a/root.qcow2 (qcow2)\r\n"
            said += "    Attached to:      /machine/unattached/device[23]\r\n    Cache mode:       writeback\r\n"
            for number, (drive, values) in enumerate(drives.items()):
                said += f"\r\n{drive} (#block{number}): {values['path']} (raw)\r\n"
                if values["attached"]:
                    said += f"    Attached to:      {drive}\r\n"
                else:
                    said += "    Removable device: not locked, tray closed\r\n"
                said += "    Cache mode:       writeback, direct\r\n"
            # The device goes some time after device_del, and usually takes the drive with it.
            for drive in [drive for drive, values in drives.items() if values.pop("going", False)]:
                if fault("drive-stays"):
                    drives[drive]["attached"] = False
                else:
                    del drives[drive]
        elif verb == "drive_add":
            said = "OK\r\n"
            if fault("drive-add-refused"):
                said = f"Could not open '{options['file']}': Permission denied\r\n"
            elif name in drives:
                said = f"Duplicate ID '{name}' for drive\r\n"
            else:
                drives[name] = {"path": options["file"], "attached": False, "options": rest}
        elif verb == "device_add":
            said = "warning: something that does not matter\r\n"
            if fault("device-add-refused"):
                said = "Error: Bus 'vmbeam.0' not found\r\n"
            else:
                drives[options["drive"]].update(attached=True, device=rest)
        elif verb == "device_del":
            said = ""
            if name not in drives:
                said = f"Error: Device '{name}' not found\r\n"
            elif not fault("device-del-ignored"):
                drives[name]["going"] = True
        elif verb == "drive_del":
            assert not drives.get(name, {}).get("attached"), "QEMU would keep a zombie"
            said = "" if drives.pop(name, None) else f"Error: Device '{name}' not found\r\n"
        else:
            said = f"unknown command: '{verb}'\r\n"
    print(said)


def main():
    arguments = [argument for argument in sys.argv[1:] if argument != "-vvv"]
    with open(f"{FOLDER}/calls", "a") as log:
        log.write(f"{SIDE} {' '.join(arguments[:3])}\n")
    if fault(f"xenstored-down-{SIDE}"):
        say("libxl: error: libxl.c:108:libxl_ctx_alloc: cannot connect to xenstore: No such file or directory")
        say("cannot init xl context")
        sys.exit(1)
    globals()["main_" + arguments[0].replace("-", "_")](arguments[1:])


main()
