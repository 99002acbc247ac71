# Every command of the project. `make` lists them.
PATH := $(CURDIR)/.venv/bin:$(PATH)
export PATH
export ANSIBLE_CONFIG := $(CURDIR)/ansible.cfg
export ANSIBLE_COLLECTIONS_PATH := $(CURDIR)/collections
export PYTHONPATH := $(CURDIR)/lab

# Machines of lab/topology.yml, its default_machines if empty.
MACHINES ?=
LAB = python -m vmbeam_lab $(addprefix --machine ,$(MACHINES))
INVENTORY := .lab/inventory.yml
# The collection as it is installed from its tarball.
STAGE := $(CURDIR)/build/stage
XEN ?= 4.17
N ?= 20
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help
help: ## List the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-20s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: setup
setup: ## Install what the lab and the tests need on this computer
	@lab/setup

.PHONY: demo
demo: setup ## Boot the lab, rejuvenate its host, show what happened
	@$(LAB) demo $(ARGS)

.PHONY: test
test: setup test-fast test-lab ## All tests: the fast ones, then the lab's

.PHONY: test-fast
test-fast: lint test-unit test-docs test-galaxy test-sanity test-xen-tools ## Lint, unit tests, the collection's gates: no Xen

.PHONY: lint
lint: ## ansible-lint, ruff, mypy
	ruff check .
	ruff format --check .
	mypy -p ansible_collections.vmbeam.xen.plugins
	mypy extensions/eda/plugins/event_source/aging.py
	mypy -p vmbeam_lab -p benchmarks
	ansible-lint

.PHONY: test-unit
test-unit: ## Unit tests of the Python
	pytest --numprocesses auto tests/unit

