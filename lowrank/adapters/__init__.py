"""``adapt``, ``save_adapter`` and ``load_adapter``: LoRA on a whole model in PEFT's files both ways, and SVF."""

import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, overload

from torch import nn

from .._linears import is_conv1d
from ..checkpoints import publish
from ..nn import LoRALinear
from ..nn.svf import check_name
from . import expert_files, lora_files, svf_files, svf_model
from .fits import check_fits, check_same
from .lora_files import CONFIG, PICKLED, WEIGHTS
from .svf_layers import SVFConfig, rename_expert, svf_layers

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

Model = TypeVar("Model", bound=nn.Module)


@overload
def adapt(
    model: nn.Module, config: "LoraConfig", adapter_name: str = "default", *, autocast_adapter_dtype: bool = True
) -> "PeftModel": ...
@overload
def adapt(
    model: Model, config: SVFConfig, adapter_name: str = "default", *, autocast_adapter_dtype: bool = True
) -> Model: ...
def adapt(
    model: nn.Module,
    config: "SVFConfig | LoraConfig",
    adapter_name: str = "default",
    *,
    autocast_adapter_dtype: bool = True,
) -> nn.Module:
    """``peft.get_peft_model(model, config)`` whose LoRA layers run on lowrank; or, with an SVFConfig, SVF layers in place.

    From a LoraConfig comes a PeftModel like any other: Trainer saves, resumes and reloads it, and its files are PEFT's.
    From an SVFConfig comes the same model, its linears replaced by :class:`lowrank.nn.SVFLinear` and frozen but for
    their experts, with methods ``save_pretrained`` (experts only), ``add_expert``, ``set_expert``, ``disable_adapter``,
    ``merge_and_unload``.

    Args:
        model: an nn.Module with linear layers; PEFT freezes it and injects the adapters in place.
        config: a peft.LoraConfig, with everything it offers (rsLoRA, rank and alpha patterns, initialisations, lm_head),
            or a :class:`lowrank.SVFConfig`.
        autocast_adapter_dtype: PEFT's: adapters in fp32 over a 16-bit base.

    Raises: TypeError for another config; ValueError if its target modules match nothing.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    if isinstance(config, SVFConfig):
        check_name(adapter_name)
        model = svf_model.adapt(model, config)
        if adapter_name != "default":
            rename_expert(model, "default", adapter_name)
        return model
    peft = lora_files.import_peft()
    if not isinstance(config, peft.LoraConfig):
        raise TypeError(f"config: expected a peft.LoraConfig or a lowrank.SVFConfig, got {type(config).__name__}")
    from ..integrations.peft import swap_layers

    names = [name for name, p in model.named_parameters() if p.dim() in (2, 3)]
    for target in config.target_parameters or ():
        if not any(name == target or name.endswith(f".{target}") for name in names):
            raise ValueError(f"target_parameters: {type(model).__name__} has no {target!r}; it has {names[-1]!r}")
    all_linear = isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear"
    if all_linear and not any(isinstance(module, nn.Linear) or is_conv1d(module) for module in model.modules()):
        raise ValueError(f"model: {type(model).__name__} has no nn.Linear layer to adapt")
    adapted = peft.get_peft_model(model, config, adapter_name, autocast_adapter_dtype=autocast_adapter_dtype)
    swap_layers(adapted)
    if lora_files.changes_base(config):
        tensors = peft.get_peft_model_state_dict(adapted, adapter_name=adapter_name, save_embedding_layers=False)
        factors = {key: t.detach().clone() for key, t in tensors.items() if lora_files.rank_dim(key) is not None}
        adapted.__dict__["_lowrank_initial"] = adapted.peft_config[adapter_name], factors
    return adapted


def save_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    format: str | None = None,
    *,
    adapter_name: str | None = None,
) -> Path:
    """Write the adapter of ``model`` to the directory ``path``; nothing is left half-written.

    Args:
        model: a PeftModel, or any model with :class:`lowrank.nn.LoRALinear` or :class:`lowrank.nn.SVFLinear` layers.
        path: created, or its adapter files replaced.
        format: None: PEFT's two files, or for SVF the experts' vectors in one.  "lora": a plain LoRA of the model as it was
            before it was adapted, which any LoRA server can run.  That is an SVF expert as the rank-k LoRA it is, A = Vh,
            B = U diag(σ (z - 1)); and starts that changed the base (PiSSA, OLoRA, CorDA, LoRA-GA) as one of twice the rank,
            A = [A, A_0], B = [B, -B_0], without the weights they changed.
        adapter_name: of SVF's experts only: which one; None for all, or for the active one as LoRA.

    Raises: TypeError for what is no nn.Module; ValueError for another format, a model without adapters, or one whose
    parameters are shards; for "lora", for what is no LoRA of the original weights: another method than LoRA, a base that is
    quantised, tied to another layer, shared with another adapter, or changed by more than its factors (LoftQ, KaSA).
    """
    if format not in (None, "lora"):
        raise ValueError(f"format: expected None or 'lora', got {format!r}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    _check_whole(model)
    experts = bool(svf_layers(model))
    if adapter_name is not None and not experts:
        raise ValueError("adapter_name: only SVF's experts are chosen by name; PEFT's save_pretrained chooses its own")
    if experts and format is None:
        return svf_files.save(model, path, adapter_name)
    peft = lora_files.import_peft()
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as scratch:
        if experts:
            svf_files.write_lora(model, Path(scratch), peft, adapter_name)
        elif isinstance(model, peft.PeftModel):
            model.save_pretrained(scratch)
            if format == "lora":
                lora_files.make_plain(model, Path(scratch), peft)
            lora_files.check_unmerged(model, Path(scratch))
        else:
            lora_files.write_lora_linears(model, Path(scratch), peft, plain=format == "lora")
        written = [file for file in Path(scratch).rglob("*") if file.is_file()]
        target = {file: path / file.relative_to(scratch) for file in written}
        # another configuration makes another adapter: the old one goes first, the new one comes last, and in between there
        # is none.  Beside the same one, weights are replaced at once: whoever is killed here leaves the old or the new.
        written = [file for file in written if file.name != CONFIG or not _same_config(file, target[file])]
        for file in written:
            if file.name == CONFIG:
                target[file].unlink(missing_ok=True)
        for file in sorted(written, key=lambda file: file.name == CONFIG):
            target[file].parent.mkdir(parents=True, exist_ok=True)
            publish(file, target[file])
    return path


def load_adapter(
    model: nn.Module, path: str | os.PathLike[str], adapter_name: str = "default", *, is_trainable: bool = False
) -> nn.Module:
    """Load an adapter that :func:`save_adapter` or PEFT wrote, and return the model with it.

    A model with :class:`lowrank.nn.LoRALinear` layers has its factors overwritten; a PeftModel gets the adapter added
    and made active; any other model becomes a PeftModel whose layers run on lowrank.  What PEFT makes of the file (names of
    older transformers, a linear per expert, convolutions, replicated layers) is checked against the model before anything is
    changed: every tensor has its place and size, and none is missing.  Factors of expert parameters that PEFT 0.17 or 0.18
    wrote are turned round.  A pickled ``adapter_model.bin`` is read with ``torch.load(weights_only=True)`` alone.  ``path`` may
    also be what a PeftModel with named adapters was saved to: then the
    folder ``adapter_name`` in it is meant.

    SVF's experts are added to a model with SVF layers, or the model is adapted first, in place.  A single expert is named
    ``adapter_name``; several keep their names.  Each layer's weight must have the checksum of the one they were trained on.

    Raises: FileNotFoundError for a missing file; ValueError for a damaged one, or an adapter of another model.
    """
    path = Path(path)
    if (experts := svf_files.read(path)) is not None:
        return svf_model.load(model, path, *experts, adapter_name, is_trainable)
    peft = lora_files.import_peft()
    if not (path / CONFIG).is_file() and (path / adapter_name / CONFIG).is_file():
        path = path / adapter_name
    weights = WEIGHTS if (path / WEIGHTS).is_file() or not (path / PICKLED).is_file() else PICKLED
    for name in (CONFIG, weights):
        if not (path / name).is_file():
            raise FileNotFoundError(f"{path}: expected an adapter directory with {CONFIG} and {WEIGHTS}; no {name}")
    tensors = lora_files.read(path / weights)
    if any(isinstance(module, LoRALinear) for module in model.modules()):
        return lora_files.load_lora_linears(model, path, tensors)
    base = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    with expert_files.as_written_today(base, path, tensors) as (path, tensors):
        return _load_peft(model, base, path, tensors, adapter_name, is_trainable, peft)


def _load_peft(model, base, path: Path, tensors, adapter_name: str, is_trainable: bool, peft) -> nn.Module:
    from ..integrations.peft import swap_layers

    tried = check_fits(base, path, tensors, adapter_name, peft)
    if isinstance(model, peft.PeftModel):
        if tried is not None and adapter_name in model.peft_config:
            check_same(model, tried, path, adapter_name)
            own, in_file = (m.peft_config[adapter_name] for m in (model, tried))
            if lora_files.changes_base(own) != lora_files.changes_base(in_file):
                inits = f"{own.init_lora_weights!r}, {path} from {in_file.init_lora_weights!r}"
                raise ValueError(f"adapter_name: the model's {adapter_name!r} is from init_lora_weights={inits}")
        mapping = getattr(base, "_checkpoint_conversion_mapping", None)  # as from_pretrained
        model.load_adapter(path, adapter_name, is_trainable=is_trainable, key_mapping=mapping)
        model.set_adapter(adapter_name, inference_mode=not is_trainable)
    else:
        model = peft.PeftModel.from_pretrained(model, path, adapter_name, is_trainable=is_trainable)
    swap_layers(model)
    return model


def _same_config(*files: Path) -> bool:
    """Whether both say the same; PEFT writes a set of names in another order in every process."""
    try:
        first, second = (json.loads(file.read_text()) for file in files)
    except (OSError, ValueError):
        return False
    for config in (first, second):
        for key in ("target_modules", "exclude_modules", "modules_to_save"):
            if isinstance(config.get(key), list):
                config[key] = sorted(config[key])
    return first == second


def _check_whole(model: nn.Module) -> None:
    """Raise ValueError for a model split by FSDP or ZeRO-3, of which PEFT writes an empty file or none."""
    for name, p in model.named_parameters():
        if hasattr(p, "placements") or hasattr(p, "ds_id") or "_fsdp_wrapped_module" in name:
            raise ValueError(
                f"model: {name} is a shard, {list(p.shape)} in a {type(p).__name__}; gather the state first and save that:"
                " model.save_pretrained(path, state_dict=...)"
            )
