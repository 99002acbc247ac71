"""The machine has one host VM, the fresh one; its guests run there, serve, and are recorded as moved."""

import json
import urllib.request

import testinfra

testinfra_hosts = ["ansible://m1"]


def test_only_the_fresh_host_vm_is_left(host):
    domains = host.check_output("xl list").split()
    assert "m1-b" in domains
    assert "m1-a" not in domains


def test_guests_run_in_the_fresh_host_vm(request):
    inventory = request.config.getoption("--ansible-inventory")
    guest_dom0 = testinfra.get_host("ansible://m1-b", ansible_inventory=inventory)
    assert {"web1", "app1"} <= set(guest_dom0.check_output("xl list").split())


def test_guests_serve(host):
    for guest in host.ansible.get_variables()["lab_guests"]:
        with urllib.request.urlopen(guest["url"], timeout=60) as answer:
            assert answer.status == 200


def test_run_is_recorded(host):
    state = json.loads(host.file("/var/lib/vmbeam/state.json").content_string)
    run = state["history"][-1]
    assert run["outcome"] == "completed"
    assert {guest["guest"]: guest["result"] for guest in run["guests"]} == {"web1": "moved", "app1": "moved"}
    assert {guest["strategy"] for guest in run["guests"]} == {"zero_copy"}
