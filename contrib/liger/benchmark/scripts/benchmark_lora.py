import torch

from benchmark_model_configs import MODEL_REGISTRY
from benchmark_model_configs import build_model_config_sweep
from benchmark_model_configs import build_token_length_sweep
from benchmark_model_configs import get_benchmark_model_config
from peft import LoraConfig
from peft import inject_adapter_in_model
from utils import SingleBenchmarkRunInput
from utils import build_memory_bench_fn
from utils import build_speed_bench_fn
from utils import parse_benchmark_script_args
from utils import run_benchmarks

from liger_kernel.transformers.lora import LigerLoRALinear
from liger_kernel.utils import infer_device

device = infer_device()


def setup_lora(input: SingleBenchmarkRunInput):
    """A hidden_size x hidden_size linear of the model with a LoRA, by PEFT and by Liger, and its input."""
    cfg = input.extra_benchmark_config
    if isinstance(input.x, str):
        model_cfg = MODEL_REGISTRY[input.x]
        seq_len, hidden_size, dtype = cfg["seq_len"], model_cfg.hidden_size, model_cfg.dtype
    else:
        seq_len, hidden_size, dtype = input.x, cfg["hidden_size"], cfg["dtype"]

    base = torch.nn.Linear(hidden_size, hidden_size, bias=False, device=device, dtype=dtype)
    x = torch.randn(cfg["bsz"], seq_len, hidden_size, device=device, dtype=dtype, requires_grad=True)
    if input.kernel_provider == "liger":
        layer = LigerLoRALinear(base, r=cfg["r"], lora_alpha=2 * cfg["r"])
    elif input.kernel_provider == "huggingface":
        config = LoraConfig(r=cfg["r"], lora_alpha=2 * cfg["r"], target_modules=["0"])
        layer = inject_adapter_in_model(config, torch.nn.Sequential(base)).to(dtype)
    elif input.kernel_provider == "frozen":  # what no LoRA can be faster than
        layer = base.requires_grad_(False)
    else:
        raise ValueError(f"Invalid provider: {input.kernel_provider} for LoRA")
    return x, layer


if __name__ == "__main__":
    args = parse_benchmark_script_args()
    common = dict(
        kernel_name="lora",
        setup_fn=setup_lora,
        model_keys=["hidden_size", "dtype"],
        extra_configs={"bsz": 1, "r": 16},
        probe_provider="huggingface",
        overwrite=args.overwrite,
    )
    if args.sweep_mode == "model_config":
        common_configs = build_model_config_sweep(probe_dim="T", bt=args.bt, **common)
    else:
        model = get_benchmark_model_config(args.model)
        common_configs = build_token_length_sweep(
            probe_x=1024, model=model, scale_dim="T", x_label="total tokens", **common
        )  # fmt: skip

    common_configs["kernel_providers"] = ["huggingface", "liger", "frozen"]

    run_benchmarks(
        bench_test_fn=build_speed_bench_fn(setup_lora),
        kernel_operation_modes=["forward", "backward", "full"],
        metric_name="speed",
        metric_unit="ms",
        **common_configs,
    )
    run_benchmarks(
        bench_test_fn=build_memory_bench_fn(setup_lora),
        kernel_operation_modes=["forward", "backward", "full"],
        metric_name="memory",
        metric_unit="MB",
        **common_configs,
    )
