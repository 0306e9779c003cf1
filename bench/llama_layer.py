"""One Llama decoder layer from transformers with adapters on its seven linears: frozen, PEFT, PEFT patched by lowrank.

A Problem's K is the hidden size and its N the MLP's; 4096 and 14336 are Llama-3.1-8B's.  Rows are sequences of at most 2048.
"""

import copy
from typing import NamedTuple

import torch
from torch import nn

from lowrank.measure.layer import SCALING, Method, Problem

SEQUENCE = 2048
HEAD = 128


class Layer(NamedTuple):
    """x and dY [B, T, K] and the frozen layer; the rotary embedding's cos and sin for T positions."""

    x: torch.Tensor
    dY: torch.Tensor
    frozen: nn.Module
    rotary: tuple[torch.Tensor, torch.Tensor]


def sizes(p: Problem) -> tuple[int, int, int, int, list[tuple[int, int]]]:
    """(sequences, tokens in each, heads, key-value heads, (in, out) of the seven linears)."""
    tokens = min(p.M, SEQUENCE)
    if p.M % tokens:
        raise ValueError(f"llama_layer: M must be a multiple of {SEQUENCE} or less than it, got {p.M}")
    head = min(HEAD, p.K // 4)
    heads = p.K // head
    key_values = max(1, heads // 4)
    attention = [(p.K, p.K), (p.K, key_values * head), (p.K, key_values * head), (p.K, p.K)]
    return p.M // tokens, tokens, heads, key_values, [*attention, (p.K, p.N), (p.K, p.N), (p.N, p.K)]


def inputs(p: Problem) -> list[Layer]:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    sequences, tokens, heads, key_values, _ = sizes(p)
    config = LlamaConfig(
        hidden_size=p.K,
        intermediate_size=p.N,
        num_attention_heads=heads,
        num_key_value_heads=key_values,
        num_hidden_layers=1,
        max_position_embeddings=tokens,
        attn_implementation="sdpa",
    )
    dtype, sets = getattr(torch, p.dtype), []
    positions = torch.arange(tokens, device=p.device)[None]
    for _ in range(p.sets):
        with torch.device(p.device):
            layer = LlamaDecoderLayer(config, layer_idx=0).to(dtype).requires_grad_(False).train()
            for weight in (m.weight for m in layer.modules() if isinstance(m, nn.Linear)):
                nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
            x, dY = (torch.randn(sequences, tokens, p.K).to(dtype) for _ in range(2))
            rotary = LlamaRotaryEmbedding(config)(x, positions)
        sets.append(Layer(x.requires_grad_(), dY, layer, rotary))
    return sets


def methods(p: Problem, data: list[Layer]) -> tuple[dict[str, Method], dict[str, str]]:
    """({name: Method}, {name: why it is absent}).  All copies share one set of parameters."""
    by_name = {"frozen": _method(p, data, [one.frozen for one in data], "")}
    try:
        kinds = ("fp32",) if p.dtype == "float32" else ("16bit", "fp32-autocast")
        for kind in kinds:
            adapted = [_adapted(p, one.frozen, kind) for one in data]
            by_name[f"peft-{kind}"] = _method(p, data, adapted, kind)
            by_name[f"lowrank-{kind}"] = _method(p, data, [_patched(layer) for layer in adapted], kind)
    except ImportError as error:
        return {"frozen": by_name["frozen"]}, {"peft": str(error).splitlines()[0]}
    return by_name, {}


def _adapted(p: Problem, layer: nn.Module, kind: str) -> nn.Module:
    from peft import LoraConfig, inject_adapter_in_model

    names = [name for name, m in layer.named_modules() if isinstance(m, nn.Linear)]
    config = LoraConfig(
        r=p.r, lora_alpha=SCALING * p.r, lora_dropout=p.dropout, init_lora_weights=False, target_modules=names
    )
    layer = inject_adapter_in_model(config, _sharing(layer)).train()
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_" in name:
            parameter.data = parameter.data.to(getattr(torch, p.dtype) if kind == "16bit" else torch.float32)
    return layer


def _patched(layer: nn.Module) -> nn.Module:
    from lowrank.integrations.peft import patch

    return patch(_sharing(layer))


def _sharing(layer: nn.Module) -> nn.Module:
    """A copy whose parameters are the same tensors."""
    return copy.deepcopy(layer, {id(parameter): parameter for parameter in layer.parameters()})


def _method(p: Problem, data: list[Layer], layers: list[nn.Module], kind: str) -> Method:
    def forward(i):
        one, layer = data[i % p.sets], layers[i % p.sets]
        with torch.autocast(torch.device(p.device).type, getattr(torch, p.dtype), enabled=kind == "fp32-autocast"):
            y = layer(one.x, position_embeddings=one.rotary)
        return y[0] if isinstance(y, tuple) else y

    trained = [[t for t in layer.parameters() if t.requires_grad] for layer in layers]
    return Method(forward, lambda i: [data[i % p.sets].x, *trained[i % p.sets]])


def bytes_of(p: Problem, mode: str) -> int:
    """Weights, adapters, and the layer's own input and output, or their gradients: what no fusion could avoid."""
    linears = sizes(p)[-1]
    weights = sum(K * N + p.r * (K + N) for K, N in linears)
    size = getattr(torch, p.dtype).itemsize
    return size * (weights + 2 * p.M * p.K) * {"forward": 1, "backward": 1, "both": 2}[mode]


def flops(p: Problem, mode: str) -> int:
    """The linears, the adapters, and causal attention: 2 M T K forward (half of the square), twice that backward."""
    _, tokens, _, _, linears = sizes(p)
    base = sum(2 * p.M * K * N for K, N in linears)
    thin = sum(2 * p.M * p.r * (K + N) for K, N in linears)
    attention = 2 * p.M * tokens * p.K
    forward, backward = base + thin + attention, base + 2 * thin + 2 * attention
    return {"forward": forward, "backward": backward, "both": forward + backward}[mode]
