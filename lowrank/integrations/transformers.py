"""transformers' Trainer on lowrank by a callback, and proxy-tuning in ``generate()``.

Proxy-tuning (Liu et al. 2024, arXiv 2401.08565): a large frozen model steered by a small tuned and a small untuned one.  The
three share a tokenizer; they never meet but in the logits of each token.
"""

import contextlib
import inspect
import logging
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import LogitsProcessor, TrainerCallback

from .. import _stats
from ..ops._head_checks import check_alpha
from ..ops.combine import combine_logits

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import Cache, PreTrainedModel, TrainerControl, TrainerState, TrainingArguments
    from transformers.generation.utils import GenerateOutput


class PatchCallback(TrainerCallback):
    """``Trainer(..., callbacks=[PatchCallback()])`` runs a PEFT model's LoRA layers on lowrank, in training and evaluation.

    The model is patched when the trainer is made, before anything wraps or compiles it, and again when training begins, for
    layers that came in between (``model_init``, a callback added later).  After the first step of each ``train()`` it logs
    what :func:`lowrank.stats` counted in this process meanwhile: on the logger "lowrank" of every machine's first process, at
    INFO if every LoRA layer ran on lowrank and at WARNING if not, so that nobody trains on a fallback unknowingly.  Under
    ``torch.compile`` these are the layers traced; a model whose graphs were there before has none.  TRL's trainers take it too.

    Args: ``options`` are :func:`lowrank.integrations.peft.patch`'s.
    Raises: ValueError when training begins, if the model has no LoRA layer that lowrank covers.
    """

    def __init__(self, **options: Any):
        self.options = options
        self._before: _stats.Stats | None = None

    def on_init_end(
        self,
        args: "TrainingArguments",
        state: "TrainerState",
        control: "TrainerControl",
        model: nn.Module,
        **kwargs: Any,
    ) -> None:
        from .peft import swap_layers

        swap_layers(model, **self.options)

    def on_train_begin(
        self,
        args: "TrainingArguments",
        state: "TrainerState",
        control: "TrainerControl",
        model: nn.Module,
        **kwargs: Any,
    ) -> None:
        from .peft import is_patched

        self.on_init_end(args, state, control, model)
        if not any(is_patched(m) for m in model.modules()):
            raise ValueError("model: found no LoRA layer to patch; give the trainer what get_peft_model returned")
        self._before = _stats.stats()

    def on_step_end(
        self,
        args: "TrainingArguments",
        state: "TrainerState",
        control: "TrainerControl",
        model: nn.Module,
        **kwargs: Any,
    ) -> None:
        if self._before is None:
            return
        before, after, self._before = self._before, _stats.stats(), None
        fallback = {why: n - before["fallback"].get(why, 0) for why, n in after["fallback"].items()}
        counts: _stats.Stats = {
            "fused": after["fused"] - before["fused"],
            "shared": after["shared"] - before["shared"],
            "fallback": {why: n for why, n in fallback.items() if n},
            "untouched": _stats.stats(model)["untouched"],
        }
        whole = (counts["fused"] or _is_compiled(args, model)) and not counts["fallback"] and not counts["untouched"]
        if state.is_local_process_zero:
            level = logging.INFO if whole else logging.WARNING
            logging.getLogger("lowrank").log(level, "first step: %s", counts)


def _is_compiled(args: "TrainingArguments", model: nn.Module) -> bool:
    """Whether graphs traced before may have run: by the trainer's option, a wrapper or ``module.compile()``."""
    parts = model.modules()
    return args.torch_compile or any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in parts)


