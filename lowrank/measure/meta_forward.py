"""One forward pass of a transformers model on the meta device: what autograd would keep, without memory or weights."""

import contextlib
import copy
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from .._linears import is_matrix, target_layers, weight_shape
from .saved import SavedActivations, storage_bytes

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PretrainedConfig, PreTrainedModel

    from ..nn import SVFLinear


@dataclass(frozen=True)
class Setting:
    """A training step on one micro-batch of `batch` sequences of `seq` tokens.  dtypes by torch name."""

    batch: int = 1
    seq: int = 2048
    rank: int = 16
    dtype: str = "bfloat16"
    adapter_dtype: str = "float32"
    dropout: float = 0.0
    autocast: bool = False  # every linear layer in `dtype`, whatever its weights' is
    in_place: bool = False  # 16-bit weights train without fp32 masters (which count with the optimizer)
    device: str = "cuda"  # "cuda" | "cpu": decides what nn.Dropout saves

    def __post_init__(self) -> None:
        for name in ("batch", "seq", "rank"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} must be a positive integer, got {value}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")


@dataclass(frozen=True)
class Run:
    """Bytes of the distinct storages kept for backward, parameters and buffers excluded; the same at the peak with
    gradient checkpointing; and the FLOPs of attention's two forward products, causal ones counted half where a fused kernel
    skips the other."""

    saved_bytes: int
    checkpointed_bytes: int
    attention_flops: int


def build(config: "PretrainedConfig", dtype: torch.dtype) -> "PreTrainedModel":
    """A trainable model of `config` on the meta device, with fused attention if it has one and its own code if not."""
    from transformers import AutoModelForCausalLM

    refused = None
    for attention in ("sdpa", "eager"):
        try:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(
                    copy.deepcopy(config), dtype=dtype, attn_implementation=attention
                )
            return model.train()
        except (ValueError, ImportError) as error:
            refused = error
    # transformers lists every class it knows, over many lines
    raise ValueError(f"transformers builds no causal language model: {str(refused).splitlines()[0]}") from refused


def is_fused(model: "PreTrainedModel") -> bool:
    """Whether the model's attention runs in fused kernels."""
    return model.config._attn_implementation == "sdpa"


def macs_per_token(model: "PreTrainedModel") -> tuple[int, int]:
    """Multiplications that one token makes with the model's matrices: all of them, and those with experts' alone.

    Linear layers, routers, convolutions along the tokens, and of a stack [E, ...] of experts the share that a token visits.
    """
    every = experts = 0
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            if isinstance(module, torch.nn.Conv1d) and name == "weight":
                every += p.numel()
            elif p.dim() == 3 and is_matrix(module, name, p):
                visited = p.numel() * experts_per_token(model) // p.shape[0]
                every, experts = every + visited, experts + visited
            elif is_matrix(module, name, p):
                every += p.numel()
    return every, experts


def experts_per_token(model: "PreTrainedModel") -> int:
    """What the model's config says.  Raises ValueError where it does not."""
    config = model.config.get_text_config()
    for name in ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"):
        if isinstance(experts := getattr(config, name, None), int):
            return experts
    raise ValueError(
        f"{type(model).__name__} has weights of more than two dimensions, and its config does not say how many experts a "
        "token visits: not supported"
    )


