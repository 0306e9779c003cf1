"""What a type checker sees of the public functions: ``make lint`` checks this file, nothing runs it."""

from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from typing_extensions import assert_type

import lowrank
from lowrank import analysis, bits, delta
from lowrank.adapters.factor_files import load_factors
from lowrank.analysis import DiffStats
from lowrank.integrations import peft as integration
from lowrank.nn import LoRALinear, SVFLinear
from lowrank.ops.materialize import MergeReport
from lowrank.optim import AdamW


def ops(x: Tensor, weight: nn.Parameter, A: nn.Parameter, B: nn.Parameter, targets: Tensor) -> None:
    assert_type(lowrank.lora_linear(x, weight, A, B, 2.0, bias=None, dropout_p=0.1), Tensor)
    assert_type(lowrank.dora_linear(x, weight, A, B, B[:, 0]), Tensor)
    factors = lowrank.svd_factors(weight, 8)
    assert_type(factors, lowrank.SVDFactors)
    assert_type(lowrank.svf_linear(x, weight, factors, factors.S), Tensor)
    scores = lowrank.linear_logprob(x, weight, targets, lora=(A, B, 1.0))
    assert_type(scores, lowrank.LogProb)
    assert_type(scores.entropy, Tensor)
    assert_type(lowrank.linear_cross_entropy(x, weight, targets), Tensor)
    assert_type(lowrank.kl_to(lowrank.Head(x, weight), lowrank.Head(x, weight)), Tensor)
    assert_type(lowrank.combine_logits(x, x, x, 0.5), Tensor)
    assert_type(lowrank.materialize(weight, A, 1.0, B), Tensor)
    assert_type(lowrank.materialize([weight], [A], [1.0], [B]), list[Tensor])
    receipt = lowrank.fold_(weight, A, 1.0, B)
    assert_type(receipt, lowrank.Receipt)
    assert_type(receipt.report, MergeReport)
    assert_type(lowrank.unfold_(weight, A, 1.0, B, receipt), None)


def lists(
    x: Tensor, weights: list[nn.Parameter], As: list[nn.Parameter], Bs: list[nn.Parameter], m: list[float]
) -> None:
    assert_type(lowrank.lora_linears(x, weights, As, Bs, m), tuple[Tensor, ...])
    assert_type(lowrank.materialize(weights, As, m, Bs), list[Tensor])


class Model(nn.Module):
    pass


def models(model: Model, config: LoraConfig, path: Path) -> None:
    assert_type(lowrank.adapt(model, lowrank.SVFConfig(k=8)), Model)
    assert_type(lowrank.adapt(model, config), PeftModel)
    assert_type(lowrank.save_adapter(model, path), Path)
    assert_type(lowrank.load_adapter(model, "folder"), nn.Module)
    with lowrank.expert_mix(model, torch.ones(2)) as mixed:
        assert_type(mixed, Model)
    assert_type(integration.patch(model, copy_inputs=["q_proj"]), Model)
    assert_type(integration.patch(), None)
    assert_type(load_factors(path)["layer"], lowrank.SVDFactors)


def layers(linear: nn.Linear, x: Tensor) -> None:
    lora = LoRALinear.from_linear(linear, 8)
    assert_type(lora, LoRALinear)
    assert_type(lora.weight, nn.Parameter)
    assert_type(lora.lora_A["default"], nn.Linear)
    assert_type(lora.merge(), MergeReport)
    svf = SVFLinear.from_linear(linear, 8)
    assert_type(svf.factors, lowrank.SVDFactors)
    assert_type(svf.merge(), MergeReport)
    with lowrank.nn.defer_projection(svf):
        pass


def counts(model: Model) -> None:
    stats = lowrank.stats(model)
    assert_type(stats["fused"], int)
    assert_type(stats["fallback"], dict[str, int])
    with lowrank.strict(), lowrank.debug_checks():
        pass


def optimizer(model: Model, words: dict[Tensor, Tensor], loss: Callable[[], float]) -> None:
    adamw = AdamW(model.parameters(), lr=1e-3, masks=words, offsets={"weight": 8}, track_changes=True)
    AdamW(model.named_parameters())
    AdamW([{"params": model.parameters(), "lr": 1e-4}])
    assert_type(adamw.step(), None)
    assert_type(adamw.step(loss), float)
    assert_type(adamw.clip_grad_norm_(1.0), Tensor)
    tensors = dict(model.named_parameters())
    blob = delta.encode(tensors, changes=adamw.changes())
    assert_type(blob, bytes)
    assert_type(delta.apply_(tensors, blob), delta.Applied)


def weights(old: dict[str, nn.Parameter], t: Tensor) -> None:
    assert_type(analysis.diff_stats(t, t), DiffStats)
    assert_type(analysis.diff_stats(old, old), dict[str, DiffStats])
    assert_type(analysis.diff_stats("a", Path("b")), dict[str, DiffStats])
    assert_type(analysis.topk_mask(t, 0.1), Tensor)
    assert_type(analysis.topk_mask((old, old), 0.1), dict[str, Tensor])
    assert_type(analysis.overlap([t, t]), analysis.Overlap)
    assert_type(bits.unpack(bits.pack(t > 0), t.shape), Tensor)
