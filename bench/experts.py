"""A mixture of experts with LoRA on its stacks: frozen, PEFT, PEFT patched by lowrank; a block of Qwen3-MoE, or a small model.

A Problem's M is tokens, K the hidden size and N an expert's; each token visits 8 of 128 experts (or of 64: experts_64).  Both
ways of transformers' are timed frozen, its loop ("eager") and torch's grouped_mm; PEFT over the faster for it, grouped_mm: in
the loop it forms all experts' weights once for each of them.  The model has four layers of it.
"""

import copy
from typing import NamedTuple

import torch
from torch import nn

from lowrank.measure.layer import SCALING, Method, Problem

TOP, LAYERS, VOCABULARY = 8, 4, 256


class Block(NamedTuple):
    """x and dY [M, K]; the frozen module, of a class with a config that says how its experts are computed."""

    x: torch.Tensor
    dY: torch.Tensor
    frozen: nn.Module


def experts_of(p: Problem, experts: int) -> tuple[int, int]:
    """(experts, those of a token), fewer of both at toy sizes."""
    return (experts, TOP) if p.M > 64 else (8, 2)


def config_of(p: Problem, experts: int):
    from transformers import Qwen3MoeConfig

    experts, top = experts_of(p, experts)
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=p.K,
        intermediate_size=p.N,
        moe_intermediate_size=p.N,
        num_experts=experts,
        num_experts_per_tok=top,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=max(8, p.K // 4),
        decoder_sparse_step=1,
        max_position_embeddings=max(p.M, 32),
    )
    config._experts_implementation = "grouped_mm"
    return config


def inputs(p: Problem, experts: int) -> list[Block]:
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    return [_frozen(p, Qwen3MoeSparseMoeBlock(config_of(p, experts)), (1, p.M, p.K)) for _ in range(p.sets)]


def model_inputs(p: Problem, experts: int) -> list[Block]:
    from transformers import Qwen3MoeForCausalLM

    return [_frozen(p, Qwen3MoeForCausalLM(config_of(p, experts)).model, (1, p.M, p.K)) for _ in range(p.sets)]


def _frozen(p: Problem, module: nn.Module, shape) -> Block:
    dtype = getattr(torch, p.dtype)
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    holder = nn.ModuleDict({"mlp": module}).to(p.device, dtype).requires_grad_(False).train()
    x, dY = (torch.randn(shape, device=p.device).to(dtype) for _ in range(2))
    return Block(x.requires_grad_(), dY, holder)


def methods(p: Problem, data: list[Block]) -> tuple[dict[str, Method], dict[str, str]]:
    """({name: Method}, {name: why it is absent}).  The adapted are copies: PEFT's forward counts as a write to its weights."""
    by_name = {
        name: _method(p, data, [_computing(_sharing(one.frozen), implementation) for one in data])
        for name, implementation in (("frozen", "grouped_mm"), ("frozen-eager", "eager"))
    }
    try:
        adapted = [_adapted(p, one.frozen) for one in data]
    except ImportError as error:
        return by_name, {"peft": str(error).splitlines()[0]}
    by_name["peft"] = _method(p, data, adapted)
    by_name["lowrank"] = _method(p, data, [_patched(holder) for holder in adapted])
    return by_name, {}


def _computing(holder: nn.Module, implementation: str) -> nn.Module:
    config = copy.deepcopy(next(m.config for m in holder.modules() if hasattr(m, "is_transposed")))
    config._experts_implementation = implementation
    for module in holder.modules():
        if hasattr(module, "is_transposed"):
            module.config = config
    return holder


def _adapted(p: Problem, holder: nn.Module) -> nn.Module:
    from peft import LoraConfig, inject_adapter_in_model

    targets = ["experts.gate_up_proj", "experts.down_proj"]
    config = LoraConfig(
        r=p.r, lora_alpha=SCALING * p.r, init_lora_weights=False, target_modules=[], target_parameters=targets
    )
    holder = inject_adapter_in_model(config, copy.deepcopy(holder)).train()
    for name, parameter in holder.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_" in name:
            parameter.data = parameter.data.to(getattr(torch, p.thin_dtype))
    return holder


def _patched(holder: nn.Module) -> nn.Module:
    from lowrank.integrations.peft import patch

    return patch(copy.deepcopy(holder))


def _sharing(module: nn.Module) -> nn.Module:
    """A copy whose parameters are the same tensors."""
    return copy.deepcopy(module, {id(parameter): parameter for parameter in module.parameters()})


def _method(p: Problem, data: list[Block], holders: list[nn.Module]) -> Method:
    def forward(i):
        x, module = data[i % p.sets].x, holders[i % p.sets]["mlp"]
        y = module(inputs_embeds=x, use_cache=False) if hasattr(module, "embed_tokens") else module(x)
        return y[0] if isinstance(y, tuple) else getattr(y, "last_hidden_state", y)

    trained = [[t for t in holder.parameters() if t.requires_grad] for holder in holders]
    return Method(forward, lambda i: [data[i % p.sets].x, *trained[i % p.sets]])


def bytes_of(p: Problem, mode: str, experts: int, layers: int = 1) -> int:
    """The stacks, the adapters, and the block's own input and output, or their gradients: what no fusion could avoid."""
    count, _ = experts_of(p, experts)
    size, thin = getattr(torch, p.dtype).itemsize, getattr(torch, p.thin_dtype).itemsize
    stacks, factors = count * 3 * p.K * p.N, count * p.r * (2 * p.K + 3 * p.N)
    once = layers * (size * (stacks + 2 * p.M * p.K) + thin * factors)
    return once * {"forward": 1, "backward": 1, "both": 2}[mode]


def flops(p: Problem, mode: str, experts: int, layers: int = 1) -> int:
    """The experts' products of the rows that come to them, and their adapters'; backward the gradients of x and of adapters."""
    _, top = experts_of(p, experts)
    rows = layers * p.M * top
    base, thin = 2 * rows * 3 * p.K * p.N, 2 * rows * p.r * (2 * p.K + 3 * p.N)
    return {"forward": base + thin, "backward": base + 2 * thin, "both": 2 * base + 3 * thin}[mode]
