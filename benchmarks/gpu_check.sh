#!/usr/bin/env bash
# Everything that needs a GPU, in stages: builds, tests, compute-sanitizer, benchmarks.
#
#   benchmarks/gpu_check.sh [options] OUT          results, logs and a summary go to the folder OUT
#
#   --stages a,b,c     of: build kernels engine sanitizer attention decode first-token fork tree beam
#                      deterministic flashinfer report; default: all but report
#   --shapes a,b       model shapes of the benchmarks (default tinyllama-1.1b,llama-3.1-8b)
#   --peers "a b"      peers of the benchmarks (default "hf"; "" for none)
#   --repeats N        repeats of a benchmark (default 5)
#   --device D         of the benchmarks (default cuda)
#   --library FILE     a built libdendrite_cuda.so to use instead of building one
#   --arch ARCH        architecture to build for (default 90a)
#   --again N          repeats of the deterministic check (default 1000)
#   --sanitize PATHS   tests that run under compute-sanitizer (default tests/kernels)
#   --pack             leave one file in OUT, gpu_check.tar.gz
#
# Uses $PYTHON, else .venv, else python3: it needs torch with CUDA, pytest and pytest-timeout; cmake,
# ninja and nanobind to build. Needs no network. A failing stage does not stop the others; the exit
# code says whether one failed. `report` copies the results to benchmarks/results and rewrites
# BENCHMARKS.md.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

stages=build,kernels,engine,sanitizer,attention,decode,first-token,fork,tree,beam,deterministic,flashinfer
shapes=tinyllama-1.1b,llama-3.1-8b
peers=hf
repeats=5
again=1000
device=cuda
library=
arch=90a
sanitize=tests/kernels
pack=
out=
while (($#)); do
  case $1 in
    --stages) stages=$2; shift ;;
    --shapes) shapes=$2; shift ;;
    --peers) peers=$2; shift ;;
    --repeats) repeats=$2; shift ;;
    --again) again=$2; shift ;;
    --device) device=$2; shift ;;
    --library) library=$2; shift ;;
    --arch) arch=$2; shift ;;
    --sanitize) sanitize=$2; shift ;;
    --pack) pack=1 ;;
    -h | --help) sed -n '2,/^set /p' "$0" | sed '$d; s/^# \{0,1\}//'; exit 0 ;;
    -*) echo "unknown option $1; see --help" >&2; exit 2 ;;
    *) out=$1 ;;
  esac
  shift
done
[[ $out ]] || { echo "where to? benchmarks/gpu_check.sh [options] OUT" >&2; exit 2; }
mkdir -p "$out" && out=$(cd "$out" && pwd)

python=${PYTHON:-}
[[ $python ]] || { [[ -x .venv/bin/python ]] && python=$PWD/.venv/bin/python; } || python=python3
export PYTHONPATH="$PWD/engine:$PWD:$PWD/benchmarks/gpu${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
cores=$(nproc)
if [[ $library && ! $library -ef build/cuda/libdendrite_cuda.so ]]; then
  mkdir -p build/cuda && cp "$library" build/cuda/libdendrite_cuda.so || exit 2
fi
summary=()
failed=0

# stage NAME COMMAND...: runs it with its output in OUT/NAME.log and on the screen, notes time and result
stage() {
  local name=$1 start=$SECONDS status
  shift
  echo "== $name"
  "$@" 2>&1 | tee "$out/$name.log"
  status=${PIPESTATUS[0]}
  local took=$((SECONDS - start))
  if ((status == 0)); then
    summary+=("$(printf '%-34s ok      %4d s' "$name" "$took")")
  else
    summary+=("$(printf '%-34s FAILED  %4d s  (exit code %d)' "$name" "$took" "$status")")
    failed=1
  fi
}

build() {
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
  "$python" -c 'import sys, torch; print("python", sys.version.split()[0], "torch", torch.__version__)'
  local with_cuda=ON tag
  [[ -e build/cuda/libdendrite_cuda.so ]] && with_cuda=OFF
  tag=$("$python" -c 'import sys; print(sys.implementation.cache_tag)')
  cmake -S . -B "build/gpu-check-$tag" -G Ninja -DDENDRITE_INPLACE=ON -DDENDRITE_CUDA=$with_cuda \
    -DDENDRITE_CUDA_ARCHS="$arch" -DPython_EXECUTABLE="$(command -v "$python")" >"$out/cmake.log" 2>&1 ||
    { tail -n 20 "$out/cmake.log"; return 1; }
  cmake --build "build/gpu-check-$tag" -j "$cores" 2>&1 | tail -n 5
  ((PIPESTATUS[0] == 0)) || return 1
  "$python" - <<'PY'
from dendrite_engine import kernels
from dendrite_engine.kernels.device_ops import device_kernels

ops = device_kernels()
print(f"kernels: {ops.name}: {ops.reason}")
print(f"host: {kernels.load('auto').name}")
raise SystemExit(ops.name != "cuda")
PY
}