# ansible-test asks git which files there are, and the checkout ignores what is built.
.PHONY: stage
stage: ## Build the tarball and install it below build/stage
	rm -rf $(STAGE)
	ansible-galaxy collection build --output-path $(STAGE)
	ANSIBLE_COLLECTIONS_PATH=$(STAGE) ansible-galaxy collection install --no-deps -p $(STAGE) $(STAGE)/*.tar.gz
	git init --quiet $(STAGE)/ansible_collections/vmbeam/xen

.PHONY: test-sanity
test-sanity: stage ## ansible-test: sanity, and the unit tests of modules: others run Ansible on the checkout
	tests/ansible-test sanity
	tests/ansible-test units --num-workers 1 tests/unit/module_utils/ tests/unit/modules/

XEN_TREE := $(CURDIR)/build/xen-tree
.PHONY: test-xen-tools
test-xen-tools: flask-policy ## What the patched tree can test without Xen: sessions on a model, stream verifier, man page, policy
	xen-patches/model/run $(XEN_TREE)
	cd $(XEN_TREE)/tools/python && python3 -B -m unittest --quiet xen.migration.tests
	podchecker -warnings $(XEN_TREE)/docs/man/xl.1.pod.in

.PHONY: test-docs
test-docs: stage ## Lint the documentation and the changelog, build the pages into build/docs/html
	antsibull-changelog lint
	cd $(STAGE)/ansible_collections/vmbeam/xen && ANSIBLE_COLLECTIONS_PATH=$(STAGE) \
		antsibull-docs lint-collection-docs --plugin-docs --validate-collection-refs all .
	rm -rf build/docs && mkdir -p build/docs/rst
	ANSIBLE_COLLECTIONS_PATH=$(STAGE) antsibull-docs collection --use-current --squash-hierarchy --fail-on-error \
		--dest-dir build/docs/rst vmbeam.xen
	sphinx-build --quiet --fail-on-warning --keep-going --conf-dir docs build/docs/rst build/docs/html

.PHONY: test-galaxy
test-galaxy: stage ## What Galaxy checks in a tarball, and the installed playbooks by their names
	cd $(STAGE) && GALAXY_IMPORTER_CHECK_REQUIRED_TAGS=true python -m galaxy_importer.main *.tar.gz > import.log; \
		status=$$?; cat import.log; test $$status = 0 && ! grep -qE '^(WARNING|ERROR)' import.log
	cd $(STAGE) && ANSIBLE_COLLECTIONS_PATH=$(STAGE) ansible-playbook --syntax-check -i localhost, \
		$(patsubst playbooks/%.yml,vmbeam.xen.%,$(wildcard playbooks/[!_]*.yml))

.PHONY: test-lab
test-lab: ## Tests on real Xen: a machine, its limits, a whole rejuvenation
	pytest tests/lab -m "not long"

.PHONY: test-molecule
test-molecule: ## Each role on the lab: check mode, converge, idempotence, testinfra (ARGS='-s host_vm': one; default: all)
	$(LAB) up
	repository=$${VMBEAM_XEN_REPO:-$$(packaging/build $(if $(filter debug,$(VMBEAM_XEN_FLAVOUR)),--debug) | tail -n 1)} && \
	VMBEAM_XEN_REPO=$$repository python -m vmbeam_lab.ansible molecule test $(or $(ARGS),--all)

.PHONY: test-rejuvenation
test-rejuvenation: ## All tests that move guests, the long ones too
	pytest tests/lab/test_rejuvenation.py tests/lab/test_zero_copy.py tests/lab/test_by_hand.py tests/lab/test_interference.py tests/lab/test_aging.py tests/lab/test_inventory.py tests/lab/test_report.py tests/lab/test_safety.py

.PHONY: test-fleet
test-fleet: ## Rolling runs over three machines: one fails, and the controller is killed half-way
	pytest tests/lab/test_fleet.py

.PHONY: test-reboot
test-reboot: ## A planned reboot, a host VM that reboots itself, power cuts: each guest is started once
	pytest tests/lab/test_reboot.py

.PHONY: test-zero-copy-debug
test-zero-copy-debug: ## Misuse of the interface, a security policy, zero-copy to and fro, on hypervisors with assertions
	VMBEAM_XEN_FLAVOUR=debug pytest tests/lab/test_hostile.py tests/lab/test_flask.py tests/lab/test_zero_copy.py \
		tests/lab/test_interference.py

.PHONY: bench
bench: ## Measure migration in the lab, ours and Xen's own (ARGS=--help: what, how often, for how long)
	python -m benchmarks.migration $(ARGS)

.PHONY: bench-report
bench-report: ## Make the benchmark's page and plots anew from its results.json (ARGS=DIRECTORY: of that one)
	python -m benchmarks.results $(ARGS)

.PHONY: bench-fleet
bench-fleet: ## Measure a rolling run over a simulated fleet: the controller's time and memory (ARGS=--help)
	python -m benchmarks.fleet $(ARGS)

.PHONY: packages
packages: ## Build the patched Xen as Debian packages (ARGS=--debug: with assertions)
	packaging/build $(ARGS)

.PHONY: xen-tree
xen-tree: ## Re-create the patched Xen source tree (XEN=4.17), fail on fuzz
	xen-patches/tree --xen $(XEN)

FLASK_POLICY := $(CURDIR)/build/flask-policy
.PHONY: flask-policy
flask-policy: xen-tree ## Compile the default policy of the patched tree into build/flask-policy/xenpolicy
	mkdir -p $(FLASK_POLICY)
	$(MAKE) --silent -C $(XEN_TREE)/tools/flask/policy -f Makefile.common \
		FLASK_BUILD_DIR=$(FLASK_POLICY) POLICY_FILENAME=$(FLASK_POLICY)/xenpolicy

.PHONY: lab-up lab-down lab-status lab-console lab-save lab-restore lab-logs
lab-up: ## Boot the lab, from a saved boot if there is one (ARGS=--cold: do not; all lab-*: MACHINES="m2 m3")
	$(LAB) up $(ARGS)
lab-down: ## End the lab and delete its disks
	$(LAB) down
lab-status: ## Show machines, domains and phases
	$(LAB) status
lab-console: ## Attach to a machine's console (ARGS='--host-vm m1-a' for a host VM's)
	$(LAB) console $(ARGS)
lab-save: ## Save the running lab (ARGS='--tag NAME')
	$(LAB) save $(ARGS)
lab-restore: ## Return to a saved state (ARGS='--tag NAME')
	$(LAB) restore $(ARGS)
lab-logs: ## Collect logs below .lab/logs
	$(LAB) logs

.PHONY: lab-reliability
lab-reliability: ## Boot the lab N=20 times, count those that need no retry (ARGS='--parallel 2 --machine m2 --continue')
	python -m vmbeam_lab.reliability --runs $(N) $(ARGS)

.PHONY: build
build: ## Build the collection's tarball
	ansible-galaxy collection build --force

.PHONY: build-ee
build-ee: build ## Build the controller as a container image, vmbeam-ee, by podman (ARGS='--container-runtime docker')
	ansible-builder build --context build/ee --tag vmbeam-ee $(ARGS)
