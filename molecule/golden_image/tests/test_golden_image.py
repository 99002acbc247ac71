"""The image that was made can boot Xen and is no copy of another; what was brought to the machine is whole."""

import json
import os
from pathlib import Path

import pytest
import testinfra

testinfra_hosts = ["local://"]
IMAGES = Path(os.environ["MOLECULE_EPHEMERAL_DIRECTORY"]) / "images"
IMAGE = IMAGES / "guest-hypervisor.raw"


@pytest.fixture
def tree(host):
    """The root file system of the image, mounted."""
    table = json.loads(host.check_output("sfdisk --json %s", str(IMAGE)))["partitiontable"]
    (partition,) = table["partitions"]
    mount = IMAGES / "root"
    mount.mkdir(exist_ok=True)
    offset = partition["start"] * table.get("sectorsize", 512)
    host.check_output("mount -o ro,noload,loop,offset=%s %s %s", str(offset), str(IMAGE), str(mount))
    yield mount
    host.check_output("umount %s", str(mount))


def test_checksum_is_that_of_the_image(host):
    assert host.run(f"cd {IMAGES} && sha256sum --check {IMAGE.name}.sha256").succeeded


def test_nothing_of_the_build_is_left(host):
    assert sorted(path.name for path in IMAGES.glob(f"{IMAGE.name}*") if path.suffix != ".log") == [
        IMAGE.name,
        f"{IMAGE.name}.sha256",
    ]
    assert str(IMAGE) not in host.check_output("losetup --list --output BACK-FILE")


def test_xen_is_the_default_boot_entry(tree):
    assert 'set default="Debian GNU/Linux, with Xen hypervisor"' in (tree / "boot" / "grub" / "grub.cfg").read_text()
    assert list((tree / "boot").glob("xen-4.17*"))


def test_copies_share_no_identity(tree):
    assert not list((tree / "etc" / "ssh").glob("ssh_host_*_key"))
    assert (tree / "usr" / "lib" / "vmbeam" / "vmbeam-seed").exists()


def test_stand_in_was_brought_to_the_machine(request):
    inventory = request.config.getoption("--ansible-inventory")
    machine = testinfra.get_host("ansible://m1", ansible_inventory=inventory)
    brought = machine.file("/var/lib/vmbeam/molecule/stand-in.raw")
    assert brought.content_string == "a stand-in"
    assert machine.file(f"{brought.path}.sha256").content_string.split()[0] == brought.sha256sum