# Where everything is skipped, nothing was tested: that is a failure here.
tests() {
  local log="$out/pytest-${1##*/}.log" status
  "$python" -m pytest -m cuda -q -p no:cacheprovider "$@" >"$log" 2>&1
  status=$?
  tail -n 40 "$log"
  ((status == 0)) && ! grep -Eq '[0-9]+ passed' "$log" && status=1
  return $status
}

# Every allocation on its own, so that an access behind a tensor's end is one behind an allocation's;
# torch captures no graphs then, and tests of them are left out.
sanitizer() {
  local tool=$1 filter=() log="$out/sanitizer-$1.full.log" status
  if [[ $tool != initcheck ]]; then # initcheck has to see who writes
    for option in --kernel-regex --kernel-name; do
      compute-sanitizer --help 2>/dev/null | grep -q -- "$option " && filter=("$option" kns=dendrite) && break
    done
  fi
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 99 "${filter[@]}" \
    --target-processes all "$python" -m pytest -m cuda -k 'not graph and not flashinfer' -q -p no:cacheprovider \
    -p few_of_each --of-each 2 -o timeout=0 $sanitize >"$log" 2>&1
  status=$?
  grep -v '^=========' "$log" | tail -n 5
  grep '^=========' "$log" | tail -n 15
  # Torch's own kernels may read what they have not written: those are not ours to judge.
  if [[ $tool == initcheck ]] && ((status == 99)); then
    local ours
    ours=$(grep -A 2 'Uninitialized' "$log" | grep -c dendrite)
    echo "uninitialized reads in kernels of dendrite: $ours"
    ((ours == 0)) && grep -Eq '[0-9]+ passed' "$log" && ! grep -Eq '[0-9]+ failed' "$log" && status=0
  fi
  gzip -f "$log"
  return $status
}

# bench NAME FILE ARGUMENTS...
bench() { "$python" -m dendrite_lab.cli bench "$1" --json "$out/gpu-$2.json" --device "$device" "${@:3}"; }

for_each_shape() {
  local name=$1 shape
  for shape in ${shapes//,/ }; do
    # shellcheck disable=SC2086 # names of peers are words
    stage "$name-$shape" bench "$name" "$name-$shape" --shape "$shape" --repeats "$repeats" "${@:2}" \
      --peers $peers
  done
}

attention() {
  bench attention attention --budget-s 230 --repeats "$((4 * repeats))" --trees all prompts
}

kv_attention() { bench kv-attention kv-attention --repeats "$((2 * repeats))"; }

flashinfer() {
  local shape=${shapes%%,*} mode
  tests tests/kernels/test_flashinfer_gpu.py || return 1
  for mode in flashinfer-flat flashinfer-cascade; do
    bench tree "tree-$shape-$mode" --shape "$shape" --repeats 3 --cases 64x4096 --set attention=$mode --peers ||
      return 1
  done
}

report() { cp "$out"/gpu-*.json benchmarks/results/ && "$python" benchmarks/make_report.py; }

for name in ${stages//,/ }; do
  case $name in
    build) stage build build ;;
    kernels) stage kernels tests tests/kernels -k 'not flashinfer' ;;
    engine) stage engine tests tests/engine tests/golden ;;
    sanitizer) for tool in memcheck racecheck initcheck; do stage "sanitizer-$tool" sanitizer "$tool"; done ;;
    attention) stage attention attention ;;
    kv-attention) stage kv-attention kv_attention ;;
    decode | first-token | fork | tree | beam) for_each_shape "$name" ;;
    deterministic) for_each_shape deterministic --again "$again" ;;
    flashinfer) stage flashinfer flashinfer ;;
    report) stage report report ;;
    *) echo "unknown stage $name; see --help" >&2; failed=1 ;;
  esac
done

printf '\n%s\n' "== summary"
printf '%s\n' "${summary[@]}" | tee "$out/summary.txt"
if [[ $pack ]]; then
  tar -C "$out" -czf "$out/.packed" --exclude=.packed . && find "$out" -mindepth 1 ! -name .packed -delete &&
    mv "$out/.packed" "$out/gpu_check.tar.gz"
fi
exit $failed
