#!/usr/bin/env bash
# Everything that only a GPU can show, in one go: the operators' tests on CUDA and the engine's that are marked `gpu`,
# then the benchmarks -> one JSON, which `pytest-benchmark compare` reads.
#
#     benchmarks/gpu.sh [OUT.json] [pytest arguments, such as -k add_layer_norm]
#
# Runs from the checkout, builds nothing and changes nothing of the interpreter: torch, Triton, NumPy and pytest are all
# that the operators need, safetensors, pydantic and einops the engine's tests, DeepSpeed the whole step; what lacks one
# of them is left out by name. Benchmarks need pytest-benchmark: where it is not installed, pip puts it into build/gpu_packages
# (pure Python, so that a machine without a network may be handed the folder with the checkout). Ends with 1 if
# something failed, did not finish or could not run; the JSON is written after every file.
# PYTHON: the interpreter (python3). MVD_GPU_SECONDS: time for all of it (570). MVD_BENCH_SECONDS: how long a side is
# timed (0.2). MVD_GPU_ON_CPU=1: try the script where there is no GPU.
set -euo pipefail
out=benchmarks/gpu.json
case "${1:-}" in *.json) out=$1 && shift ;; esac
out=$(realpath -m "$out")
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} packages=$(realpath -m "${MVD_GPU_PACKAGES:-build/gpu_packages}")
export PYTHONPATH="$PWD/kernels:$PWD:$packages${PYTHONPATH:+:$PYTHONPATH}"
if ! "$python" -c 'import pytest_benchmark, cpuinfo' 2> /dev/null; then
  "$python" -m pip install -q --disable-pip-version-check --no-deps --target "$packages" -c constraints.txt \
    pytest-benchmark py-cpuinfo 2> /dev/null ||
    echo "gpu.sh runs no benchmarks: pytest-benchmark is not installed and pip cannot fetch it; run on a machine with a" \
      "network 'pip install --no-deps --target $packages pytest-benchmark py-cpuinfo' and copy that folder here" >&2
fi
exec "$python" benchmarks/gpu_run.py "$out" "${MVD_GPU_SECONDS:-570}" "${MVD_BENCH_SECONDS:-0.2}" "$@"
