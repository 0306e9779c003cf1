"""AdamW as one stream over the weights: masks, stochastic rounding, compact state, and a map of what changed."""

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from operator import is_
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from . import bits
from ._memory import Memory
from .ops import adamw

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_POLICIES = ("raise", "skip", "propagate")
_TORCHS = {
    "amsgrad": "False, there is no such form",
    "maximize": "False: negate the loss",
    "foreach": "None or False: all parameters are one call already",
    "fused": "None or False: it is one pass already",
    "capturable": "False: scalars are computed on the host",
    "differentiable": "False: a step has no graph",
}  # torch.optim.AdamW's, and what they may be here
_DROPPED = (*_TORCHS, "decoupled_weight_decay")
_MOMENTS = ("exp_avg", "exp_avg_sq")
_KEPT = (
    *("master_weights", "stochastic_rounding", "seed", "compact", "track_changes", "nonfinite", "skipped_steps"),
    *("_masks", "_prefixes", "_firsts", "_changes"),
)


class NonFiniteGradientError(RuntimeError):
    """A gradient has infinities or NaN; nothing was written."""


def _refuse_options(options: dict) -> None:
    """ValueError for those of torch.optim.AdamW's that ask for what is not there."""
    for name, meant in _TORCHS.items():
        if options.get(name):
            raise ValueError(f"AdamW: expected {name} to be {meant}, got {options[name]!r}")


def _moment_dtype(p: Tensor) -> torch.dtype:
    """The moments' dtype."""
    return torch.float64 if p.dtype is torch.float64 else torch.float32


def _version(p: Tensor) -> tuple:
    """What differs after a write by others: PyTorch's count, and where the numbers lie, which ``p.data = other`` changes."""
    return -1 if p.is_inference() else p._version, p.dtype, p.device, p.data_ptr()


def _ordinary(make, *args, **options) -> Tensor:
    """A tensor that can be written in any mode, also if this is inference mode."""
    with torch.inference_mode(False), torch.no_grad():
        return make(*args, **options)


def _zeros(size, dtype: torch.dtype, device: torch.device) -> Tensor:
    return _ordinary(torch.zeros, size, dtype=dtype, device=device)


