"""Memory and FLOPs of fine-tuning a model, computed from its config alone.

The model is built on the meta device and really run forward there, with a loss, as a trainer calls it: parameters are
counted from the modules, and activations are the distinct storages that autograd keeps for backward.  Nothing about an
architecture is written down but the built-in configs (models.py).  What a meta run cannot know is stated in ASSUMPTIONS.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from .._linears import attention_layers, expert_stacks, is_linear
from ..ops.svf import cheapest
from . import meta_forward
from .meta_forward import Setting

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# What PyTorch reports as total memory on such a card, GiB; a tenth is left to the context, workspaces, fragmentation.
CARDS = {"24 GB": 23.6, "80 GB": 79.1, "141 GB": 139.7}
USABLE = 0.9
# NF4 in blocks of 64 with one absmax each, itself quantised to 8 bits in blocks of 256 (QLoRA's double quantisation).
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
# Of each 1024 weights a file of lowrank.delta has a bitmap and two bytes (csrc/delta.h), where a fifth has changed.
DELTA_BYTES = 1 / 8 + 2 / 1024
CHECKPOINTING = "+checkpointing"
ASSUMPTIONS = (
    "Computed, not measured; `lowrank compare` measures, with the same defaults.",
    "Activations: what autograd keeps for backward on {device}, loss and its fp32 logits included; {attention}; "
    "one micro-batch, no padding.",
    "AdamW: two fp32 moments{master}.  Adapters: {adapter_dtype}{autocast}.",
    f"GPUs: everything sharded evenly, {USABLE:.0%} of each card usable: a lower bound (no workspace, no gathered "
    "layer, no logit gradients).",
)

Prepare = Callable[["PreTrainedModel", Setting], nn.Module]


@dataclass(frozen=True)
class Method:
    """What trains.  phases: one after another, each (model, setting) -> the model with what trains requiring grad."""

    phases: tuple[Prepare, ...]
    subnetwork: float | None = None  # share of all weights that trains
    nf4: bool = False
    ranked: bool = False  # takes a rank of its own: lora:64
    note: str | None = None


def _full(model: "PreTrainedModel", setting: Setting) -> nn.Module:
    return model


def _linears(model: "PreTrainedModel") -> list[str]:
    head = model.get_output_embeddings()
    names = [name for name, module in model.named_modules() if is_linear(module) and module is not head]
    if not names:
        raise ValueError(f"{type(model).__name__} has no linear layers to adapt: not supported")
    return names


def _all_linear(model: "PreTrainedModel") -> list[str] | str:
    """Of a mixture what PEFT makes of "all-linear", its routers among it."""
    names = _linears(model)
    return "all-linear" if expert_stacks(model) else names


def _lora(model: "PreTrainedModel", setting: Setting) -> nn.Module:
    return meta_forward.add_lora(model, _all_linear(model), setting, expert_stacks(model))


def _lora_attention(model: "PreTrainedModel", setting: Setting) -> nn.Module:
    return meta_forward.add_lora(model, attention_layers(model), setting)


def _lora_mlp(model: "PreTrainedModel", setting: Setting) -> nn.Module:
    attention = set(attention_layers(model))
    others = [name for name in _linears(model) if name not in attention]
    stacks = expert_stacks(model)
    if not others and not stacks:
        raise ValueError(f"{type(model).__name__} has no linear layers but those of attention")
    return meta_forward.add_lora(model, others, setting, stacks)


def _peft_lora(model: "PreTrainedModel", setting: Setting) -> nn.Module:
    return meta_forward.add_lora(model, _all_linear(model), setting, expert_stacks(model), run_by="peft")


def _svf(model: "PreTrainedModel", setting: Setting) -> nn.Module:
    return meta_forward.add_svf(model, 4 * setting.rank)


def _svf_full(model: "PreTrainedModel", setting: Setting) -> nn.Module:
    return meta_forward.add_svf(model, None)


# `lowrank compare`'s, by the same names, and qlora
METHODS = {
    "full": Method((_full,)),
    "full-masked": Method(
        (_full,),
        subnetwork=0.2,
        note="full-masked: 20 % of the weights train, gradients are of all; the run that finds them needs what full does; "
        "the file is at most.",
    ),
    "lora": Method((_lora,), ranked=True),
    "lora-attention": Method((_lora_attention,), ranked=True),
    "lora-mlp": Method((_lora_mlp,), ranked=True),
    "peft-lora": Method((_peft_lora,), ranked=True),
    "full→lora": Method(
        (_full, _lora),
        ranked=True,
        note="full→lora: half of the steps each; memory of the larger phase, files of both.",
    ),
    "svf": Method((_svf,), note="svf: four singular values per rank."),
    "svf-full": Method((_svf_full,)),
    "qlora": Method(
        (_peft_lora,),
        nf4=True,
        ranked=True,
        note="qlora: NF4 with double quantisation, output head and embeddings in {dtype}; PEFT's layers.",
    ),
}
ALIASES = {"full-lora": "full→lora"}  # what a keyboard types
TYPED = tuple({name: alias for alias, name in ALIASES.items()}.get(name, name) for name in METHODS)
CHECKPOINTED = ("full", "lora")  # those with a second row by default
ROWS = tuple(row for name in METHODS for row in (name, *([name + CHECKPOINTING] if name in CHECKPOINTED else [])))


@dataclass(frozen=True)
class Row:
    """A method as it is asked for: lora, lora:64, lora:64+checkpointing."""

    name: str
    method: Method
    rank: int | None = None
    checkpointing: bool = False


def row_of(text: str) -> Row:
    """Raises ValueError for what is none."""
    rest, plus, _ = text.partition(CHECKPOINTING) if text.endswith(CHECKPOINTING) else (text, "", "")
    name, colon, rank = rest.partition(":")
    name = ALIASES.get(name, name)
    if name not in METHODS:
        raise ValueError(f"unknown method {text!r}; expected some of {', '.join(TYPED)}, also with {CHECKPOINTING}")
    if colon and not (METHODS[name].ranked and rank.isdigit() and int(rank) > 0):
        raise ValueError(f"{text!r}: expected a method alone, or a LoRA method and its rank, as in lora:64")
    return Row(name + colon + rank + plus, METHODS[name], int(rank) if colon else None, bool(plus))


@dataclass(frozen=True)
class Estimate:
    """Bytes, parameter counts, and FLOPs per token of one row.

    checkpoint: bytes of the tensors in the files that are kept beside the original model.

    flops_per_token: training, forward and backward, with N the weights of every linear layer (the output head included,
    tied or not), n those of the adapters, m those of SVF's factors, D the attention width (heads x head size), T the tokens,
    L the layers:

        full   6 N + 6 T D L            weights: forward 2, their inputs' gradients 2, their own gradients 2
        lora   4 N + 6 n + 6 T D L      causal attention: forward 2 T D L (half of the square), backward twice that
        svf    4 N + 4 m + 6 T D L      of all singular values: what lowrank.ops.svf.cheapest picks

    Of experts' weights N has what a token visits, and n of their adapters; a scan's elementwise work is in none of them.

    Gradient checkpointing adds one forward of everything between the embedding and the head.
    fused: whether attention is; where it is not, [T,T] are kept and all of T D L is computed.
    """

    method: str
    parameters: int
    trainable: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    checkpoint: int
    flops_per_token: int
    fused: bool = True

    @property
    def total(self) -> int:
        """Bytes of weights + gradients + optimizer + activations."""
        return self.weights + self.gradients + self.optimizer + self.activations

    def gpus(self) -> dict[str, int]:
        """How many cards of each kind hold an even share of `total`."""
        return {card: math.ceil(self.total / (USABLE * gib * 2**30)) for card, gib in CARDS.items()}


def estimate(config: "PretrainedConfig", row: Row, setting: Setting) -> Estimate:
    """What one training step of the row's method on the model of `config` keeps in memory and computes."""
    setting = setting if row.rank is None else replace(setting, rank=row.rank)
    phases = [_phase(config, row, prepare, setting) for prepare in row.method.phases]
    return replace(
        max(phases, key=lambda phase: phase.total),
        trainable=max(phase.trainable for phase in phases),
        checkpoint=sum(phase.checkpoint for phase in phases),
        flops_per_token=sum(phase.flops_per_token for phase in phases) // len(phases),
    )


