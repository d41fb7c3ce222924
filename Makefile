# make env    the environment, in .venv           make demo   the whole job on real images, in minutes
# make check  style, types, layers                make test   every test that can run on this machine
# make unit   the tests that take seconds         make clean  remove what the demo wrote
# make test-s3  the tests against a real S3 server, which they start
# make test-slurm  the tests against a real four-node SLURM, which they start
# make bench OFFICIAL=DIR  all that is measured on a CPU, C1 to C10, in about an hour, and a table of it (ROUNDS=3: in half of that; short ones keep their 7 or 21)
# make bench-data OFFICIAL=DIR  speed of reading shards, local and from S3, against others
# make bench-precompute OFFICIAL=DIR  speed of images to moments, all but the encoder, against the official writer
# make bench-slurm  seconds lost to each kind of fault, on the rehearsal cluster
# make bench-eval OFFICIAL=DIR  distances, image path and guided sampling of an evaluation against the official code
# make bench-checkpoint  how long training stands still for a checkpoint
# make docs  the documentation site, in docs/_build/html
# make soak  for hours: more seeds of the tests that kill at random, and more settings of the forecast of memory
# make bench-step OFFICIAL=DIR  speed of the training step and the EMA against the official code; bytes that ZeRO-1 moves
# make bench-gpu [OFFICIAL=DIR]  all that is measured on a GPU, in nine minutes
# make bench-scaling  projections to 8, 64 and 512 GPUs from what is measured; draws docs/scaling.png
# make bench-simulation  what grows with the number of ranks, up to 1,024 simulated ones; draws docs/simulation.png
# make bench-attribution  what it costs to know whose fault a step was
# make soak-cluster  half an hour of random faults on the rehearsal cluster
# make bench-shuffle  how well ImageNet's shards are shuffled

PYTHON ?= python3
VENV := .venv
ROUNDS ?= 7
RUN := $(VENV)/bin/python

.PHONY: docs bench env check unit test test-s3 test-slurm soak demo clean bench-data bench-precompute bench-checkpoint bench-step bench-gpu bench-shuffle \
  bench-slurm bench-eval bench-scaling bench-simulation bench-attribution soak-cluster

env: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is not there or older than 3.11; name another: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

check: env
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(RUN) -m pytest tests/unit/test_layers.py

unit: env
	$(RUN) -m pytest tests/unit -m "not slow"

# Two processes, a file at a time: tests of a cluster wait most of the time.
test: check
	$(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder --deselect tests/unit/test_layers.py

test-s3: env
	$(RUN) -m pytest -m s3

test-slurm: env
	$(RUN) -m pytest -m slurm

soak: env
	UVIT_DIST_SOAK=50 $(RUN) -m pytest tests/integration/test_precompute.py -k killed_at_random
	UVIT_DIST_SOAK=100 $(RUN) -m pytest tests/integration/test_checkpoints.py -k killed
	UVIT_DIST_SOAK=1 $(RUN) -m pytest tests/integration/test_memory.py

# Each by itself, whatever becomes of the others; the table says what passed.
bench: env
	@[ -f "$(OFFICIAL)/libs/uvit.py" ] || { echo "error: OFFICIAL='$(OFFICIAL)' is no checkout of the official code: git clone https://github.com/baofff/U-ViT DIR"; exit 2; }
	-@for part in data step eval checkpoint precompute; do $(MAKE) --no-print-directory bench-$$part; done
	$(RUN) -m benchmarks.table

bench-data: env
	$(RUN) -m benchmarks.data --official "$(OFFICIAL)" --rounds $(ROUNDS)

bench-precompute: env
	$(RUN) -m benchmarks.precompute --official "$(OFFICIAL)" --rounds $(ROUNDS)

bench-eval: env
	$(RUN) -m benchmarks.evaluation --official "$(OFFICIAL)" --rounds $(ROUNDS)

bench-checkpoint: env
	$(RUN) -m benchmarks.checkpoint --rounds $(ROUNDS)

bench-step: env
	$(RUN) -m benchmarks.step --official "$(OFFICIAL)" --rounds $(ROUNDS)

bench-gpu: env
	$(RUN) -m benchmarks.gpu --out benchmarks/results/gpu.json $(if $(OFFICIAL),--official "$(OFFICIAL)")

bench-scaling: env
	$(RUN) -m benchmarks.scaling

bench-simulation: env
	$(RUN) -m benchmarks.simulation

soak-cluster: env
	$(RUN) -m benchmarks.soak

bench-slurm: env
	$(RUN) -m benchmarks.slurm_faults

bench-attribution: env
	$(RUN) -m benchmarks.attribution

bench-shuffle: env
	$(RUN) -m benchmarks.shuffle --out benchmarks/results/shuffle.json

demo: env
	$(RUN) -m uvit_dist.demo

# Dead links, anchors and pictures are warnings, and warnings are errors.
docs: env
	$(RUN) -m docs.make_reference
	$(RUN) -m sphinx -q -W --keep-going -c docs -b html -d docs/_build/doctrees . docs/_build/html

clean:
	rm -rf runs/digits_demo