class ProxyTuning(LogitsProcessor):
    """Adds ``alpha * (expert - antiexpert)`` to the logits of the model that generates.

        proxy = ProxyTuning(expert, antiexpert)
        model.generate(**inputs, logits_processor=[proxy])  # a prompt without padding
        proxy.generate(model, **inputs)  # the same, for padded prompts too

    Both small models keep a key-value cache: they read the prompt once and one token a step.  Greedy search, sampling and
    beam search (whose reordering the caches follow).  Any other text starts anew, so one object serves any number of
    ``generate()`` calls, one after the other; assisted generation, which goes back over its tokens, is right but reads the
    text again each time, and warns.

    What comes back are log-probabilities, [B, V] in fp32, since beam search adds up what it is given; generate()'s other
    processors (repetition_penalty, bad words, ...) came before and their exclusions stay, temperature, top-k and top-p
    come after.  One comparison of tokens per step is read back from the device: without it another prompt could meet an
    old cache.

    Args:
        expert, antiexpert: causal language models of transformers, or PEFT models over them, over the tokenizer of the
            large one, in eval mode.
        alpha: a number, or a float tensor [B] with one per prompt; an attribute, which may change between steps.
        attention_mask: :meth:`prepare`'s, for the first prompt.

    Raises: TypeError on what is no such model or no number; ValueError on encoder-decoder models, on adapters of PEFT that
        add virtual tokens, on a mask that does not fit, and on a padded prompt without a mask.
    """

    supports_continuous_batching = False
    _mask: torch.Tensor | None
    _prompt: torch.Tensor | None
    _seen: torch.Tensor | None

    def __init__(
        self,
        expert: "PreTrainedModel | PeftModel",
        antiexpert: "PreTrainedModel | PeftModel",
        alpha: float | torch.Tensor = 1.0,
        attention_mask: torch.Tensor | None = None,
    ):
        check_alpha(alpha)
        self.alpha = alpha
        self._models = _Cached("expert", expert), _Cached("antiexpert", antiexpert)
        self._warned = False
        self.prepare(attention_mask)

    @classmethod
    def from_adapter(
        cls,
        model: "PreTrainedModel | PeftModel",
        alpha: float | torch.Tensor = 1.0,
        attention_mask: torch.Tensor | None = None,
    ) -> "ProxyTuning":
        """Expert: ``model`` (PEFT's, or one of :func:`lowrank.adapt`) as it is; antiexpert: it without."""
        if not isinstance(model, nn.Module) or not hasattr(model, "disable_adapter"):
            raise TypeError(f"model: expected a model with an adapter to disable, got {type(model).__name__}")
        proxy = cls(model, model, alpha, attention_mask)
        proxy._models[1].context = model.disable_adapter  # type: ignore[assignment]  # a method: nn.Module cannot say
        return proxy

    def prepare(self, attention_mask: torch.Tensor | None = None) -> None:
        """Forget everything; the next call is for a prompt [B, L] with this mask: 1, and 0 for padding on the left.

        Needed where a prompt is padded, which a processor cannot see, before each ``generate()``.
        """
        if attention_mask is not None:
            if not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() != 2:
                raise ValueError(f"attention_mask: expected a tensor [B, L], got {_describe(attention_mask)}")
            attention_mask = attention_mask.long()
            if bool((attention_mask.diff(dim=1) < 0).any()) or not bool(attention_mask.bool().any(1).all()):
                raise ValueError("attention_mask: expected padding on the left alone, and a token in every row")
        self._whole = attention_mask is not None and bool(attention_mask.all())  # then nobody needs it
        self._mask = None if self._whole else attention_mask
        self._prompt = self._seen = None

    def generate(
        self,
        model: "PreTrainedModel | PeftModel",
        *,
        attention_mask: torch.Tensor | None = None,
        logits_processor: Sequence[LogitsProcessor] = (),
        **inputs: Any,
    ) -> "GenerateOutput | torch.LongTensor":
        """``model.generate(...)``, steered; the prompt's ``attention_mask`` is shared by all three models."""
        self.prepare(attention_mask)
        return model.generate(attention_mask=attention_mask, logits_processor=[self, *logits_processor], **inputs)

    @torch.no_grad()
    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor) -> torch.Tensor:
        """input_ids: [B, L], all tokens so far; scores: [B, V] of the next one."""
        if not self._follow(input_ids):
            self._start(input_ids)
        mask = self._mask
        if mask is not None:
            mask = torch.cat((mask, mask.new_ones(len(mask), input_ids.shape[1] - mask.shape[1])), 1)
        self._seen = None  # until both have read it
        # as log-probabilities, so that a token which one of them lacks keeps its place among the others
        expert, antiexpert = (m.read(input_ids, mask).to(scores.device).log_softmax(-1) for m in self._models)
        self._seen = input_ids.clone()
        alpha = self.alpha
        if isinstance(alpha, torch.Tensor):
            alpha = (
                _repeated("alpha", alpha.to(scores.device), len(input_ids)) if alpha.dim() else alpha.to(scores.device)
            )
        return combine_logits(scores, expert, antiexpert, alpha).log_softmax(-1)

    def _follow(self, input_ids: torch.Tensor) -> bool:
        """Whether this is the text of the last call and one more token, for which the caches are put in order."""
        seen = self._seen
        if seen is None or input_ids.shape != (seen.shape[0], seen.shape[1] + 1):
            return False
        before = input_ids[:, :-1]
        if torch.equal(before, seen):
            return True
        same = (before[:, None] == seen).all(-1)  # [B, B]: beams may have changed places
        if self._mask is not None:
            same &= (self._mask[:, None] == self._mask).all(-1)
        if not bool(same.any(1).all()):
            return False
        rows = same.int().argmax(1)
        for model in self._models:
            model.cache.reorder_cache(rows)  # type: ignore[union-attr]  # both have read
        return True

    def _start(self, input_ids: torch.Tensor) -> None:
        """Empty the caches.  The mask stays where the prompt does."""
        if input_ids.dim() != 2 or input_ids.shape[1] == 0:
            raise ValueError(f"input_ids: expected tokens [B, L] (not inputs_embeds), got {_describe(input_ids)}")
        prompt, seen, length = self._prompt, self._seen, input_ids.shape[1]
        same = prompt is not None and torch.equal(input_ids[:, : prompt.shape[1]], prompt)
        if not same or (seen is not None and length > seen.shape[1] + 1):
            self._begin(input_ids)
        elif seen is not None and length > prompt.shape[1] and not self._warned:  # type: ignore[union-attr]  # same
            self._warned = True
            warnings.warn(
                "proxy-tuning: the text went back to earlier tokens (assisted generation?); the small models read it from"
                " its start each time",
                stacklevel=4,
            )
        for model in self._models:
            model.cache, model.length = None, 0

    def _begin(self, prompt: torch.Tensor) -> None:
        """Take a prompt that was not there before, with the mask that :meth:`prepare` was given for it."""
        if self._prompt is not None:
            if self._mask is not None:
                raise ValueError(
                    "attention_mask: is an earlier prompt's; call prepare(attention_mask) before the next generate(), or"
                    " use ProxyTuning.generate"
                )
            self._whole = False
        if self._mask is None:
            if not self._whole:
                self._refuse_padding(prompt)
        elif self._mask.shape[1] != prompt.shape[1]:
            raise ValueError(f"attention_mask: expected the prompt's {_describe(prompt)}, got {_describe(self._mask)}")
        else:
            self._mask = _repeated("attention_mask", self._mask.to(prompt.device), len(prompt))
        self._prompt = prompt.clone()

    def _refuse_padding(self, input_ids: torch.Tensor) -> None:
        config = self._models[0].config
        pad, ends = getattr(config, "pad_token_id", None), getattr(config, "eos_token_id", None)
        ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        first = input_ids[:, :1]
        padding = input_ids == pad if pad is not None and pad not in ends else first == -1
        if len(input_ids) > 1:
            padding = padding | torch.isin(first, torch.tensor(ends, dtype=first.dtype, device=first.device))
        if bool(padding.any()):
            raise ValueError(
                "attention_mask: the prompt seems to be padded; call prepare(attention_mask) before, or use"
                " ProxyTuning.generate (ones, where nothing is padding)"
            )


