"""Who lowrank is timed against on one LoRA linear, each optional and each given the same tensors.

frozen        the base linear alone
lowrank-KIND  adapters in the base's 16 bits, in fp32, in fp32 under autocast
peft-KIND     PEFT's layer, and peft-KIND-compiled under torch.compile
unsloth       unsloth.kernels.fast_lora.LoRA_W of an installed wheel (no dropout, 16-bit arithmetic)
lorafusion    the non-TMA Triton kernels of an installed LoRAFusion, in its own order (dropout only: without, its backward
              raises).  It has no licence: nothing of it is kept here.
"""

import importlib
import inspect
import random

import torch

from lowrank.measure.layer import SCALING, Method, Problem, Tensors, adapter_kinds, frozen, lowrank_method, peft_method

DEFAULT = ("frozen", "lowrank", "peft", "unsloth", "lorafusion")  # "peft-compiled" too where asked for


def methods(p: Problem, data: list[Tensors], peers=DEFAULT) -> tuple[dict[str, Method], dict[str, str]]:
    """({name: Method}, {name: why it is absent}).  "lowrank" and "peft" stand for one method per kind of adapter."""
    by_name: dict[str, Method] = {}
    absent: dict[str, str] = {}
    makers = {
        "frozen": lambda: {"frozen": frozen(p, data)},
        "lowrank": lambda: {f"lowrank-{kind}": lowrank_method(p, data, kind) for kind in adapter_kinds(p)},
        "peft": lambda: {f"peft-{kind}": peft_method(p, data, kind) for kind in adapter_kinds(p)},
        "peft-compiled": lambda: {
            f"peft-{kind}-compiled": peft_method(p, data, kind, compiled=True) for kind in adapter_kinds(p)
        },
        "unsloth": lambda: {"unsloth": unsloth(p, data)},
        "lorafusion": lambda: {"lorafusion": lorafusion(p, data)},
    }
    for name in peers:
        if name not in makers:
            raise ValueError(f"peer {name!r}: expected some of {', '.join(makers)}")
        try:
            by_name |= makers[name]()
        except Exception as error:  # other people's packages raise what they like on a machine they do not know
            absent[name] = f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}"
    return by_name, absent


def unsloth(p: Problem, data: list[Tensors]) -> Method:
    if p.dropout:
        raise ValueError("its fused functions have no dropout")
    before = _peft_forward()
    LoRA_W = importlib.import_module("unsloth.kernels.fast_lora").LoRA_W
    if _peft_forward() is not before:  # importing Unsloth patches other packages: PEFT is timed as PEFT wrote it
        importlib.import_module("peft.tuners.lora.layer").Linear.forward = before
    factors = _adapters(p, data)

    def forward(i):
        (x, W, *_), (A, B) = data[i % p.sets], factors[i % p.sets]
        return LoRA_W.apply(x.view(1, p.M, p.K), W, None, A, B, SCALING).view(p.M, p.N)

    return Method(forward, lambda i: [data[i % p.sets].x, *factors[i % p.sets]])


def lorafusion(p: Problem, data: list[Tensors]) -> Method:
    if not p.dropout:
        raise ValueError("its backward raises without dropout")
    package = "lorafusion.ops.triton_ops."
    drop = importlib.import_module(package + "dropout").seeded_dropout
    names = ("fused_lora_xw_sb", "fused_lora_dys_dyb", "fused_lora_dyw_dsa")
    xw_sb, dys_dyb, dyw_dsa = (_configured(getattr(importlib.import_module(package + n), n), n) for n in names)
    factors = _adapters(p, data)

    class Linear(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, W, A, B):
            dropped, mask = drop(x=x, p=p.dropout, seed=random.randrange(10**6), store_mask=True)
            S = dropped @ A.T
            ctx.save_for_backward(dropped, W, A, B, mask, S)
            return xw_sb(x=x, w=W, s=S, b=B, alpha=SCALING, bias=None)

        @staticmethod
        def backward(ctx, dY):
            dropped, W, A, B, mask, S = ctx.saved_tensors
            dB, dS = dys_dyb(dy=dY, b=B, s=S, alpha=SCALING)
            dX = dyw_dsa(dy=dY, w=W, ds=dS, a=A, dropout_p=p.dropout, dropout_mask=mask)
            return dX, None, dS.T @ dropped, dB

    def forward(i):
        (x, W, *_), (A, B) = data[i % p.sets], factors[i % p.sets]
        return Linear.apply(x, W, A, B)

    return Method(forward, lambda i: [data[i % p.sets].x, *factors[i % p.sets]])


def _configured(function, name: str):
    """With LoRAFusion's H100 table where the function takes one: its own look-up refuses GPUs it has no name for."""
    if "config" not in inspect.signature(function).parameters:
        return function
    config = getattr(importlib.import_module("lorafusion.ops.triton_ops.config").H100_CONFIG, name)
    return lambda **tensors: function(**tensors, config=config)


def _adapters(p: Problem, data: list[Tensors]) -> list[tuple]:
    dtype = getattr(torch, p.dtype)
    return [tuple(torch.nn.Parameter(t.to(dtype)) for t in (one.A, one.B)) for one in data]


def _peft_forward():
    try:
        return importlib.import_module("peft.tuners.lora.layer").Linear.forward
    except ImportError:
        return None
