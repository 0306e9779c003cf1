#!/usr/bin/env bash
# The numeric tests (marker "numeric") as other CPUs would run them: PyTorch's, oneDNN's, MKL's and our own instruction sets held
# down, NumPy's BLAS of other CPUs under Triton's interpreter, one thread and two.
#   bash tests/other_cpus.sh              every setting        ONLY="avx2 nehalem" bash tests/other_cpus.sh      some
# What this CPU cannot run is named and left out.  PYTHON: the interpreter to use.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
ONLY=${ONLY:-}
logs=$(mktemp -d)
table=() status=0 known=() ran=0

has() { [ -z "$1" ] || grep -qw "$1" /proc/cpuinfo; }

lane() {  # NAME FLAG PYTEST-ARGUMENTS... -- VARIABLE=VALUE...
    local name=$1 flag=$2 arguments=() start=$SECONDS
    shift 2
    while [ "$1" != -- ]; do arguments+=("$1"); shift; done
    shift
    known+=("$name")
    [ -z "$ONLY" ] || [[ " $ONLY " == *" $name "* ]] || return 0
    if ! has "$flag"; then table+=("$name: left out, this CPU has no $flag"); return 0; fi
    ran=1
    echo "== $name: $*"
    # a cache of its own: torch 2.13's Inductor takes what it compiled for another instruction set, and computes other numbers
    env OMP_NUM_THREADS=1 TORCHINDUCTOR_CACHE_DIR="$logs/inductor-$name" "$@" "$PYTHON" -m pytest -q -m "numeric and not slow" "${arguments[@]}" >"$logs/$name" 2>&1
    local code=$?
    [ $code = 0 ] || { status=1; grep -E "^(FAILED|ERROR|E   )" "$logs/$name" | head -40; }
    table+=("$name: $(tail -n 1 "$logs/$name" | tr -d =) [$((SECONDS - start)) s]")
}
here() { lane "$1" "$2" -n 2 tests bench/test_registry.py -- "${@:3}"; }
interpreted() {
    lane "$1" "$2" -n 2 tests/kernels tests/ops tests/nn -- TRITON_INTERPRET=1 LOWRANK_BACKEND=triton "${@:3}"
}

here here ""
here default "" ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_ENABLE_INSTRUCTIONS=SSE4_2 LOWRANK_ISA=baseline
here avx2 avx2 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 LOWRANK_ISA=avx2
lane threads "" tests bench/test_registry.py -- OMP_NUM_THREADS=2
interpreted interpreter ""
interpreted haswell avx2 OPENBLAS_CORETYPE=Haswell
interpreted zen avx2 OPENBLAS_CORETYPE=Zen
interpreted skylakex avx512f OPENBLAS_CORETYPE=SkylakeX
interpreted nehalem "" OPENBLAS_CORETYPE=Nehalem

printf '%s\n' "" "${table[@]}"
if [ $ran = 0 ]; then echo "nothing ran: ONLY=\"$ONLY\", expected some of: ${known[*]}"; exit 2; fi
[ $status = 0 ] && rm -rf "$logs" || echo "what was printed: $logs"
exit $status
