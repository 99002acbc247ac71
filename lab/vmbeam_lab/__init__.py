"""The vmbeam lab: real Xen hosts, nested in QEMU's emulation of AMD SVM.

QEMU emulates one or more machines (L0). Each boots the packaged host
hypervisor and a Debian host dom0 from a disk image that the collection's own
roles installed; host VMs (L1) and guests (L2) are created in it by the
collection's own playbooks. Nothing in here pretends to be Xen.
"""