def visited(model: Any, trained: list[torch.nn.Parameter]) -> int:
    """Of the trained weights those that one token visits: of the experts' adapters the experts' share."""
    wrappers: list[Any] = [module for module in model.modules() if hasattr(module, "parameter_name")]
    beside = {
        id(factor.weight): wrapper.num_experts
        for wrapper in wrappers
        for factors in (wrapper.lora_A, wrapper.lora_B)
        for factor in factors.values()
    }
    return sum(p.numel() * experts_per_token(model) // beside[id(p)] if id(p) in beside else p.numel() for p in trained)


def add_lora(
    model: "PreTrainedModel",
    targets: list[str] | str,
    setting: Setting,
    stacks: Sequence[str] = (),
    *,
    run_by: str = "lowrank",
) -> "PeftModel":
    """The model with LoRA on the modules in `targets` and the experts in `stacks`, computed by PEFT's layers or lowrank's."""
    try:
        import peft
    except ImportError as error:
        raise ImportError("the LoRA methods need PEFT: pip install 'lowrank-kernels[peft]'") from error
    config = peft.LoraConfig(
        r=setting.rank,
        lora_alpha=setting.rank,
        lora_dropout=setting.dropout,
        target_modules=targets,
        target_parameters=list(stacks) or None,
    )
    with torch.device("meta"):
        if run_by == "lowrank":
            import lowrank

            model = lowrank.adapt(model, config)
        else:
            model = peft.get_peft_model(model, config)
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.to(getattr(torch, setting.adapter_dtype))
    return model


def add_svf(model: "PreTrainedModel", k: int | None) -> torch.nn.Module:
    """The model with the k largest singular values of its linear layers scaled; all where k is None."""
    import lowrank

    if k is not None:
        k = min(k, *(min(weight_shape(layer)) for layer in target_layers(model).values()))
    return lowrank.adapt(model, lowrank.SVFConfig(k=k))


def svf_layers(model: torch.nn.Module) -> list["SVFLinear"]:
    from ..nn import SVFLinear

    return [module for module in model.modules() if isinstance(module, SVFLinear)]


def forward(model: torch.nn.Module, setting: Setting) -> Run:
    """Run the model with labels on [batch, seq] tokens and count."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    saved = SavedActivations((*model.parameters(), *model.buffers()), hold=True)
    blocks: list[list[int]] = []  # per decoder block: bytes of its input, bytes saved inside it

    def enter(_, args):
        blocks.append([args[0].untyped_storage().nbytes(), -saved.bytes])

    def leave(layer, *_):
        blocks[-1][1] += saved.bytes - _merged_bytes(layer)

    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    hooks = [layer.register_forward_pre_hook(enter) for layer in layers]
    hooks += [layer.register_forward_hook(leave) for layer in layers]
    tokens = torch.zeros(setting.batch, setting.seq, dtype=torch.long, device="meta")
    mode = _AsOnDevice(setting.device, getattr(torch, setting.dtype) if setting.autocast else None)
    try:
        with mode, saved, _peft_on_meta():
            model(input_ids=tokens, labels=tokens, use_cache=False)
    except (RuntimeError, NotImplementedError) as error:  # e.g. shapes that depend on values
        reason = str(error).splitlines()[0]
        raise ValueError(f"{type(model).__name__} does not run on the meta device: {reason}") from error
    finally:
        for hook in hooks:
            hook.remove()
    inside = sum(block[1] for block in blocks)
    # Backward reaches the blocks after the head is freed: the peak is at the loss or in one recomputed block.
    peak = max([saved.bytes - inside] + [block[1] + _merged_bytes(model) for block in blocks])
    return Run(saved.bytes, sum(block[0] for block in blocks) + peak, mode.attention_flops)


@contextlib.contextmanager
def _peft_on_meta() -> Iterator[None]:
    """PEFT turns autocast off around its merging of experts, which torch does not offer for the meta device."""
    layer = sys.modules.get("peft.tuners.lora.layer")
    proxy = getattr(layer, "_LoraFactorsProxy", None)
    if proxy is None:
        yield
        return

    def merged(self, W):
        with torch._C.DisableTorchFunction():  # no product of attention
            return torch.baddbmm(W, self.lhs, self.rhs, alpha=self.scaling)

    before, proxy.forward = proxy.forward, merged
    try:
        yield
    finally:
        proxy.forward = before


def _merged_bytes(module: torch.nn.Module) -> int:
    """Of the weights that SVF's layers have made and keep until the step, checkpointing or not."""
    return storage_bytes(layer._cache.weight for layer in svf_layers(module) if layer._cache is not None)


_GROUPED = {getattr(F, "grouped_mm", None), getattr(torch, "_grouped_mm", None)} - {None}
_PRODUCTS = {torch.matmul: 0, torch.Tensor.matmul: 0, torch.bmm: 0, torch.baddbmm: 1, torch.Tensor.baddbmm: 1}


class _AsOnDevice(TorchFunctionMode):
    """Makes the meta device save what `device` would, where the two differ."""

    def __init__(self, device: str, autocast: torch.dtype | None):
        self.device, self.autocast = device, autocast
        self.fused_flops = self.product_flops = 0
        super().__init__()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        if function in _GROUPED:
            return _GroupedProducts.apply(*args[:2], kwargs.get("offs"))
        if function is F.dropout and self.device == "cuda":  # one byte per element; elsewhere the scaled mask
            return self._dropout(*args, **kwargs)
        if function is F.linear and self.autocast and not self.autocast == args[0].dtype == args[1].dtype:
            args = [t if t is None else t.to(self.autocast) for t in args]
        if function is torch.Tensor.__bool__:
            return True  # transformers asks whether the batch is unpadded and unpacked
        out = function(*args, **kwargs)
        if function in _PRODUCTS:
            self._count(out, kwargs.get("batch1", None), *args[_PRODUCTS[function] :])
        return out

    @property
    def attention_flops(self) -> int:
        """Of fused attention; of products of two activations where the model calls none."""
        return self.fused_flops or self.product_flops

    def _count(self, out, named, *factors) -> None:
        left = factors[0] if named is None else named
        if out.dim() > 2 and not any(isinstance(t, torch.nn.Parameter) for t in factors):
            self.product_flops += 2 * out.numel() * left.shape[-1]

    def _attention(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **_):
        # [..., H, T, D]
        products = 4 * query.numel() * key.shape[-2]
        self.fused_flops += products // 2 if is_causal else products
        return _FusedAttention.apply(query, key, value, attn_mask)

    def _dropout(self, input, p=0.5, training=True, inplace=False):
        return torch.native_dropout(input, p, True)[0] if training and p else input


class _GroupedProducts(torch.autograd.Function):
    """What torch's grouped product of rows [S, K] with a stack [E, K, N] keeps, in the dtypes its meta kernel refuses too."""

    @staticmethod
    def forward(ctx, rows, stack, offsets):
        ctx.save_for_backward(rows if stack.requires_grad else None, stack, offsets)
        return rows.new_empty(rows.shape[0], stack.shape[-1])


class _FusedAttention(torch.autograd.Function):
    """What the fused attention kernels keep: their inputs, the output [B,T,H,D] and the log-sum-exp [B,H,T]."""

    @staticmethod
    def forward(ctx, query, key, value, mask):
        batch, heads, tokens, _ = query.shape
        out = query.new_empty(batch, tokens, heads, value.shape[-1]).transpose(1, 2)
        lse = query.new_empty(batch, heads, tokens, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, mask, out, lse)
        return out
