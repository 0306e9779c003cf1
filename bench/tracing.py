"""What Dynamo's first call of a model costs per LoRA layer: PEFT's own layers and patched ones, in processes of their own.

python bench/tracing.py [--layers 48] [--rounds 5]
"""

import argparse
import statistics
import subprocess
import sys
import time

WAYS = {"no grad, eager": "eager", "forward+backward, aot_eager": "aot_eager"}


def first_call(patched: bool, backend: str, layers: int) -> float:
    """Milliseconds per layer, Dynamo's own start aside; with aot_eager, those of the backward too."""
    import torch
    from peft import LoraConfig, get_peft_model
    from torch import nn

    from lowrank.integrations.peft import patch

    torch.set_num_threads(1)
    grad = backend == "aot_eager"
    torch.compile(nn.Linear(4, 4), backend=backend)(torch.ones(1, 4)).sum().backward()
    torch._dynamo.reset()
    names = [str(i) for i in range(layers)]
    base = nn.Sequential(*[nn.Linear(32, 32) for _ in names])
    model = get_peft_model(base, LoraConfig(r=8, target_modules=names))
    compiled = torch.compile(patch(model) if patched else model, fullgraph=True, backend=backend)
    x = torch.randn(4, 32)
    start = time.perf_counter()
    with torch.set_grad_enabled(grad):
        y = compiled(x)
        if grad:
            y.sum().backward()
    return 1e3 * (time.perf_counter() - start) / layers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    print("ms per layer (median)          PEFT  lowrank  ratio (median of pairs; lowest-highest)")
    for way, backend in WAYS.items():
        pairs = [[in_a_process(patched, backend, args.layers) for patched in (False, True)] for _ in range(args.rounds)]
        peft_ms, lowrank_ms = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratios = sorted(lowrank / peft for peft, lowrank in pairs)
        spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})"
        print(f"{way:28} {peft_ms:7.1f} {lowrank_ms:8.1f}  {spread}")


def in_a_process(patched: bool, backend: str, layers: int) -> float:
    code = f"import runpy; print(runpy.run_path({__file__!r})['first_call']({patched}, {backend!r}, {layers}))"
    run = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    return float(run.stdout.split()[-1])


if __name__ == "__main__":
    main()
