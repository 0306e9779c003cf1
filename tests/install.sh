#!/usr/bin/env bash
# What a stranger installs, from a copy of what git has: into an empty environment, where torch comes after the wheel and lowrank is
# pure Python (its native ops' tests run in that form); then into that environment, which has torch now, where the C++ is built.
# Last, with which other Pythons every source compiles.
#   bash tests/install.sh        TORCH: what to install; PYTHON: with which Python
set -euo pipefail
cd "$(dirname "$0")/.."
TORCH=${TORCH:-torch==2.13.0} PYTHON=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/source" "$work/elsewhere"
git ls-files -z --cached --others --exclude-standard | tar --null --ignore-failed-read -T - -cf - 2>/dev/null | tar -xf - -C "$work/source"
"$PYTHON" -m venv "$work/env"
python="$work/env/bin/python"
install=("$python" -m pip install -q --disable-pip-version-check)

echo "== an empty environment: pip install . $TORCH"
"${install[@]}" --no-compile "$work/source" "$TORCH" pytest pytest-xdist hypothesis  # a quarter of the work, for what nobody imports
cd "$work/elsewhere"
"$python" - <<'TXT'
import warnings

import torch

import lowrank
from lowrank import _native

why = _native.why_not("cpu")
assert "pip install -v --force-reinstall --no-deps" in why, why
W, A, B = torch.zeros(8, 8), torch.ones(2, 8), torch.ones(8, 2)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    lowrank.materialize(W, A, 1.0, B)
assert any(why in str(w.message) for w in said), [str(w.message) for w in said]
TXT
"$work/env/bin/lowrank" doctor >doctor.txt
grep -q "pip install -v --force-reinstall --no-deps" doctor.txt
echo "== the native ops, and a plain LoRA linear, in PyTorch"
cd "$work/source"
OMP_NUM_THREADS=1 "$python" -m pytest -q -n 2 --dist worksteal -p no:cacheprovider -m "not slow" \
    tests/test_optim.py tests/test_analysis.py tests/test_delta.py tests/ops/test_materialize.py tests/ops/test_fold.py \
    tests/ops/test_linear.py

echo "== an environment that has torch: pip install ."
LOWRANK_REQUIRE_NATIVE=1 "${install[@]}" --force-reinstall --no-deps "$work/source"
cd "$work/elsewhere"
"$python" -c "from lowrank import _native; assert _native.why_not('cpu') is None, _native.why_not('cpu'); \
    print('C++ built and loaded; the node:', _native.why_not('node') or 'too')"

for version in 3.10 3.11 3.12 3.13 3.14; do
    other=
    for candidate in "python$version" "$HOME"/.pyenv/versions/"$version".*/bin/python; do
        if "$candidate" -c "" 2>/dev/null; then other=$candidate; break; fi  # a shim may be there without its Python
    done
    if [ -z "$other" ]; then echo "== Python $version: not here"; continue; fi
    "$other" -W error -m compileall -q -f "$work/source/lowrank" "$work/source/kernels" "$work/source/setup.py"
    echo "== Python $version: every source compiles"
done