def _phase(config: "PretrainedConfig", row: Row, prepare: Prepare, setting: Setting) -> Estimate:
    dtype, method = getattr(torch, setting.dtype), row.method
    model = meta_forward.build(config, dtype)
    head, fused = model.get_output_embeddings(), meta_forward.is_fused(model)
    matmul, _ = meta_forward.macs_per_token(model)
    parameters = sum(p.numel() for p in model.parameters())
    saved_by_nf4 = 0
    if method.nf4:
        quantised = sum(model.get_submodule(name).weight.numel() for name in _linears(model))
        saved_by_nf4 = quantised * dtype.itemsize - round(quantised * NF4_BYTES)
    model = prepare(model, setting)
    trained = [p for p in model.parameters() if p.requires_grad]
    every = sum(p.numel() for p in trained)
    trainable, gradients = round((method.subnetwork or 1) * every), sum(p.nbytes for p in trained)
    masters = 0 if setting.in_place else sum(4 * p.numel() for p in trained if p.dtype.itemsize == 2)
    masks, checkpoint = 0, gradients
    if method.subnetwork is not None:
        masks = every // 8
        checkpoint = round(method.subnetwork * gradients + every * DELTA_BYTES)
    run = meta_forward.forward(model, setting)
    rows = setting.batch * setting.seq
    attention = run.attention_flops // rows
    forward, backward = _linear_flops(model, matmul, meta_forward.visited(model, trained), rows)
    flops = 3 * attention + forward + backward
    if row.checkpointing:
        flops += attention + forward - (2 * head.weight.numel() if head is not None else 0)
    return Estimate(
        method=row.name,
        parameters=parameters,
        trainable=trainable,
        weights=sum(t.nbytes for t in (*model.parameters(), *model.buffers())) - saved_by_nf4,
        gradients=gradients,
        optimizer=8 * trainable + masters + masks,
        activations=run.checkpointed_bytes if row.checkpointing else run.saved_bytes,
        checkpoint=checkpoint,
        flops_per_token=flops,
        fused=fused,
    )


