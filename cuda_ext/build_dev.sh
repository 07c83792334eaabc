#!/usr/bin/env bash
# Builds build/cuda/libdendrite_cuda.so for one architecture (90a, or the first argument) and nothing else, with the tools and torch of .venv.
set -euo pipefail; cd "$(dirname "${BASH_SOURCE[0]}")/.."; export PATH="$PWD/.venv/bin:$PATH"
cmake -S . -B build/cuda -G Ninja -DDENDRITE_CUDA=ON -DDENDRITE_CUDA_ARCHS="${1:-90a}" -DPython_EXECUTABLE="$PWD/.venv/bin/python"
cmake --build build/cuda --target dendrite_cuda -j 2
