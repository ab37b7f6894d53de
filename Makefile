# `make help` lists the targets. The first run installs into .venv; later ones find it done.
PYTHON ?= python3
# cpu or cuda; empty: cuda where there is a GPU
DEVICE ?=

MODEL ?=
BITS ?= 4
GROUP_SIZE ?= 64
CODEBOOK ?= nf
OUT ?=
PORT ?= 8000
VLLM_ARGS ?=
LOAD_ARGS ?=

INSTALL = $(PYTHON) deploy/install.py $(if $(DEVICE),--device $(DEVICE))

.PHONY: help serve install test load clean

help:
	@echo 'make serve    install, quantize a model and serve it on PORT (8000), OpenAI-compatible'
	@echo '              MODEL=directory or hub id (default: an embedded demo model)'
	@echo '              BITS=4 GROUP_SIZE=64 CODEBOOK=nf OUT=models/... PORT=8000 VLLM_ARGS="..."'
	@echo 'make install  vLLM, PyTorch and this project into .venv, for this machine (DEVICE=cpu|cuda to choose)'
	@echo 'make test     lint and all tests'
	@echo 'make load     load a server, write bench-results/load/report.html; LOAD_ARGS="--scenario soak ..." (--help lists them)'
	@echo 'make clean    remove what was built; .venv and models/ stay'

install:
	@$(INSTALL)

serve: install
	@exec .venv/bin/python deploy/serve.py --model '$(MODEL)' --bits '$(BITS)' --group-size '$(GROUP_SIZE)' \
	  --codebook '$(CODEBOOK)' --out '$(OUT)' --port '$(PORT)' --vllm-args='$(VLLM_ARGS)'

# Dozens of processes import vLLM: bytecode saves each half of the seconds that takes, whatever the environment says.
test:
	@$(INSTALL) --dev
	.venv/bin/ruff check
	PYTHONDONTWRITEBYTECODE= .venv/bin/python -m pytest -n 2 --dist loadfile --durations 20

load:
	@$(INSTALL) --dev
	.venv/bin/python -m load_tests.load $(if $(MODEL),--model '$(MODEL)') $(LOAD_ARGS)

clean:
	rm -rf build dist vllm_flute/*.so .pytest_cache .ruff_cache .hypothesis
	find vllm_flute tests deploy load_tests -name __pycache__ -prune -exec rm -rf {} +
