"""TRL's trainers on ``lowrank.linear_logprob``: ``patch()`` before the trainer is made, then a LoRA on lm_head trains too.

TRL gives its models a fused head (``add_fused_lm_head``: GRPO, RLOO, SFT, DPO and KTO) that scores hidden states against
``lm_head.weight``, and refuses a PEFT adapter on the head, which would be ignored.  ``patch()`` puts a function in its place
that runs TRL's own code over our op, with whatever LoRA the head has at each call, and makes the trainers refuse only the
heads that it cannot apply.  A call that the op does not cover goes to TRL's, is counted in ``lowrank.stats()`` and warns once
per reason; with a LoRA on the head, which TRL's would ignore, it raises instead.
"""

import functools
import importlib
import inspect
import types

import torch
from torch import nn

from .. import _stats
from ..ops._boundary import no_autocast
from ..ops.head import Head
from ..ops.logprob import with_stats
from . import peft as _peft
from .peft_layer import adapters_of

try:
    import trl
    from peft.tuners.tuners_utils import BaseTunerLayer
    from trl.trainer import utils
except ImportError as error:
    raise ImportError("this needs TRL: pip install 'trl>=1.16'") from error

TESTED = "1.16.0"
_TRAINERS = tuple(f"trl.trainer.{name}_trainer" for name in ("grpo", "rloo", "sft", "dpo", "kto"))
_PARAMETERS = {
    "add_fused_lm_head": ["model", "temperature", "cast_lm_head_to_fp32", "outputs"],
    "_ChunkedLogProbFunction": [
        *("ctx", "hidden", "weight", "bias", "targets", "temperature", "chunk_size", "final_logit_softcapping"),
        *("logit_scale", "outputs"),
    ],
}
_KNOWN = {"log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1"}
_originals: dict[types.ModuleType, dict[str, object]] = {}


def patch() -> None:
    """Run the fused heads of TRL's trainers made from now on with ``lowrank.linear_logprob``.  Calling it twice is harmless.

    A LoRA (PEFT's ``lora.Linear``) on lm_head is applied and gets its gradients: the adapters active, merged or disabled at
    each call.  Refused by name where the trainer is made: dropout on it, DoRA, ``cast_lm_head_to_fp32`` with it.  Other
    adapters of the head TRL refuses itself.  ``log_sum_sq_probs``, and ``mean_logits`` of capped logits, stay TRL's.
    ``is_top1`` counts a target that ties for the maximum to fp32's last place; TRL's does if no earlier token ties.

    Raises: RuntimeError, before anything is changed, if this TRL is not made as the tested one is.
    """
    if _originals:
        return
    modules = _seam()
    ours = _add_fused_lm_head(utils.add_fused_lm_head)
    for module in modules:
        replaced = {"add_fused_lm_head": ours} | ({} if module is utils else {"BaseTunerLayer": _Refused})
        _originals[module] = {name: getattr(module, name) for name in replaced}
        for name, value in replaced.items():
            setattr(module, name, value)


def unpatch() -> None:
    """Undo :func:`patch` for trainers made from now on; those made in between keep what they have."""
    for module, names in _originals.items():
        for name, value in names.items():
            setattr(module, name, value)
    _originals.clear()


def _seam() -> list[types.ModuleType]:
    """The modules to patch, all of them with what is replaced."""
    missing = []
    for name, expected in _PARAMETERS.items():
        function = getattr(utils, name, None)
        function = getattr(function, "forward", None) if name.startswith("_") else function
        if not callable(function) or list(inspect.signature(function).parameters) != expected:
            missing.append(f"trl.trainer.utils.{name}({', '.join(expected)})")
    if not missing and "_ChunkedLogProbFunction" not in _names(utils.add_fused_lm_head.__code__):
        missing.append("a call of _ChunkedLogProbFunction in add_fused_lm_head")
    modules = [importlib.import_module(name) for name in _TRAINERS]
    for module in modules:
        for name, value in (
            ("add_fused_lm_head", getattr(utils, "add_fused_lm_head", None)),
            ("BaseTunerLayer", BaseTunerLayer),
        ):
            if getattr(module, name, None) is not value:
                missing.append(f"{module.__name__}.{name}")
    if missing:
        raise RuntimeError(
            f"TRL {trl.__version__} lacks {'; '.join(missing)}: lowrank.integrations.trl is tested with TRL {TESTED}"
        )
    return [utils, *modules]


def _names(code: types.CodeType) -> set[str]:
    inner = (c for c in code.co_consts if isinstance(c, types.CodeType))
    return set(code.co_names).union(*(_names(c) for c in inner))


class _IsRefused(type):
    def __instancecheck__(cls, layer) -> bool:
        return isinstance(layer, BaseTunerLayer) and not _is_covered(layer)  # type: ignore[arg-type]  # a module too


class _Refused(metaclass=_IsRefused):
    """In the trainers' place of BaseTunerLayer, with which they ask whether to refuse the head."""


def _is_covered(head: nn.Module) -> bool:
    return type(head) in (_peft.PeftLinear, _peft._twin(_peft.PeftLinear)) and type(head.base_layer) is nn.Linear