class _Cached:
    """A small model, and its cache over the ``length`` tokens that it has read."""

    def __init__(self, name: str, model: "PreTrainedModel | PeftModel"):
        if not isinstance(model, nn.Module) or not hasattr(model, "config"):
            raise TypeError(f"{name}: expected a causal language model of transformers, got {type(model).__name__}")
        inner: PreTrainedModel = getattr(model, "get_base_model", lambda: model)()
        if getattr(inner.config, "is_encoder_decoder", False):
            raise ValueError(f"{name}: expected a decoder, got the encoder-decoder model {type(inner).__name__}")
        for adapter, config in getattr(model, "peft_config", {}).items():
            if getattr(config, "is_prompt_learning", False):
                raise ValueError(
                    f"{name}: {adapter!r} ({type(config).__name__}) adds virtual tokens, which caches here lack"
                )
        self.name, self.config = name, inner.config
        self.model: PreTrainedModel | PeftModel = model
        self.context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
        self.takes = inspect.signature(inner.forward).parameters
        self.cache_name = "cache" if "cache" in self.takes else "past_key_values"  # before transformers 5.23
        self.cache: Cache | None = None
        self.length = 0

    def read(self, input_ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """[B, V]: logits after the tokens [B, L], of which those it has not seen are fed."""
        device = self.model.device
        inputs: dict[str, Any] = {"input_ids": input_ids[:, self.length :].to(device), "use_cache": True}
        if mask is not None:
            inputs["attention_mask"] = mask.to(device)
            if "position_ids" in self.takes:
                positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
                inputs["position_ids"] = positions[:, self.length :]
        if self.cache is not None:
            inputs[self.cache_name] = self.cache
        if "logits_to_keep" in self.takes:
            inputs["logits_to_keep"] = 1
        with self.context():
            out = self.model(**inputs)
        self.cache, self.length = getattr(out, self.cache_name, None), input_ids.shape[1]
        if self.cache is None or not hasattr(self.cache, "reorder_cache"):
            raise ValueError(
                f"{self.name}: {type(self.model).__name__} gave back no cache of keys and values (training mode?)"
            )
        logits = out.logits[:, -1]
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _repeated(name: str, t: torch.Tensor, rows: int) -> torch.Tensor:
    """One row per prompt -> one per sequence: generate() repeats each for its beams and num_return_sequences."""
    if rows % len(t):
        raise ValueError(f"{name}: expected a row per prompt, got {len(t)} for {rows} sequences")
    return t.repeat_interleave(rows // len(t), 0)


def _describe(t) -> str:
    return str(list(t.shape)) if isinstance(t, torch.Tensor) else type(t).__name__
