#!/usr/bin/env bash
# Every benchmark on the GPU at hand, results as JSON in ${OUT:-bench/results/local}.  From the repository root.
set -u
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD" OUT="${OUT:-bench/results/local}"
mkdir -p "$OUT"
status=0
python3 -m lowrank.cli doctor | tee "$OUT/doctor.txt" || status=1
python3 bench/lora_linear.py --ranks 8,16,64,128 --dropouts 0,0.1 --out "$OUT/lora_linear.json" || status=1
python3 bench/lora_linear.py --shapes 1x4096x4096,16x4096x4096,128x4096x4096,1024x4096x4096,16384x4096x4096 \
    --out "$OUT/lora_linear_rows.json" || status=1
python3 -m pytest bench/test_host_overhead.py -q --benchmark-only --benchmark-json="$OUT/host_overhead.json" || status=1
python3 -m lowrank.cli compare --out "$OUT/compare" || status=1
exit $status
