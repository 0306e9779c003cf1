#!/usr/bin/env bash
# Every benchmark on the GPU at hand in under eight minutes; small JSON files go to ${OUT:-bench/results/local}.
#
#     bench/gpu.sh               each part prints its own verdict; one that fails or runs out of time does not stop the rest
#     bench/gpu.sh --dry-run     the same parts at toy sizes on the CPU, kernels in Triton's interpreter: does it run?
#
# The first number of a part is its limit in seconds.  No part starts or runs past DEADLINE.
set -u
cd "$(dirname "$0")/.."
toy=; [[ "${1:-}" == --dry-run ]] && toy=1
python="${PYTHON:-$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python3)}"
export PYTHONPATH="$PWD" OUT="${OUT:-bench/results/local}" PYTHONUNBUFFERED=1
DEADLINE="${DEADLINE:-470}"
mkdir -p "$OUT"
status=0

part() {
    local limit=$1 left=$((DEADLINE - SECONDS)); shift
    (( left < limit )) && limit=$left
    echo; echo "== at $SECONDS s: $*"
    (( limit < 5 )) && { echo "SKIPPED: no time left"; status=1; return; }
    timeout --kill-after=5 "$limit" "$@" || { echo "FAILED with status $? (124: over $limit s)"; status=1; }
}
time_() { local limit=$1; shift; part "$limit" "$python" bench/run.py --out "$OUT" "${how[@]}" "$@"; }

if [[ $toy ]]; then
    export TRITON_INTERPRET=1 CUDA_VISIBLE_DEVICES=
    how=(--toy --no-gate)
    part 60 "$python" -m lowrank.cli doctor
    part 60 "$python" bench/gate.py --tests tests/ops/test_dropout.py --out "$OUT/gate.json"
    layer= linear= head= wide= mixture= rows=32x64x96 small= ranks=8,16 tune="--toy --rounds 2" shards=2
else
    how=(--gate "$OUT/gate.json")
    # csrc/ for this GPU alone; without nvcc it says so, and what it would have done is done in PyTorch
    arch=$("$python" -c 'import torch; a, b = torch.cuda.get_device_capability(); print(f"{a}{b}" + "a" * (a >= 9))')
    part 120 env LOWRANK_ARCHS="$arch" "$python" setup.py build_ext --inplace
    part 20 "$python" -m lowrank.cli doctor
    part 150 "$python" bench/gate.py --seconds 140 --out "$OUT/gate.json"
    linear=8192x4096x4096 wide=8192x4096x4096,8192x4096x14336,8192x14336x4096,8192x4096x1024 layer=8192x4096x14336
    head=8192x4096x128256 mixture=4096x2048x768,512x2048x768
    rows=128x4096x4096,512x4096x4096,1024x4096x4096,2048x4096x4096,4096x4096x4096,16384x4096x4096
    small=1x4096x4096 ranks=8,16,32,64,128 tune="--seconds 20" shards=8
fi
shapes() { [[ $1 ]] && echo "--shapes $1"; }

# 1. Does the big GEMM add to the thin term for free?  accepted: at most 1.02
time_ 15 addmm $(shapes "$wide") --seconds 10
# 2. The four kernels' bytes per second against a copy of as many
time_ 40 shrink expand dy_pass x_pass $(shapes "$wide") --ranks 16,64 --seconds 8
# 3. End to end over the frozen linear, forward and backward apart: ranks, then rows, then against compiled PEFT
time_ 45 lora_linear $(shapes "$linear") --ranks $ranks --seconds 35
time_ 35 lora_linear $(shapes "$rows") --label rows --dropouts 0 --seconds 25
time_ 50 lora_linear $(shapes "$linear") --label compiled --dropouts 0 --modes forward,both \
    --peers frozen,lowrank,peft-compiled
# 4. One Llama-8B layer: frozen, PEFT, PEFT patched
time_ 30 llama_layer $(shapes "$layer") --sets 1 --seconds 20
# 4b. A four-layer model of these sizes, trained: tokens per second and peak memory, with Liger where it is installed
part 60 "$python" bench/llama_model.py --out "$OUT" --steps 5 ${toy:+--toy --device cpu}
# 5. SVF: each mode against the reference algorithm and the frozen linear, and what the cost rule says
time_ 40 svf_linear svf_dy materialize $(shapes "$layer") --ranks "${ranks%%,*}",64 --seconds 12
# 6. Streams over weights: bytes per second against a copy of as many, AdamW against torch's fused one, fold against PEFT's merge
time_ 45 adamw diff_stats topk_mask delta fold $(shapes "$layer") --seconds 9
# 7. Log-probabilities from a frozen head, against its GEMMs, PyTorch, TRL and fused cross entropies
time_ 40 linear_logprob $(shapes "$head") --sets 1 --rounds 5 --seconds 30
# 8. DoRA: over the frozen linear, over LoRA, against PEFT's; its own passes against a copy
time_ 35 dora_linear dora_norm gain_dy drop $(shapes "$linear") --seconds 7
# 8b. A mixture's experts with LoRA, of Qwen3-30B-A3B's sizes: over the frozen block, against PEFT
time_ 35 experts $(shapes "$mixture") --sets 1 --modes both --rounds 5 --seconds 25
# 9. From which M on do kernels pay?
time_ 20 small $(shapes "$small") --seconds 15
# 10. The tuning sweeps: compile on all cores, then time
warm() { for i in $(seq 0 $((shards - 1))); do "$python" bench/tune.py $tune --compile-only --shard "$i/$shards" & done; wait; }
export -f warm; export python tune shards
part 45 bash -c warm
part 50 "$python" bench/tune.py $tune --out "$OUT/tune.json"
# 11. What the host pays, tables and figure, and the comparison of methods
#     (in a dry run without the interpreter, which serves no host)
if [[ $toy ]]; then
    part 30 env -u TRITON_INTERPRET "$python" bench/test_host_overhead.py --rounds 1 --json "$OUT/host_overhead.json"
else
    part 40 "$python" bench/test_host_overhead.py --device cuda --rounds 9 --json "$OUT/host_overhead.json"
    part 20 "$python" bench/launchers.py
fi
part 20 "$python" bench/report.py "$OUT"
# (not in a dry run: it pretrains a model first, minutes on a CPU; tests/compare runs it at toy size)
[[ $toy ]] || part 60 "$python" -m lowrank.cli compare --out "$OUT/compare"
echo; echo "bench/gpu.sh: $SECONDS s, status $status, results in $OUT"
exit $status