def _linear_flops(model: nn.Module, matmul: int, trained: int, rows: int) -> tuple[int, int]:
    """(forward, backward) per token of the products with linear layers' weights and their adapters."""
    if all(p.requires_grad for p in model.parameters()):
        return 2 * matmul, 4 * matmul
    layers = meta_forward.svf_layers(model)
    if not layers:
        return 2 * matmul + 2 * trained, 2 * matmul + 4 * trained
    forward = backward = 2 * matmul
    for layer in layers:
        N, K, k = layer.out_features, layer.in_features, layer.k
        mode = cheapest(N, K, k, rows, cached=True)
        if mode == "merged":  # made once, and its gradient is projected once
            backward += 2 * N * K + 4 * N * K * k // rows
            continue
        beside = 2 * k * (N + K) - (2 * N * K if mode == "activation" else 0)
        forward, backward = forward + beside, backward + beside
    return forward, backward


def estimate_all(
    config: "PretrainedConfig", rows: Iterable[Row], setting: Setting
) -> tuple[list[Estimate], dict[str, str]]:
    """Every row's estimate, and {row: why not} of those that this model cannot have.  Raises ValueError if none can."""
    estimates, not_done = [], {}
    for row in rows:
        try:
            estimates.append(estimate(config, row, setting))
        except ValueError as error:
            not_done[row.name] = " ".join(str(error).split())
    if not estimates:
        raise ValueError(next(iter(not_done.values())))
    return estimates, not_done