def _add_fused_lm_head(original):
    """TRL's function, whose models look up their LoRA and call our op where they called TRL's."""

    @functools.wraps(original)
    def add_fused_lm_head(model, temperature=1.0, cast_lm_head_to_fp32=False, outputs=("log_probs",)):
        _refuse(model.get_output_embeddings(), cast_lm_head_to_fp32)
        scores = _Scores(utils._ChunkedLogProbFunction)
        scope = original.__globals__ | {"_ChunkedLogProbFunction": scores}
        add = types.FunctionType(
            original.__code__, scope, original.__name__, original.__defaults__, original.__closure__
        )
        add(model, temperature, cast_lm_head_to_fp32, outputs)
        fused = model.forward.__func__

        @functools.wraps(fused)  # generate and Trainer read the signature
        def forward(self, *args, **kwargs):
            if kwargs.get("fused_lm_head"):
                scores.head = self.get_output_embeddings()
            return fused(self, *args, **kwargs)

        model.forward = types.MethodType(forward, model)

    return add_fused_lm_head


def _refuse(head: nn.Module, cast_lm_head_to_fp32: bool) -> None:
    """Raise on a head whose adapter would be wrong or ignored, as early as it can be known."""
    if not isinstance(head, BaseTunerLayer):
        return
    if not _is_covered(head):
        raise ValueError(f"lm_head: {_called(head)} cannot be applied by the fused head; only PEFT's lora.Linear can")
    if cast_lm_head_to_fp32:
        raise ValueError("cast_lm_head_to_fp32: not supported with a LoRA on lm_head; logits are summed in fp32 anyway")
    if any(getattr(drop, "p", 0) > 0 for drop in head.lora_dropout.values()):  # type: ignore[operator]  # PEFT's ModuleDict
        raise ValueError("lm_head: dropout on its LoRA is not supported; set lora_dropout=0 (or disable_dropout=True)")
    _lora(head, head.weight)


def _called(head: nn.Module) -> str:
    return f"{type(head).__module__.split('.')[-2]}.{type(head).__name__}"


def _lora(head: nn.Module, like: torch.Tensor):
    """((A, B, scaling) or None, the adapters' bias or None) that ``head`` adds to its base layer at this moment."""
    if not isinstance(head, BaseTunerLayer):
        return None, None
    adapters, reason = adapters_of(head, like, (), {})
    if reason is None and any(adapter.dropout_p for adapter in adapters or ()):
        reason = "dropout"
    if reason is not None:
        raise ValueError(f"lm_head: its LoRA cannot be applied by the fused head: {reason}")
    if not adapters:
        return None, None
    biases = [adapter.scaling * adapter.bias for adapter in adapters if adapter.bias is not None]
    bias = sum(biases[1:], biases[0]) if biases else None
    (A, B, scaling, *_), *further = adapters
    if further or isinstance(scaling, torch.Tensor):  # side by side they are one
        A = torch.cat([adapter.A for adapter in adapters])
        B, scaling = torch.cat([adapter.B * adapter.scaling for adapter in adapters], 1), 1.0
    return (A, B, scaling), bias


class _Scores:
    """In the place of TRL's ``_ChunkedLogProbFunction``, for one model."""

    def __init__(self, original: type[torch.autograd.Function]):
        self.original = original
        self.head: nn.Module = None  # type: ignore[assignment]  # forward sets it before it calls apply

    def apply(self, hidden, weight, bias, targets, temperature, chunk_size, softcap, logit_scale, outputs):
        """(log_probs, entropy, log_sum_sq_probs, mean_logits, is_top1) of hidden [N, H]; None for what is not in outputs."""
        lora, added = _lora(self.head, hidden)
        reason = _not_covered(weight, softcap, outputs)
        if reason is not None and lora is not None:
            raise ValueError(
                f"lm_head: its LoRA cannot be applied by TRL's own fused head, and here ours is not: {reason}"
            )
        if reason is not None:
            _stats.fell_back(self.head, reason, "TRL")
            return self.original.apply(
                hidden, weight, bias, targets, temperature, chunk_size, softcap, logit_scale, outputs
            )
        if not torch.is_autocast_enabled(hidden.device.type):
            weight = weight.to(hidden.dtype)
        if added is not None:
            bias = added if bias is None else bias + added
        head = Head(hidden, weight, bias, lora, temperature, logit_scale, softcap)
        logp, entropy, (_, lse, _) = with_stats(head, targets)
        _stats.ran_fused(self.head)
        return (
            logp,
            entropy if "entropy" in outputs else None,
            None,
            _mean_logits(head) if "mean_logits" in outputs else None,
            logp.detach() == -lse if "is_top1" in outputs else None,  # (z_y - max) - ℓ
        )


def _not_covered(weight: torch.Tensor, softcap: float | None, outputs: tuple[str, ...]) -> str | None:
    if hasattr(weight, "ds_id"):
        return "a head that DeepSpeed ZeRO-3 shards"  # ours would not gather it again for backward
    if softcap is not None and "mean_logits" in outputs:
        return "mean_logits of capped logits"
    if unknown := sorted(set(outputs) - (_KNOWN - {"log_sum_sq_probs"})):
        return f"the output {unknown[0]}"
    return None


@torch.no_grad()
def _mean_logits(head: Head) -> torch.Tensor:
    """[N] over the vocabulary: the product with the mean row of the head."""
    acc_dtype = torch.promote_types(head.hidden.dtype, torch.float32)
    with no_autocast(head.hidden.device):
        row = head.weight.mean(0, dtype=acc_dtype)
        if head.lora is not None:
            A, B, scaling = head.lora
            row += scaling * (B.mean(0, dtype=acc_dtype) @ A.to(acc_dtype))
        mean = head.hidden.to(acc_dtype) @ row
        if head.bias is not None:
            mean += head.bias.mean(dtype=acc_dtype)
        return mean * (head.logit_scale / head.temperature)
