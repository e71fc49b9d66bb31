#!/bin/sh
# Everything that needs a GPU, in less than 12 minutes: its tests, then the measurements.
#
#     [PYTHON=python3] sh benchmarks/gpu.sh [FILE]
#
# FILE (gpu.log) has what was printed, also if this is cut off.
log=$(realpath "${1:-gpu.log}")
cd "$(dirname "$0")/.." || exit
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
{
    # In parallel but for those that fill the memory.
    timeout -s INT -k 20 200 "${PYTHON:-python3}" -m pytest -m gpu -n 4 --durations=10 tests/gpu/test_gpu.py
    timeout -s INT -k 20 70 "${PYTHON:-python3}" -m pytest -m gpu tests/gpu/test_gpu_memory.py
    timeout -s INT -k 20 400 "${PYTHON:-python3}" benchmarks/gpu.py
} 2>&1 | tee "$log"
