#!/usr/bin/env bash
# build_dev.sh [ARCH=90a] [TARGET=dendrite_cuda]: libdendrite_cuda.so (or dendrite_emulated: libdendrite_emulated.so) in build/cuda, where
# kernels/device_ops.py finds it; for one architecture, with the tools and the torch of .venv.
set -euo pipefail; cd "$(dirname "${BASH_SOURCE[0]}")/.."; export PATH="$PWD/.venv/bin:$PATH"; mkdir -p build/cuda; exec 9> build/cuda/.lock; flock 9
cmake -S . -B build/cuda -G Ninja -DDENDRITE_CUDA=ON -DDENDRITE_EMULATOR=ON -DDENDRITE_CUDA_ARCHS="${1:-90a}" -DPython_EXECUTABLE="$PWD/.venv/bin/python"
cmake --build build/cuda --target "${2:-dendrite_cuda}" -j 2
