"""One LoRA linear, forward and backward, against the frozen linear and PEFT in the same run.

    python bench/lora_linear.py                       2048 x 2048, r = 16, bf16 on the CPU; 4096 shapes on a GPU
    python bench/lora_linear.py --shapes 8192x4096x4096 --ranks 8,16,64 --out results.json

Rounds are paired (frozen, peft, lowrank, frozen, ...) and rotate several weight sets, so that no cache holds the weight.
The ratio column is the one to read: time over the frozen linear's, which computes Y and dX.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import nn

import lowrank
from lowrank.timing import paired


def environment(device: torch.device) -> dict[str, object]:
    """What a figure is worth nothing without."""
    import peft

    root = Path(__file__).parent.parent
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True).stdout
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "peft": peft.__version__,
        "lowrank": lowrank.__version__,
        "commit": commit.strip(),
        "command": "python " + " ".join([os.path.relpath(sys.argv[0], root), *sys.argv[1:]]),
    }


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return f"{line.split(':', 1)[1].strip()}, {torch.backends.cpu.get_cpu_capability()}"
    return "CPU"


def candidates(M, K, N, r, p, dtype, adapter_dtype, device, sets):
    """{name: call(i)}, each one forward and one backward of set i; all of a set share weight and input."""
    config = LoraConfig(r=r, lora_alpha=2 * r, lora_dropout=p, init_lora_weights=False)
    layers, xs = [], []
    for _ in range(sets):
        base = nn.Linear(K, N, bias=False, device=device, dtype=dtype).requires_grad_(False)
        layer = PeftLinear(base, "default", config, r=r, lora_alpha=2 * r).to(device).train()
        for factor in (layer.lora_A["default"], layer.lora_B["default"]):
            factor.to(adapter_dtype)
        layers.append(layer)
        xs.append(torch.randn(M, K, device=device, dtype=dtype, requires_grad=True))
    dy = torch.randn(M, N, device=device, dtype=dtype)

    def step(forward, i):
        layer, x = layers[i % sets], xs[i % sets]
        for t in (x, layer.lora_A["default"].weight, layer.lora_B["default"].weight):
            t.grad = None
        forward(layer, x).backward(dy)

    def ours(layer, x):
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        return lowrank.lora_linear(x, layer.base_layer.weight, A, B, layer.scaling["default"], dropout_p=p)

    return {
        "frozen": lambda i: step(lambda layer, x: layer.base_layer(x), i),
        "peft": lambda i: step(lambda layer, x: layer(x), i),
        "lowrank": lambda i: step(ours, i),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--shapes", help="MxKxN, comma separated")
    parser.add_argument("--ranks", default="16")
    parser.add_argument("--dropouts", default="0,0.05")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, help="write the rows and the environment here as JSON")
    args = parser.parse_args()
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    shapes = args.shapes or ("8192x4096x4096,8192x4096x14336" if device.type == "cuda" else "2048x2048x2048")
    torch.manual_seed(0)

    rows = []
    print(
        f"{'M x K x N':>18} {'r':>4} {'p':>5} {'adapters':>9} {'':>8} {'ms':>9} {'20-80 %':>17} {'/frozen':>8} {'/peft':>6}"
    )
    for shape in shapes.split(","):
        M, K, N = map(int, shape.split("x"))
        for r in map(int, args.ranks.split(",")):
            for adapter_dtype in dict.fromkeys((dtype, torch.float32)):
                for p in map(float, args.dropouts.split(",")):
                    calls = candidates(M, K, N, r, p, dtype, adapter_dtype, device, sets=4)
                    times = paired(calls, device, args.rounds)
                    for name, t in times.items():
                        row = {
                            "M": M,
                            "K": K,
                            "N": N,
                            "r": r,
                            "dropout": p,
                            "adapters": str(adapter_dtype)[6:],
                            "name": name,
                        }
                        row |= {"us": t.median, "us_20": t.q20, "us_80": t.q80}
                        row["over_frozen"] = t.median / times["frozen"].median
                        row["over_peft"] = t.median / times["peft"].median
                        rows.append(row)
                        print(
                            f"{shape:>18} {r:>4} {p:>5} {row['adapters']:>9} {name:>8} {t.median / 1e3:>9.3f} "
                            f"{t.q20 / 1e3:>8.3f}-{t.q80 / 1e3:>8.3f} {row['over_frozen']:>8.3f} {row['over_peft']:>6.3f}"
                        )
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"environment": environment(device), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
