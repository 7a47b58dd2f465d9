# Every target that needs Python makes .venv first; nothing outside this folder is touched.
SHELL := /bin/bash
PYTHON ?= python3.11
BIN := .venv/bin
WORKERS ?= $(shell nproc 2>/dev/null || echo 2)
export PATH := $(CURDIR)/$(BIN):$(CURDIR)/tools/bin:$(PATH)

.PHONY: pocket demo test soak image-test check licences sbom tools protos bench clean node-client

.venv: .venv/.installed
.venv/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $$(command -v $(PYTHON) || command -v python3) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: .venv
	$(BIN)/atelier demo --output demo

# WORKERS processes of one thread each; WORKERS=0 is this process, for a debugger. The client of another language is
# tested wherever Node is installed.
test: .venv tools $(if $(shell command -v node && command -v npm),node-client)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not soak and not gpu and not image"

node-client: tests/node/node_modules/.package-lock.json
tests/node/node_modules/.package-lock.json: tests/node/package.json tests/node/package-lock.json
	npm --prefix tests/node ci --silent
	touch $@

soak: .venv tools
	$(BIN)/python -m pytest -m "soak"

# Builds the Dockerfile in a Debian root and runs it; as root, with debootstrap. DEVICE=cuda for the other image.
image-test: .venv
	$(BIN)/python -m pytest -m image --capture=no tests/image

# Stubs, rules and dashboard (promtool), manifests (kubernetes-validate, strict), the operations page, licences.
CHECKED := $(addprefix tests/unit/,test_protos_fresh.py monitoring k8s test_operations.py test_supply.py)
check: .venv tools
	@for tool in ruff mypy hadolint yamllint buf pip-audit; do test -x $(BIN)/$$tool || \
	  { echo "check: $$tool is missing: rm -r .venv && make .venv" >&2; exit 1; }; done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/hadolint Dockerfile
	$(BIN)/yamllint .
	$(BIN)/buf lint
	$(BIN)/buf breaking --against protos/released.binpb
	$(BIN)/python -m pytest -q -n $(WORKERS) -m "not soak" $(CHECKED)
	.ci/audit

# docs/licences.md; build/sbom.json in CycloneDX.
licences: .venv
	$(BIN)/python .ci/supply.py licences

sbom: .venv
	$(BIN)/python .ci/supply.py sbom build/sbom.json

# promtool and prometheus into tools/bin, without root; torchao into tools/torchao.
tools: tools/torchao/.installed
	.ci/tools

# Beside .venv and not in it: where torchao is found, diffusers imports it with every process that paints.
tools/torchao/.installed: pyproject.toml constraints.txt | .venv
	rm -rf $(@D)
	$(BIN)/python -m pip install --quiet --no-deps --constraint constraints.txt --target $(@D) torchao
	touch $@

protos: .venv
	rm -f client/atelier/v1/*_pb2*
	$(BIN)/python -m grpc_tools.protoc -I protos --python_out=client --mypy_out=client \
	  --grpc_python_out=client --mypy_grpc_out=client protos/atelier/v1/*.proto

bench: .venv tools
	$(BIN)/python -m benchmarks all

# Trains the embedded model, stage by stage, and stops at the first gate that is missed. FROM=FOLDER starts
# from a model, MINUTES=N is each stage's time, BELOW_GATE=1 goes on below a gate. Resumes where it stopped.
pocket: .venv
	set -e; for stage in text vae unet scorer evaluate; do \
	  $(BIN)/python -m pocket $$stage --workers $$(nproc) $(if $(FROM),--from $(FROM)) \
	    $(if $(MINUTES),--minutes $(MINUTES)) $(if $(BELOW_GATE),--below-gate); done

clean:
	rm -rf .venv tools demo build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis tests/node/node_modules
