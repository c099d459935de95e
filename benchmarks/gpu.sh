#!/usr/bin/env bash
# Everything that only a GPU can show, in one go: the operators' tests on CUDA and the engine's that are marked `gpu`,
# then the benchmarks -> one JSON.
#
#     benchmarks/gpu.sh [OUT.json] [pytest arguments, such as -k add_layer_norm]
#
# Runs from the checkout: nothing is installed or built, and torch, Triton, NumPy and pytest are all that the operators
# need, safetensors and pydantic the engine's tests, which are left out by name where pydantic is missing. Ends
# with 1 if something failed or did not finish; the JSON is there all the same.
# PYTHON: the interpreter (python3). MVD_GPU_SECONDS: time for all of it (570). MVD_BENCH_SECONDS: how long a case is
# timed (0.5). MVD_GPU_ON_CPU=1: try the script where there is no GPU.
set -euo pipefail
out=benchmarks/gpu.json
case "${1:-}" in *.json) out=$1 && shift ;; esac
out=$(realpath -m "$out")
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD/kernels:$PWD${PYTHONPATH:+:$PYTHONPATH}"
export MVD_BENCH_SECONDS=${MVD_BENCH_SECONDS:-0.5}
exec "${PYTHON:-python3}" benchmarks/gpu_run.py "$out" "${MVD_GPU_SECONDS:-570}" "$@"