def _no_changes(p: Tensor) -> Tensor:
    return _zeros(-(-p.numel() // 32), torch.int32, p.device)


class AdamW(torch.optim.Optimizer):
    """torch.optim.AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) in one pass over p, g and the moments.

    Args:
        params, lr, betas, eps, weight_decay: torch.optim.AdamW's; fp32, bf16 or fp16 parameters (fp64 in PyTorch), also as
            (name, parameter) pairs.  Moments are fp32 whatever the parameters' dtype.
        amsgrad, maximize, foreach, capturable, differentiable, fused: torch.optim.AdamW's, where they ask for nothing: False
            or None.
        master_weights: keep an fp32 copy of each 16-bit parameter and step that; where it does not round to the parameter
            any more, somebody has replaced the weight, and the step starts from the weight.
        stochastic_rounding: round 16-bit parameters up or down at random, so that small updates are right on average.  Drawn
            from Philox by (seed, step, position of the parameter, element), so that a replay gives the same bits.
        seed: of that, an integer.
        masks: {parameter or its name: words} (:mod:`lowrank.bits`): where a bit is 0, the weight, its moments and its decay
            are left alone.  Parameters without an entry train whole.
        compact: keep moments of active elements only; by default where a mask has less than half of its bits set.
        track_changes: keep a bit per element of what changed in the stored dtype since :meth:`zero_changes`.  A write by
            others in place is noticed and sets all bits of its parameter, and so is ``p.data = other``; who writes into
            ``p.data`` calls :meth:`mark_all_changed`.
        offsets: {parameter or its name: index of its first element in the whole} for shards, in multiples of 8: shards of
            one parameter then draw what the whole would have drawn.
        nonfinite: on a gradient with infinities or NaN in active elements: "raise" :class:`NonFiniteGradientError`, "skip"
            the step and count it in ``skipped_steps``, both before anything is written; or "propagate", without looking
            (which saves a pass over the gradients and a synchronisation).

    Raises: ValueError or TypeError that names the parameter.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
        seed: int = 0,
        masks: Mapping[str, Tensor] | Mapping[Tensor, Tensor] | None = None,
        compact: bool | None = None,
        track_changes: bool = False,
        offsets: Mapping[str, int] | Mapping[Tensor, int] | None = None,
        nonfinite: str = "raise",
    ):
        for name, value, fits in (
            ("lr", lr, lr >= 0),
            ("eps", eps, eps >= 0),
            ("weight_decay", weight_decay, weight_decay >= 0),
            ("betas", betas, len(betas) == 2 and all(0 <= b < 1 for b in betas)),
            ("nonfinite", nonfinite, nonfinite in _POLICIES),
            ("seed", seed, isinstance(seed, int) and -(2**63) <= seed < 2**63),
        ):
            if not fits:
                raise ValueError(f"AdamW: {name} does not fit, got {value!r}")
        _refuse_options(
            dict(amsgrad=amsgrad, maximize=maximize, foreach=foreach, capturable=capturable, fused=fused)
            | dict(differentiable=differentiable)
        )
        if master_weights and stochastic_rounding:
            raise ValueError("AdamW: expected master_weights or stochastic_rounding, got both")
        self.master_weights, self.stochastic_rounding, self.seed = master_weights, stochastic_rounding, seed
        self.compact, self.track_changes, self.nonfinite, self.skipped_steps = compact, track_changes, nonfinite, 0
        self._masks: dict[Tensor, Tensor] = {}
        self._prefixes: dict[Tensor, Tensor] = {}
        self._firsts: dict[Tensor, int] = {}
        self._changes: dict[Tensor, Tensor] = {}
        self._versions: dict[Tensor, tuple] = {}
        self._known: list[Tensor] = []  # the parameters, as last seen in the groups
        self._memory: Memory | None = None  # looked at once for all groups, below
        super().__init__(params, dict(lr=lr, betas=tuple(map(float, betas)), eps=eps, weight_decay=weight_decay))
        self._memory = Memory()
        self._refuse_overlaps()
        for p, words in self._by_parameter(masks, "masks"):
            self._set_mask(p, words, self._masks, self._prefixes)
        for p, first in self._by_parameter(offsets, "offsets"):
            if not isinstance(first, int) or first < 0 or first % 8:
                raise ValueError(f"AdamW: expected offsets in multiples of 8, got {first!r} for {self._name(p)}")
            self._firsts[p] = first

    # what is stepped

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if self._memory is not None:
            self._follow()
        if isinstance(param_group, dict):
            _refuse_options(param_group)
            for name in _DROPPED:
                param_group.pop(name, None)
        super().add_param_group(param_group)
        params = self.param_groups[-1]["params"]
        try:
            for p in params:
                self._refuse_unsupported(p)
            if self._memory is not None:
                self._refuse_overlaps()
        except Exception:
            del self.param_groups[-1]
            raise
        self._known += params
        if self.track_changes:
            for p in params:
                self._changes[p], self._versions[p] = _no_changes(p), _version(p)

    def _refuse_unsupported(self, p: Tensor) -> None:
        if type(p).__name__ == "DTensor":
            raise TypeError(f"AdamW: {self._name(p)} is a DTensor, which is not supported")
        if p.dtype not in _DTYPES:
            raise TypeError(f"AdamW: expected fp32, bf16, fp16 or fp64, got {p.dtype} for {self._name(p)}")

    def _follow(self) -> None:
        """Look at the groups again, which others (accelerate, for one) write to, and at where the parameters are."""
        params = list(self._parameters())
        if len(params) != len(self._known) or not all(map(is_, params, self._known)):
            self._take_over(params)
        for kept in (self._masks, self._prefixes):
            for p, words in kept.items():
                if words.device != p.device:
                    kept[p] = words.to(p.device)

    @torch.no_grad()
    def _take_over(self, params: list[Tensor]) -> None:
        """``params`` are those in the groups now: in the place of another one, they take what is kept of that."""
        before, now = set(self._known), set(params)
        places = zip(self._known, params, strict=True) if len(params) == len(self._known) else ()
        heirs = {p: q for p, q in places if p not in now and q not in before}
        for q in now - before:
            self._refuse_unsupported(q)
        for p, q in heirs.items():
            if p.shape != q.shape and (p in self._masks or p in self._firsts or self.state.get(p)):
                raise ValueError(f"AdamW: {self._name(q)} is {list(q.shape)}, in the place of one {list(p.shape)}")
        if self.track_changes:
            self._changes |= {q: _no_changes(q) for q in now - before}
            self._versions |= {q: _version(q) for q in now - before}
            for p, q in heirs.items():
                self._see_foreign_writes(p)
                shared = p.data_ptr() == q.data_ptr() and _version(q)[0] not in (0, _version(p)[0])
                if p.shape == q.shape and p.dtype is q.dtype and p.untyped_storage().nbytes() and not shared:
                    differs = bits.pack(bits.bitcast(p) != bits.bitcast(q.to(p.device)))
                    self._changes[q].copy_(self._changes[p].to(p.device) | differs)
                else:
                    self.mark_all_changed(q)
        for kept in (self._masks, self._prefixes, self._firsts, self.state):
            for p in before - now & kept.keys():
                value = kept.pop(p)
                if p in heirs:
                    kept[heirs[p]] = value  # type: ignore[assignment]  # where it was
        self._changes = {p: self._changes[p] for p in params if p in self._changes}
        self._known, self._memory = params, Memory()

    def _parameters(self) -> Iterable[Tensor]:
        return (p for group in self.param_groups for p in group["params"])

    def _name(self, p: Tensor) -> str:
        for n, group in enumerate(self.param_groups):
            for i, q in enumerate(group["params"]):
                if p is q:
                    return group["param_names"][i] if "param_names" in group else f"parameter {i} of group {n}"
        return f"a parameter {list(p.shape)}"

    def _by_parameter(self, values, what: str):
        """(parameter, value) of a dict keyed by parameters or their names."""
        names: dict[str, Tensor] = {}
        for group in self.param_groups:
            names.update(zip(group.get("param_names", ()), group["params"], strict=False))
        known = set(self._parameters())
        for key, value in (values or {}).items():
            p = names.get(key) if isinstance(key, str) else key
            if p is None or p not in known:
                shown = repr(key) if isinstance(key, str) else f"a tensor {list(key.shape)}"
                raise ValueError(f"AdamW: {what} has {shown}, which is none of the parameters")
            yield p, value

    def _refuse_overlaps(self) -> None:
        """Of the last group's parameters with each other and with all before; with all anew where those have moved."""
        params = self.param_groups[-1]["params"]
        before = [p.data_ptr() for group in self.param_groups[:-1] for p in group["params"]]
        if self._memory is None or before != self._memory.pointers:
            self._memory, params = Memory(), list(self._parameters())
        if overlapping := self._memory.add(params):
            self._memory = Memory()
            names = " and ".join(map(self._name, overlapping))
            raise ValueError(f"AdamW: {names} overlap{'s itself' if len(overlapping) == 1 else ''} in memory")

    def _set_mask(self, p: Tensor, words, masks: dict[Tensor, Tensor], prefixes: dict[Tensor, Tensor]) -> None:
        expected = -(-p.numel() // 32)
        if not isinstance(words, Tensor) or words.dtype is not torch.int32:
            got = getattr(words, "dtype", type(words).__name__)
            raise TypeError(f"AdamW: expected masks as int32 words, got {got}")
        if words.shape != (expected,) or words.device != p.device:
            raise ValueError(
                f"AdamW: expected a mask of {expected} words on {p.device} for {self._name(p)} {list(p.shape)},"
                f" got {list(words.shape)} on {words.device}"
            )
        words = words.contiguous().clone()
        if tail := p.numel() % 32:
            words[-1] &= (1 << tail) - 1 if tail < 31 else 0x7FFFFFFF
        masks[p] = words
        offsets = adamw.block_offsets(words, p.numel())
        if self.compact or (self.compact is None and 2 * int(offsets[-1]) < p.numel()):
            prefixes[p] = offsets

    @property
    def masks(self) -> dict[Tensor, Tensor]:
        """{parameter: words} of those that train in part; copies."""
        self._follow()
        return {p: words.clone() for p, words in self._masks.items()}

    # the step

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step of every parameter that has a gradient.  Returns the closure's loss, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._follow()
        work, streams = [], {p: i for i, p in enumerate(self._parameters())}
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    if p.grad.is_sparse:
                        raise TypeError(f"AdamW: {self._name(p)} has a sparse gradient")
                    work.append((group, p))
        if self.nonfinite != "propagate" and (bad := self._first_nonfinite([p for _, p in work])) is not None:
            if self.nonfinite == "raise":
                raise NonFiniteGradientError(f"the gradient of {self._name(bad)} is not finite; nothing was written")
            self.skipped_steps += 1
            return loss
        for p in self._changes:  # before anything is written: views of one tensor share its version
            self._see_foreign_writes(p)
        calls: dict[tuple, list] = {}
        states = [self._state(p) for _, p in work]
        for (group, p), state in zip(work, states, strict=True):
            state["step"] += 1
            g = p.grad if p.grad.dtype is p.dtype else p.grad.float()
            key = (p.device, p.dtype, g.dtype, id(group), float(state["step"]))
            calls.setdefault(key, [group]).append((p, g))
        for (_, dtype, _, _, step), (group, *pairs) in calls.items():
            self._call(group, pairs, int(step), streams, self.stochastic_rounding and dtype.itemsize == 2)
        for p in self._changes:
            self._versions[p] = _version(p)
        return loss

    def _call(self, group, pairs, step, streams, stochastic) -> None:
        none = torch.empty(0)
        params, back = [], []
        for p, _ in pairs:
            params.append(p if p.is_contiguous() else p.contiguous())
            if params[-1] is not p:
                back.append((p, params[-1]))
        states = [self.state[p] for p, _ in pairs]

        def all_or_none(values):
            return [none if t is None else t for t in values] if any(t is not None for t in values) else []

        beta1, beta2 = map(float, group["betas"])
        lr, decay, eps = (float(group[name]) for name in ("lr", "weight_decay", "eps"))
        corrections = lr / (1 - beta1**step), math.sqrt(1 - beta2**step)
        scalars = [1.0, 1 - beta1, beta2, 1 - beta2, 1 - lr * decay, *corrections, eps]
        adamw.step(
            params,
            [g.contiguous() for _, g in pairs],
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            all_or_none([s.get("master") for s in states]),
            all_or_none([self._masks.get(p) for p, _ in pairs]),
            all_or_none([self._prefixes.get(p) for p, _ in pairs]),
            all_or_none([self._changes.get(p) for p, _ in pairs]),
            [self._firsts.get(p, 0) for p, _ in pairs],
            [streams[p] for p, _ in pairs],
            scalars,
            self.seed,
            step,
            stochastic,
        )
        for p, copy in back:
            p.copy_(copy)

    def _state(self, p: Tensor) -> dict:
        """p's, in the dtypes and on the device that it has by now."""
        state, dtype = self.state[p], _moment_dtype(p)
        if not state:
            size = p.shape if p not in self._prefixes else (int(self._prefixes[p][-1]),)
            state["step"] = _zeros((), torch.float32, torch.device("cpu"))
            state.update({name: _zeros(size, dtype, p.device) for name in _MOMENTS})
        for name in _MOMENTS:
            if state[name].dtype is not dtype or state[name].device != p.device:
                state[name] = state[name].to(p.device, dtype)
            if p not in self._prefixes and state[name].numel() != p.numel():
                raise ValueError(
                    f"AdamW: {self._name(p)} has {p.numel()} elements by now, its {name} {state[name].numel()}"
                )
        master = state.get("master")
        if not (self.master_weights and p.dtype.itemsize == 2):
            state.pop("master", None)
        elif master is None:
            state["master"] = _ordinary(lambda: p.detach().float().contiguous())
        elif master.device != p.device:
            state["master"] = master.to(p.device)
        return state

    # gradients

    def _active_gradient(self, p: Tensor) -> Tensor:
        g: Tensor = p.grad  # type: ignore[assignment]  # of parameters that have one
        return g if p not in self._masks else g.masked_fill(~bits.unpack(self._masks[p], p.shape), 0)

    def _first_nonfinite(self, params: list[Tensor]) -> Tensor | None:
        by_device: dict[torch.device, list[Tensor]] = {}
        for p in params:
            if p.numel():
                by_device.setdefault(p.device, []).append(p)
        for on_device in by_device.values():
            largest = torch._foreach_norm([p.grad for p in on_device], math.inf)  # type: ignore[misc]  # as above
            for p, finite in zip(on_device, torch.stack([n.float() for n in largest]).isfinite().tolist(), strict=True):
                if not finite and not self._active_gradient(p).isfinite().all():
                    return p
        return None

    @torch.no_grad()
    def grad_norm(self) -> Tensor:
        """The 2-norm of all gradients together, active elements only; 0-d, fp32.  Waits for the device if there are several."""
        self._follow()
        norms: dict[torch.device, list[Tensor]] = {}
        for p in self._parameters():
            if p.grad is not None:
                norm = torch.linalg.vector_norm(self._active_gradient(p), dtype=torch.float32)
                norms.setdefault(p.device, []).append(norm)
        per_device = [torch.linalg.vector_norm(torch.stack(of)) for of in norms.values()]
        if len(per_device) == 1:
            return per_device[0]
        return torch.linalg.vector_norm(torch.tensor([float(norm) for norm in per_device]))

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """torch.nn.utils.clip_grad_norm_ with :meth:`grad_norm`; returns the norm before."""
        norm = self.grad_norm()
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        by_device: dict[torch.device, list[Tensor]] = {}
        for p in self._parameters():
            if p.grad is not None:
                by_device.setdefault(p.device, []).append(p.grad)
        if scale.is_cuda or not scale >= 1:  # to know it there would mean to wait
            for device, grads in by_device.items():
                torch._foreach_mul_(grads, scale.to(device))
        return norm

    # changes

    def changes(self) -> dict[Tensor, Tensor]:
        """{parameter: int32 words}: what changed since :meth:`zero_changes`, bit by bit (:mod:`lowrank.bits`); copies."""
        self._need_tracking()
        self._follow()
        for p in self._changes:
            self._see_foreign_writes(p)
        return {p: words.clone() for p, words in self._changes.items()}

    def zero_changes(self) -> None:
        """From here on."""
        self._need_tracking()
        self._follow()
        for p in self._changes:
            self._see_foreign_writes(p)
            self._changes[p].zero_()

    def mark_all_changed(self, p: Tensor | None = None) -> None:
        """Of one parameter, or of all: for writes that PyTorch does not count (into ``p.data``, by other processes)."""
        self._need_tracking()
        if p not in self._changes:
            self._follow()
        if p is not None and p not in self._changes:
            raise ValueError(f"AdamW: expected one of the parameters, got a tensor {list(p.shape)}")
        for q in self._changes if p is None else [p]:
            if self._changes[q].shape != (-(-q.numel() // 32),) or self._changes[q].device != q.device:
                self._changes[q] = _no_changes(q)
            words = self._changes[q]
            words.fill_(-1)
            if tail := q.numel() % 32:
                words[-1] = (1 << tail) - 1 if tail < 31 else 0x7FFFFFFF
            self._versions[q] = _version(q)

    def _need_tracking(self) -> None:
        if not self.track_changes:
            raise RuntimeError("AdamW: made without track_changes=True")

    def _see_foreign_writes(self, p: Tensor) -> None:
        now, seen = _version(p), self._versions[p]
        if now == seen:
            return
        if now[:2] == seen[:2] and p.device != seen[2]:  # moved, as it was
            self._changes[p], self._versions[p] = self._changes[p].to(p.device), now
        else:
            self.mark_all_changed(p)

    # copies and files

    def __getstate__(self) -> dict[str, Any]:
        self._follow()
        if self.track_changes:
            self.changes()  # with what others have written: a copy's versions count from elsewhere
        return super().__getstate__() | {name: getattr(self, name) for name in _KEPT}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_changes" in state:  # a copy; torch's load_state_dict comes here with groups and state alone
            self._known, self._memory = list(self._parameters()), Memory()
            self._versions = {p: _version(p) for p in self._changes}

    def state_dict(self) -> dict[str, Any]:
        """torch.optim.Optimizer's, with the masks in it: {index of the parameter: words}."""
        self._follow()
        state = super().state_dict()
        index = {p: i for i, p in enumerate(self._parameters())}
        state["masks"] = {index[p]: words.clone() for p, words in self._masks.items()}
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What :meth:`state_dict` gave, or torch.optim.AdamW's; moments stay fp32.  The weights have not changed.

        Masters are this optimizer's choice: with ``master_weights``, those that the state lacks are made from the weights;
        without, those that it has are left out, with a warning.

        Raises: ValueError if moments, masters or masks do not fit, before anything is written.
        """
        self._follow()
        params = list(self._parameters())
        states: dict[Tensor, dict] = {}
        masks, prefixes = self._masks, self._prefixes

        def take(_, loaded):  # after all other hooks; torch's load_state_dict would cast to 16 bits, and is quadratic
            nonlocal masks, prefixes
            sizes = [[len(g["params"]) for g in groups] for groups in (self.param_groups, loaded["param_groups"])]
            if sizes[0] != sizes[1]:
                return loaded  # which it refuses
            if "masks" in loaded:
                masks, prefixes = {}, {}
                for i, words in loaded["masks"].items():
                    self._set_mask(params[i], words.to(params[i].device), masks, prefixes)
            for i, state in self._in_order(loaded).items():
                if state:
                    states[params[i]] = self._fitted(params[i], state, prefixes.get(params[i]))
            groups = []
            for group in loaded["param_groups"]:
                # what chose among torch's implementations of one formula means nothing here
                _refuse_options({name: group.get(name) for name in ("amsgrad", "maximize")})
                groups.append({name: value for name, value in group.items() if name not in _DROPPED})
            return {key: value for key, value in loaded.items() if key != "masks"} | {
                "state": {},
                "param_groups": groups,
            }

        def put(_):
            self._masks, self._prefixes = masks, prefixes
            if not self.master_weights and any("master" in state for state in states.values()):
                warnings.warn("AdamW: made without master_weights: the state's masters are left out", stacklevel=3)
            self.state.update(states)
            for p in states:
                self._state(p)

        hooks = (
            self.register_load_state_dict_pre_hook(take),
            self.register_load_state_dict_post_hook(put, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def _fitted(self, p: Tensor, state: dict, prefix: Tensor | None) -> dict:
        """A copy of p's state, contiguous and in its dtypes."""
        active = p.numel() if prefix is None else int(prefix[-1])
        for name in (*_MOMENTS, *(["master"] if "master" in state else [])):
            expected, got = p.numel() if name == "master" else active, state.get(name)
            if not isinstance(got, Tensor) or got.numel() != expected:
                got = got.numel() if isinstance(got, Tensor) else "none"
                raise ValueError(
                    f"AdamW: expected {name} with {expected} elements for {self._name(p)}, got {got}: another mask?"
                )
        with torch.inference_mode(False), torch.no_grad():
            fitted = {
                name: value.to(p.device, _moment_dtype(p), copy=True, memory_format=torch.contiguous_format)
                if isinstance(value, Tensor)
                else value
                for name, value in state.items()
            }
            fitted["step"] = torch.tensor(float(state.get("step", 0.0)), dtype=torch.float32, device="cpu")
        return fitted

    @staticmethod
    def _in_order(state_dict) -> dict[int, dict]:
        """state by position among all parameters."""
        ids = (i for group in state_dict["param_groups"] for i in group["params"])
        return {n: state_dict["state"][i] for n, i in enumerate(ids) if i in state_dict["state"]}
