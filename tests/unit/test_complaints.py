"""What counts as a complaint of a hypervisor, and that each is reported once."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "lab"))

from vmbeam_lab.complaints import Complaints, complaints
from vmbeam_lab.errors import LabError

ASSERTION = "(XEN) Assertion 'page_get_owner(page) == d' failed at arch/x86/mm/zerocopy.c:77"
WARN = "(XEN) Xen WARN at arch/x86/mm/p2m.c:12"


@pytest.mark.parametrize(
    "line",
    [
        ASSERTION,
        WARN,
        "(XEN) Xen BUG at common/page_alloc.c:1234",
        "(XEN) Panic on CPU 1:",
        "(XEN) FATAL PAGE FAULT",
        "(XEN) domain_crash called from arch/x86/hvm/svm/nestedsvm.c:500",
        "(XEN) Domain 2 (vcpu#0) crashed on cpu#1:",
        "(XEN) d1v0 Error -22 getting frames",
        "(XEN) Selftest 1 failed: Opc 0f 0b expected #UD[0000], got #GP[0000]",
    ],
)
def test_complaint(line):
    assert complaints(f"(XEN) Xen version 4.17\r\n{line}\r\n") == [line]


@pytest.mark.parametrize(
    "line",
    [
        "(XEN) Brought up 3 CPUs",
        "(XEN) Selftest 2 failed: Opc f3 0f 1e fa 02 04 04 expected #SS[0000], got #GP[0000]",
        "(XEN) Std. Loglevel: Errors and warnings",
        "(XEN) Command line: placeholder loglvl=warning guest_loglvl=error",
        "[    1.2] systemd[1]: an Error of a program in dom0",
    ],
)
def test_no_complaint(line):
    assert complaints(line) == []


class Machine:
    """A machine with a console file and what its host dom0 answers."""

    def __init__(self, path):
        self.console = path / "console.log"
        self.answer = ""

    def ssh(self, *words):
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.fixture
def machine(tmp_path):
    machine = Machine(tmp_path)
    machine.console.write_text("(XEN) up\n")
    return machine


def test_each_complaint_is_reported_once(machine):
    watched = Complaints(machine)
    assert watched.new() == []
    machine.console.write_text(f"(XEN) up\n{WARN}\n")
    machine.answer = f"=== m1-a.console\n(XEN) up\n{ASSERTION}\n=== m1-b.console\n(XEN) up\n"
    assert watched.new() == [f"host hypervisor: {WARN}", f"m1-a.console: {ASSERTION}"]
    assert watched.new() == []
    machine.console.write_text(f"(XEN) up\n{WARN}\n{WARN}\n")
    assert watched.new() == [f"host hypervisor: {WARN}"]


def test_a_console_that_began_anew(machine):
    watched = Complaints(machine)
    machine.console.write_text(f"(XEN) up\n{WARN}\n")
    assert watched.new()
    machine.console.write_text("(XEN) up\n")
    assert watched.new() == []
    machine.console.write_text(f"(XEN) up\n{WARN}\n")
    assert watched.new() == [f"host hypervisor: {WARN}"]


def test_the_last_words_of_a_host_hypervisor(machine):
    machine.console.write_text(f"{ASSERTION}\n")
    machine.answer = LabError("no answer")
    with pytest.raises(LabError, match="Assertion 'page_get_owner"):
        Complaints(machine).new()
