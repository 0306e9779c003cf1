"""One forward pass of a transformers model on the meta device: what autograd would keep, without memory or weights."""

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True)
class Run:
    """Bytes of the distinct storages kept for backward, parameters and buffers excluded; the same at the peak with
    gradient checkpointing; and the FLOPs of attention's two forward products, causal ones counted half."""

    saved_bytes: int
    checkpointed_bytes: int
    attention_flops: int


def build(config, dtype: torch.dtype):
    """A trainable model of `config` on the meta device."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        try:
            model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype, attn_implementation="sdpa")
        except ValueError as error:  # transformers lists every class it knows, over many lines
            raise ValueError(f"transformers builds no causal language model: {str(error).splitlines()[0]}") from error
    if any(
        p.dim() > 2 for p in model.parameters()
    ):  # fused experts, convolutions: what they compute is not in the shape
        raise ValueError(f"{type(model).__name__} has weights of more than two dimensions (experts?): not supported")
    return model.train()


def add_lora(model, targets: list[str], setting, *, run_by: str, dtype: torch.dtype):
    """The model with LoRA on the modules named in `targets`, computed by PEFT's layers or by lowrank's."""
    try:
        import peft
    except ImportError as error:
        raise ImportError("the LoRA methods need PEFT: pip install 'lowrank-kernels[peft]'") from error
    config = peft.LoraConfig(
        r=setting.rank, lora_alpha=setting.rank, lora_dropout=setting.dropout, target_modules=targets
    )
    if run_by == "lowrank":
        import lowrank

        model = lowrank.adapt(model, config)
    else:
        model = peft.get_peft_model(model, config)
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.to(dtype)
    return model


def forward(model, setting, *, compute_dtype: torch.dtype) -> Run:
    """Run the model with labels on [batch, seq] tokens and count."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    owned = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    saved: dict[int, torch.UntypedStorage] = {}  # holds the storages, so that no address is used twice
    blocks: list[list[int]] = []  # per decoder block: bytes of its input, bytes saved inside it

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in owned:
            saved.setdefault(storage._cdata, storage)
        return tensor

    def total() -> int:
        return sum(storage.nbytes() for storage in saved.values())

    def enter(_, args):
        blocks.append([args[0].untyped_storage().nbytes(), -total()])

    def leave(*_):
        blocks[-1][1] += total()

    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    hooks = [layer.register_forward_pre_hook(enter) for layer in layers]
    hooks += [layer.register_forward_hook(leave) for layer in layers]
    tokens = torch.zeros(setting.batch, setting.seq, dtype=torch.long, device="meta")
    mode = _AsOnDevice(setting.device, compute_dtype)
    try:
        with mode, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(input_ids=tokens, labels=tokens, use_cache=False)
    except (RuntimeError, NotImplementedError) as error:  # e.g. shapes that depend on values
        reason = str(error).splitlines()[0]
        raise ValueError(f"{type(model).__name__} does not run on the meta device: {reason}") from error
    finally:
        for hook in hooks:
            hook.remove()
    inside = sum(block[1] for block in blocks)
    # Backward reaches the blocks after the head is freed: the peak is at the loss or in one recomputed block.
    peak = max([total() - inside] + [block[1] for block in blocks])
    return Run(total(), sum(block[0] for block in blocks) + peak, mode.attention_flops)


class _AsOnDevice(TorchFunctionMode):
    """Makes the meta device save what `device` would, where the two differ."""

    def __init__(self, device: str, compute_dtype: torch.dtype):
        self.device, self.compute_dtype = device, compute_dtype
        self.attention_flops = 0
        super().__init__()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        if function is F.dropout and self.device == "cuda":  # one byte per element; elsewhere the scaled mask
            return self._dropout(*args, **kwargs)
        if function is F.linear and not self.compute_dtype == args[0].dtype == args[1].dtype:
            args = [t if t is None else t.to(self.compute_dtype) for t in args]  # autocast, as trainers run it
        if function is torch.Tensor.__bool__:
            return True  # transformers asks whether the batch is unpadded and unpacked
        return function(*args, **kwargs)

    def _attention(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **_):
        # [..., H, T, D]
        products = 4 * query.numel() * key.shape[-2]
        self.attention_flops += products // 2 if is_causal else products
        return _FusedAttention.apply(query, key, value, attn_mask)

    def _dropout(self, input, p=0.5, training=True, inplace=False):
        return torch.native_dropout(input, p, True)[0] if training and p else input


class _FusedAttention(torch.autograd.Function):
    """What the fused attention kernels keep: their inputs, the output [B,T,H,D] and the log-sum-exp [B,H,T]."""

    @staticmethod
    def forward(ctx, query, key, value, mask):
        batch, heads, tokens, _ = query.shape
        out = query.new_empty(batch, tokens, heads, value.shape[-1]).transpose(1, 2)
        lse = query.new_empty(batch, heads, tokens, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, mask, out, lse)
        return out
