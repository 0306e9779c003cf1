"""lowrank.optim.AdamW: against torch's, against fp64, in each native form and in PyTorch."""

import copy
import io
import itertools
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank import _native, bits
from lowrank.ops import adamw
from lowrank.optim import AdamW, NonFiniteGradientError

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
FORMS = ["baseline", "avx2", "avx512", "torch"]
SIZES = [0, 1, 7, 8, 9, 1023, 1024, 1025, 5000]


@pytest.fixture(params=FORMS)
def form(request, monkeypatch):
    """Each instruction set of csrc/adamw, and PyTorch."""
    if request.param == "torch":
        monkeypatch.setenv("LOWRANK_BACKEND", "eager")
    elif not _native.available("cpu"):
        pytest.skip(str(_native.why_not("cpu")))
    else:
        monkeypatch.setenv("LOWRANK_ISA", request.param)
        try:
            AdamW([parameter(torch.ones(1))]).step()
            one = parameter(torch.ones(1))
            one.grad = torch.ones(1)
            AdamW([one]).step()
        except RuntimeError as error:
            pytest.skip(str(error))
    return request.param


def parameter(t):
    return torch.nn.Parameter(t.detach().clone())


def with_grads(sizes, dtype, grad_dtype=None, seed=0):
    generator = torch.Generator().manual_seed(seed)  # on the CPU whatever the device
    params = [parameter(torch.randn(n, generator=generator).to(dtype)) for n in sizes]
    new_grads(params, grad_dtype or dtype, generator)
    return params, generator


def new_grads(params, dtype, generator):
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(dtype).to(p.device, p.dtype)


def raw(t):
    return t.detach().contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


def same_bits(a, b):
    return torch.equal(raw(a), raw(b))


# against torch.optim.AdamW


def test_one_step_is_torchs(form):
    """From equal states, which 20 steps of torch.optim.AdamW made: each number as near to fp64's as its roundings allow."""
    params, generator = with_grads(SIZES, FP32)
    torch_adamw = torch.optim.AdamW(params, lr=3e-3, weight_decay=0.1, foreach=False, fused=False)
    for _ in range(20):
        new_grads(params, FP32, generator)
        torch_adamw.step()
    copies = [parameter(p) for p in params]
    for p, q in zip(params, copies, strict=True):
        q.grad = p.grad.clone()
    ours = AdamW(copies, lr=3e-3, weight_decay=0.1)
    ours.load_state_dict(copy.deepcopy(torch_adamw.state_dict()))
    start = [
        (p.detach().clone(), *(torch_adamw.state[p][name].clone() for name in ("exp_avg", "exp_avg_sq")))
        for p in params
    ]
    ours.step()
    u = torch.finfo(FP32).eps / 2
    for q, (old, m, v) in zip(copies, start, strict=True):
        state, g = ours.state[q], q.grad.double()
        m, v = [0.9 * m.double(), 0.1 * g], [0.999 * v.double(), 0.001 * g * g]
        for moment, terms in ((state["exp_avg"], m), (state["exp_avg_sq"], v)):
            assert ((moment - sum(terms)).abs() <= 4 * u * sum(t.abs() for t in terms)).all()
        denominator = (sum(v) / (1 - 0.999**21)).sqrt() + 1e-8
        kept, moved = old.double() * (1 - 3e-3 * 0.1), (3e-3 / (1 - 0.9**21)) / denominator
        bound = 4 * u * (kept.abs() + moved * sum(t.abs() for t in m))
        assert ((q - (kept - moved * sum(m))).abs() <= bound).all()
        assert float(state["step"]) == 21
        # torch's sqrt (MKL's) is off by one in a fifth of all numbers; with one that rounds correctly its bits are ours
        denominator = state["exp_avg_sq"].double().sqrt().float().div_(math.sqrt(1 - 0.999**21)).add_(1e-8)
        exact = old.mul(1 - 3e-3 * 0.1).addcdiv_(state["exp_avg"], denominator, value=-3e-3 / (1 - 0.9**21))
        assert form == "torch" or same_bits(q, exact)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("master", [False, True])
def test_a_run_is_fp64s(form, dtype, master):
    """Masters follow fp64's run; without, a 16-bit parameter is off by its own rounding."""
    params, generator = with_grads([257], dtype)
    in_fp64 = parameter(params[0].double())
    reference = torch.optim.AdamW([in_fp64], lr=1e-2, foreach=False)
    optimizer = AdamW(params, lr=1e-2, master_weights=master)
    for _ in range(10):
        new_grads(params, dtype, generator)
        in_fp64.grad = params[0].grad.double()
        optimizer.step()
        reference.step()
    if master and dtype is not FP32:
        assert (optimizer.state[params[0]]["master"] - in_fp64).abs().max() < 1e-6
        assert same_bits(params[0], optimizer.state[params[0]]["master"].to(dtype))
    limit = {FP32: 1e-6, BF16: 10 * 2**-8 * 4, FP16: 10 * 2**-11 * 4}[dtype]
    assert (params[0].double() - in_fp64).abs().max() < limit


def test_native_forms_give_the_same_bits(monkeypatch):
    """Instruction sets exactly; PyTorch to an ulp of the moments (it fuses nothing)."""
    if not _native.available("cpu"):
        pytest.skip(str(_native.why_not("cpu")))
    by_isa = {}
    for isa in ("baseline", "avx2", "avx512"):
        monkeypatch.setenv("LOWRANK_ISA", isa)
        try:
            by_isa[isa] = run_everything()
        except RuntimeError:
            continue
    assert len(by_isa) > 1
    first = by_isa.pop("baseline")
    for values in by_isa.values():
        assert all(same_bits(a, b) for a, b in zip(first, values, strict=True))
    monkeypatch.delenv("LOWRANK_ISA")
    threads = torch.get_num_threads()
    for count in (1, 2):
        torch.set_num_threads(count)
        assert all(same_bits(a, b) for a, b in zip(first, run_everything(), strict=True))
    torch.set_num_threads(threads)


def run_everything(device="cpu"):
    tensors = []
    for dtype, (stochastic, master) in itertools.product([FP32, BF16, FP16], [(0, 0), (1, 0), (0, 1)]):
        params, generator = with_grads([*SIZES, 70_000], dtype)
        masks = {p: bits.pack(torch.rand(p.shape, generator=generator) < 0.3) for p in params[2::2]}
        if device != "cpu":
            moved = {p: torch.nn.Parameter(p.detach().to(device)) for p in params}
            params, masks = list(moved.values()), {moved[p]: words.to(device) for p, words in masks.items()}
        optimizer = AdamW(
            params, masks=masks, stochastic_rounding=bool(stochastic), master_weights=bool(master), track_changes=True
        )
        for _ in range(3):
            new_grads(params, dtype, generator)
            optimizer.step()
        tensors += [*params, *optimizer.changes().values()]
        tensors += [v for p in params for v in optimizer.state[p].values() if v.dim()]
    return tensors


SPECIAL = [math.nan, math.inf, -math.inf, -0.0, 0.0, 1e-42, -1e-40, 3e38, -65504.0, 1e-7]


@settings(max_examples=60, deadline=None)
@given(
    numel=st.integers(0, 5000),
    dtype=st.sampled_from([FP32, BF16, FP16]),
    density=st.sampled_from([0.0, 0.05, 0.4, 1.0]),
    how=st.sampled_from([{}, dict(stochastic_rounding=True), dict(master_weights=True)]),
    compact=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_length_mask_and_value(numel, dtype, density, how, compact, seed):
    """Inactive elements keep every bit, the map is what differs, and a dense step gives active ones the same bits."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(numel, generator=generator)
    odd = torch.rand(numel, generator=generator) < 0.1
    values[odd] = torch.tensor(SPECIAL)[torch.randint(len(SPECIAL), (numel,), generator=generator)][odd]
    p, q = parameter(values.to(dtype)), parameter(values.to(dtype))
    active = torch.rand(numel, generator=generator) < density
    before = p.detach().clone()
    p.grad = torch.randn(numel, generator=generator).to(dtype)
    q.grad = p.grad.clone()
    options = dict(lr=0.1, nonfinite="propagate", track_changes=True, seed=seed, **how)
    ours = AdamW([p], masks={p: bits.pack(active)}, compact=compact, **options)
    dense = AdamW([q], **options)
    ours.step(), dense.step()
    assert torch.equal(raw(p)[~active], raw(before)[~active])
    assert torch.equal(raw(p)[active], raw(q)[active])
    assert torch.equal(bits.unpack(ours.changes()[p], p.shape), raw(p) != raw(before))
    for name in ("exp_avg", "exp_avg_sq"):
        masked_moment, dense_moment = ours.state[p][name], dense.state[q][name]
        assert torch.equal(raw(masked_moment if compact else masked_moment[active]), raw(dense_moment[active]))
        assert compact or not masked_moment[~active].any()


@pytest.mark.gpu
def test_a_gpu_gives_the_cpus_bits():
    if not (_native.available("cpu") and _native.available("cuda")):
        pytest.skip(f"{_native.why_not('cpu')}; {_native.why_not('cuda')}")
    pairs = zip(run_everything(), run_everything("cuda"), strict=True)
    assert all(same_bits(a, b.cpu()) for a, b in pairs)


def test_special_values(form):
    """NaN and infinities behave as torch's; zeros keep their sign where nothing moves them."""
    values = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 0.0, 1e-42, -1e-42, 3e38] * 3)
    grads = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1e-40, -1e38] * 2 + [math.inf, math.nan, 0.0, -0.0] * 2)
    p, q = parameter(values), parameter(values)
    p.grad, q.grad = grads.clone(), grads.clone()
    torch.optim.AdamW([p], lr=0.1, foreach=False).step()
    AdamW([q], lr=0.1, nonfinite="propagate").step()
    assert torch.equal(p.isnan(), q.isnan())
    assert torch.equal(p.signbit()[~p.isnan()], q.signbit()[~p.isnan()])
    torch.testing.assert_close(p, q, equal_nan=True)


# stochastic rounding


def test_philox_is_salmons():
    """Known answers of Random123 for philox4x32-10 with zeros, and with all bits set."""
    halves = adamw.random_bits(8, 0, 0, 0, 0)
    words = [int(halves[2 * i]) | int(halves[2 * i + 1]) << 16 for i in range(4)]
    assert words == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    want = philox(0, 0, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0)
    halves = adamw.random_bits(8, 0, 0x13198A2E, 0x299F31D0A4093822, 0x03707344)
    assert [int(halves[2 * i]) | int(halves[2 * i + 1]) << 16 for i in range(4)] == want
    assert philox(0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0) == [
        0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1,
    ]  # fmt: skip


def philox(c0, c1, c2, c3, k0, k1):
    """Salmon et al. 2011, in Python's integers."""
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = b >> 32 ^ c1 ^ k0, b & 0xFFFFFFFF, a >> 32 ^ c3 ^ k1, a & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return [c0, c1, c2, c3]


def rounded(values, dtype, seed, step=1, first=0):
    """``values`` stored by one step that moves nothing: lr 0 on a 16-bit parameter would keep its bits, so by the formula."""
    return adamw.round_stochastically(values, dtype, first, 0, seed, step)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_stochastic_rounding_is_unbiased(dtype):
    """The mean over 4,096 seeds is x within 4 sigma, and every result is one of x's two neighbours."""
    x = torch.tensor([1.0 + 2**-12, -1.7, 3e-3, 0.1, 1e-7, -3e-6, 5.97e-8, 100.3])
    draws = torch.stack([rounded(x, dtype, seed).double() for seed in range(4096)])
    nearest = x.to(dtype).double()
    step = torch.tensor([2.0**-24]) if dtype is FP16 else torch.tensor([0.0])
    for i, value in enumerate(x.double()):
        outcomes = draws[:, i].unique()
        assert len(outcomes) <= 2
        assert nearest[i] in outcomes
        if len(outcomes) == 2:
            low, high = outcomes.tolist()
            assert low < value < high
            share = float((value - low) / (high - low))
            sigma = (high - low) * math.sqrt(share * (1 - share) / 4096)
            assert abs(draws[:, i].mean() - value) < 4 * sigma + (high - low) * 2**-16
        else:
            assert abs(outcomes[0] - value) <= max(abs(value) * 2**-16, float(step[0]) * 2**-16)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_what_stochastic_rounding_leaves(dtype):
    """Representable numbers, infinities and NaN are themselves; the largest number does not become infinite."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    for seed in range(3):
        results = rounded(every.float(), dtype, seed)
        finite = ~every.isnan()
        assert same_bits(results[finite], every[finite])
        assert results[~finite].isnan().all()
    top = torch.finfo(dtype).max
    assert rounded(torch.full((64,), top * (1 + 2**-12)), dtype, 1).float().eq(top).all()


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_native_rounding_is_the_formula(form, dtype):
    """A step of fp32 masters beside a step of 16-bit parameters: what is stored is the formula of what was computed."""
    if form == "torch":
        pytest.skip("it is the formula")
    params, _ = with_grads([5000], dtype)
    values = params[0].detach().clone()
    grad = params[0].grad.clone()
    AdamW(params, lr=0.01, stochastic_rounding=True, seed=-5).step()
    in_fp32 = parameter(values.float())
    in_fp32.grad = grad.float()
    AdamW([in_fp32], lr=0.01).step()
    assert same_bits(params[0], adamw.round_stochastically(in_fp32.detach(), dtype, 0, 0, -5, 1))


def test_small_updates_survive_on_average():
    """1,000 updates of a thousandth of bf16's spacing: lost to the nearest, kept stochastically."""
    moved = {}
    for stochastic in (False, True):
        p = parameter(torch.ones(4096, dtype=BF16))
        optimizer = AdamW([p], lr=2**-8 / 1000, weight_decay=0, stochastic_rounding=stochastic)
        for _ in range(1000):
            p.grad = torch.ones_like(p)
            optimizer.step()
        moved[stochastic] = 1 - float(p.float().mean())
    assert moved[False] == 0
    assert moved[True] == pytest.approx(2**-8, rel=0.05)


def test_shards_draw_what_the_whole_would(form):
    whole, _ = with_grads([5000], BF16)
    cut = 1608
    parts = [parameter(whole[0][:cut]), parameter(whole[0][cut:])]
    for part, grad in zip(parts, whole[0].grad.split([cut, 5000 - cut]), strict=True):
        part.grad = grad.clone()
    AdamW(whole, stochastic_rounding=True, seed=3).step()
    AdamW(parts[:1], stochastic_rounding=True, seed=3).step()
    AdamW(parts[1:], stochastic_rounding=True, seed=3, offsets={parts[1]: cut}).step()
    assert same_bits(whole[0], torch.cat([p.detach() for p in parts]))


def test_parameters_seeds_and_steps_draw_apart():
    def run(seed, steps=1):
        params = [parameter(torch.full((4096,), 1.001).to(BF16)) for _ in range(2)]
        optimizer = AdamW(params, lr=1e-4, weight_decay=0, stochastic_rounding=True, seed=seed)
        for _ in range(steps):
            for p in params:
                p.grad = torch.ones_like(p)
            optimizer.step()
        return [p.detach().clone() for p in params]

    (a, b), (c, _) = run(0), run(1)
    assert same_bits(a, run(0)[0])
    assert not same_bits(a, b)
    assert not same_bits(a, c)


# masks


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_masked_elements_are_left_alone(form, dtype, compact):
    """Active ones go as without a mask; NaN where nothing may be read."""
    whole, generator = with_grads(SIZES, dtype)
    masked = [parameter(p) for p in whole]
    active = [torch.rand(p.shape, generator=generator) < 0.4 for p in whole]
    masks = dict(zip(masked, map(bits.pack, active), strict=True))
    ours = AdamW(masked, masks=masks, compact=compact, track_changes=True)
    plain = AdamW(whole)
    before = [p.detach().clone() for p in masked]
    for _ in range(3):
        new_grads(whole, dtype, generator)
        for p, q, on in zip(whole, masked, active, strict=True):
            q.grad = torch.where(on, p.grad, math.nan)
        plain.step()
        ours.step()
    for p, q, on, old in zip(whole, masked, active, before, strict=True):
        assert same_bits(q[on], p[on])
        assert same_bits(q[~on], old[~on])
        state = ours.state[q]
        assert state["exp_avg"].shape == ((int(on.sum()),) if compact else p.shape)
        for name in ("exp_avg", "exp_avg_sq"):
            moment = state[name] if compact else state[name][on]
            assert same_bits(moment, plain.state[p][name][on])
            assert compact or (state[name][~on] == 0).all()
        changed = bits.unpack(ours.changes()[q], q.shape)  # some of them back again
        assert not (changed & ~on).any()
        assert changed[raw(q) != raw(old)].all()


def test_compact_state_is_chosen_by_density():
    p, q = parameter(torch.ones(64)), parameter(torch.ones(64))
    sparse, dense = torch.arange(64) < 20, torch.arange(64) < 40
    optimizer = AdamW([("p", p), ("q", q)], masks={"p": bits.pack(sparse), "q": bits.pack(dense)})
    p.grad, q.grad = torch.ones(64), torch.ones(64)
    optimizer.step()
    assert [optimizer.state[t]["exp_avg"].numel() for t in (p, q)] == [20, 64]


def test_gradient_norm_is_of_active_elements():
    p, q = parameter(torch.ones(40)), parameter(torch.ones(3))
    p.grad, q.grad = torch.full((40,), 2.0), torch.full((3,), 3.0)
    optimizer = AdamW([p, q], masks={p: bits.pack(torch.arange(40) < 4)})
    p.grad[10:] = math.nan
    assert float(optimizer.grad_norm()) == pytest.approx(math.sqrt(4 * 4 + 3 * 9))
    assert float(optimizer.clip_grad_norm_(1.0)) == pytest.approx(math.sqrt(43))
    assert float(optimizer.grad_norm()) == pytest.approx(1.0, rel=1e-5)
    before = q.grad.clone()
    optimizer.clip_grad_norm_(5.0)
    assert torch.equal(q.grad, before)


# changes


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
def test_changes_are_what_changed(form, dtype):
    params, generator = with_grads(SIZES, dtype)
    optimizer = AdamW(params, lr=1e-4, track_changes=True)
    start = [p.detach().clone() for p in params]
    ever = [torch.zeros(p.shape, dtype=torch.bool) for p in params]
    for _ in range(4):
        before = [p.detach().clone() for p in params]
        new_grads(params, dtype, generator)
        optimizer.step()
        for seen, p, old in zip(ever, params, before, strict=True):
            seen |= raw(p) != raw(old)
    for p, seen in zip(params, ever, strict=True):
        words = optimizer.changes()[p]
        assert torch.equal(bits.unpack(words, p.shape), seen)
        assert same_bits(words, bits.pack(seen))  # no bit after the last element
    if dtype is not FP32:
        assert not all(seen.all() for seen in ever if seen.numel() > 100)
    optimizer.zero_changes()
    assert not any(words.any() for words in optimizer.changes().values())
    assert not all(same_bits(p, old) for p, old in zip(params, start, strict=True))


def test_maps_and_masks_are_copies():
    """What was asked for stays what it was, and cannot reach what the next step goes by."""
    p = parameter(torch.ones(64))
    optimizer = AdamW([p], masks={p: bits.pack(torch.arange(64) < 5)}, track_changes=True)
    p.grad = torch.ones(64)
    optimizer.step()
    changes, expected = optimizer.changes(), bits.pack(torch.arange(64) < 5)
    optimizer.masks[p].fill_(-1)
    optimizer.state_dict()["masks"][0].fill_(-1)
    optimizer.zero_changes()
    assert torch.equal(changes[p], expected)
    optimizer.step()
    assert torch.equal(optimizer.changes()[p], expected)
    changes[p].zero_()
    assert torch.equal(optimizer.changes()[p], expected)


def test_foreign_writes_are_seen():
    p, q = parameter(torch.ones(40)), parameter(torch.ones(40))
    optimizer = AdamW([p, q], track_changes=True)
    all_of_40 = bits.pack(torch.ones(40, dtype=torch.bool))
    with torch.no_grad():
        p.mul_(2)
    assert torch.equal(optimizer.changes()[p], all_of_40)
    assert not optimizer.changes()[q].any()
    optimizer.zero_changes()
    q.data.mul_(2)
    assert not optimizer.changes()[q].any()  # PyTorch does not count it
    optimizer.mark_all_changed(q)
    assert torch.equal(optimizer.changes()[q], all_of_40)
    optimizer.zero_changes()
    with torch.no_grad():
        p.add_(1)
    p.grad = torch.zeros(40)
    optimizer.step()  # before the step, not only between it and changes()
    assert torch.equal(optimizer.changes()[p], all_of_40)
    optimizer.zero_changes()
    q.data = q.data.clone()
    assert torch.equal(optimizer.changes()[q], all_of_40)
    assert not optimizer.changes()[p].any()
    optimizer.zero_changes()
    assert not optimizer.changes()[q].any()
    q.data = q.data.to(BF16)
    assert torch.equal(optimizer.changes()[q], all_of_40)
    q.data = torch.ones(3)
    assert bits.unpack(optimizer.changes()[q], (3,)).all()
    with pytest.raises(RuntimeError, match="track_changes"):
        AdamW([p]).changes()


# replaced parameters


def switch(optimizer, others):
    """As accelerate does where a model's parameters become others."""
    for group in optimizer.param_groups:
        group["params"] = [others.get(p, p) for p in group["params"]]


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("density", [0.1, 0.7, 1])
def test_who_takes_a_parameters_place_takes_its_mask_and_state(steps, density):
    """The run goes on bit for bit, and nothing counts as changed that has not."""
    both = []
    for switched in (False, True):
        params, generator = with_grads([3000, 50, 100], BF16)
        masks = {"a": bits.pack(torch.rand(3000, generator=generator) < density)} if density < 1 else {}
        options = dict(master_weights=True, track_changes=True, offsets={"b": 8})
        named = list(zip("abc", params, strict=True))
        optimizer = AdamW([{"params": named[:1]}, {"params": named[1:], "lr": 0.1}], masks=masks, **options)
        for _ in range(steps):
            optimizer.step()
            new_grads(params, BF16, generator)
        optimizer.zero_changes()
        if switched:
            others = {p: parameter(p) for p in params[:2]}
            switch(optimizer, others)
            params = [others.get(p, p) for p in params]
            assert not any(words.any() for words in optimizer.changes().values())
            assert list(optimizer.changes()) == params
            assert list(optimizer.masks) == params[: len(masks)]
            assert optimizer.state.keys() <= set(params)
        for _ in range(2):
            new_grads(params, BF16, generator)
            optimizer.step()
        saved = optimizer.state_dict()
        state = [t for _, state in sorted(saved["state"].items()) for t in state.values() if t.dim()]
        both.append([*params, *optimizer.changes().values(), *saved["masks"].values(), *state])
    assert all(same_bits(a, b) for a, b in zip(*both, strict=True))


def test_what_a_new_parameter_holds_is_compared():
    p, q, r = (parameter(torch.ones(40)) for _ in range(3))
    optimizer = AdamW([p, q, r], track_changes=True)
    with torch.no_grad():
        r.mul_(1)  # a write before: all of it
    others = {t: parameter(t) for t in (p, q, r)}
    others[p].data[7] = 3
    with torch.no_grad():
        others[q].detach_()  # the same
    switch(optimizer, others)
    masks = [bits.unpack(optimizer.changes()[others[t]], (40,)) for t in (p, q, r)]
    assert [int(masks[0].sum()), bool(masks[0][7])] == [1, True]
    assert [int(t.sum()) for t in masks] == [1, 0, 40]
    optimizer.zero_changes()
    shared = torch.nn.Parameter(others[p].data)
    with torch.no_grad():
        shared.mul_(2)  # which cannot be seen by looking at the old one
    switch(optimizer, {others[p]: shared})
    optimizer.mark_all_changed(shared)
    assert bits.unpack(optimizer.changes()[shared], (40,)).all()


def test_groups_that_others_rearrange():
    """Reordered, removed and added by hand: masks stay with their parameters."""
    p, q, r = (parameter(torch.ones(40)) for _ in range(3))
    optimizer = AdamW([{"params": [t]} for t in (p, q)], masks={q: bits.pack(torch.arange(40) < 5)}, track_changes=True)
    optimizer.param_groups.reverse()
    assert list(optimizer.masks) == [q]
    optimizer.param_groups.pop()
    optimizer.param_groups[0]["params"].append(r)
    for t in (p, q, r):
        t.grad = torch.ones(40)
    optimizer.step()
    assert [int(bits.unpack(words, (40,)).sum()) for words in optimizer.changes().values()] == [5, 40]
    assert list(optimizer.changes()) == [q, r]
    assert [int((t != 1).sum()) for t in (p, q, r)] == [0, 5, 40]
    switch(optimizer, {q: parameter(torch.ones(3))})
    with pytest.raises(ValueError, match=r"parameter 0 of group 0 is \[3\], in the place of one \[40\]"):
        optimizer.step()


@pytest.mark.gpu
def test_a_model_that_is_moved_has_not_changed():
    model = torch.nn.Linear(40, 50, dtype=BF16)
    options = dict(masks={"weight": bits.pack(torch.arange(2000) < 100)}, track_changes=True, master_weights=True)
    optimizer = AdamW(model.named_parameters(), **options)
    for device in ("cpu", "cuda", "cpu", "cuda"):
        model.to(device)
        assert not any(words.any() for words in optimizer.changes().values())
        model.zero_grad()
        model(torch.ones(2, 40, device=device, dtype=BF16)).sum().backward()
        assert optimizer.grad_norm() > 0
        optimizer.step()
        assert all(words.any() and words.device.type == device for words in optimizer.changes().values())
        assert not bits.unpack(optimizer.changes()[model.weight], (2000,))[100:].any()
        optimizer.zero_changes()


# replaced weights


def replace_in_place(module, new):
    with torch.no_grad():
        module.weight.copy_(new)


def replace_in_data(module, new):
    module.weight.data.copy_(new)


def replace_data(module, new):
    module.weight.data = new.clone()


def replace_by_loading(module, new):
    module.load_state_dict({"weight": new})


def replace_through_a_view(module, new):
    module.weight.detach().view(-1)[:] = new.view(-1)


def replace_by_swapping_and_back(module, new):
    kept, module.weight.data = module.weight.data, new.clone()
    module.weight.data = kept.copy_(new)


REPLACE = [
    replace_in_place, replace_in_data, replace_data, replace_by_loading, replace_through_a_view,
    replace_by_swapping_and_back,
]  # fmt: skip


def replaced_run(replace, dtype, density, compact, form_of=lambda new: new):
    """What three steps, a replacement and a step leave, and what they should: from masters where the weight is still theirs."""
    module = torch.nn.Linear(40, 50, bias=False, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    active = torch.rand(module.weight.shape, generator=generator) < density
    masks = {} if density == 1 else {"weight": bits.pack(active)}
    optimizer = AdamW(
        module.named_parameters(), lr=1e-3, master_weights=True, masks=masks, compact=compact, nonfinite="propagate"
    )
    for _ in range(3):
        new_grads([module.weight], dtype, generator)
        optimizer.step()
    old, state = module.weight.detach().clone(), optimizer.state[module.weight]
    new = torch.randn(old.shape, generator=generator).to(dtype)
    new[::3] = old[::3]
    new[1, :4] = torch.tensor([math.inf, -0.0, math.nan, 1e-7])
    master = torch.where(raw(new) == raw(old), state["master"], new.float())
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["master"] = master
    expected = torch.nn.Linear(40, 50, bias=False, dtype=dtype)
    replace_in_place(expected, new)
    other = AdamW(expected.named_parameters(), lr=1e-3, master_weights=True, compact=compact, nonfinite="propagate")
    other.load_state_dict(saved)
    kept = state["master"].clone()
    replace(module, new)
    new_grads([module.weight], dtype, generator)
    expected.weight.grad = module.weight.grad.clone()
    optimizer.step()
    other.step()
    inactive = ~active
    assert same_bits(state["master"][inactive], kept[inactive])
    return module.weight, state, expected.weight, other.state[expected.weight], active


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize(("density", "compact"), [(1, None), (0.3, True), (0.3, False)])
def test_masters_follow_weights_that_were_replaced(form, dtype, density, compact):
    """Element by element: where the weight is another, the step starts from it; where it has its bits, from the master."""
    p, state, q, expected, active = replaced_run(replace_in_data, dtype, density, compact)
    assert torch.equal(p.isnan(), q.isnan())
    assert same_bits(p.nan_to_num(), q.nan_to_num())
    for name in ("master", "exp_avg", "exp_avg_sq"):
        a, b = (s[name] if name != "master" else s[name][active].nan_to_num() for s in (state, expected))
        assert same_bits(a, b)
    assert not same_bits(state["master"].to(dtype).float()[active], state["master"][active])


@pytest.mark.parametrize("replace", REPLACE)
def test_weights_are_replaced_in_many_ways(replace):
    p, state, q, expected, _ = replaced_run(replace, BF16, 1, None)
    assert same_bits(p.nan_to_num(), q.nan_to_num())
    assert same_bits(state["master"].nan_to_num(), expected["master"].nan_to_num())


def test_what_is_written_back_keeps_the_masters(form):
    """Weights that were away and are back, bit for bit (a merge undone, averages evaluated), lose no small steps."""
    moved = {}
    for away in (False, True):
        p = parameter(torch.ones(100, dtype=BF16))
        optimizer = AdamW([p], lr=2**-8 / 20, weight_decay=0, master_weights=True)
        for _ in range(15):
            p.grad = torch.ones_like(p)
            optimizer.step()
            if away:
                kept = p.detach().clone()
                p.data.fill_(3)
                with torch.no_grad():
                    p.copy_(kept)
        moved[away] = optimizer.state[p]["master"].clone()
    assert same_bits(moved[False], moved[True])
    assert float(moved[True][0]) == pytest.approx(1 - 15 / 20 * 2**-8, abs=1e-5)


def test_state_follows_a_parameters_dtype():
    """Masters come with 16 bits and go with 32; moments are never less than fp32."""
    p = parameter(torch.ones(40))
    optimizer = AdamW([p], lr=0.01, master_weights=True)
    for dtype, moments in ((FP32, FP32), (BF16, FP32), (torch.float64, torch.float64), (FP16, FP32)):
        p.data, p.grad = p.data.to(dtype), None
        p.grad = torch.ones(40, dtype=dtype)
        optimizer.step()
        state = optimizer.state[p]
        assert state["exp_avg"].dtype is moments
        assert ("master" in state) == (dtype in (BF16, FP16))
    assert float(p[0]) == pytest.approx(0.96, abs=0.01)
    p.data, p.grad = torch.ones(3, dtype=FP16), None
    p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match="parameter 0 of group 0 has 3 elements by now, its exp_avg 40"):
        optimizer.step()


def test_a_first_step_in_inference_mode(form):
    """What is kept there can be written afterwards."""
    both = []
    for inference in (False, True):
        p, generator = with_grads([100], BF16)
        with torch.inference_mode(inference):
            optimizer = AdamW(p, master_weights=True, track_changes=True)
            optimizer.step()
        for _ in range(2):
            new_grads(p, BF16, generator)
            optimizer.step()
        copied = copy.deepcopy(optimizer)
        both.append([*p, *optimizer.changes().values(), *copied.changes().values(), optimizer.state[p[0]]["master"]])
    assert all(same_bits(a, b) for a, b in zip(*both, strict=True))


# torch.optim.Optimizer


def test_groups_schedulers_and_closures():
    params, generator = with_grads([30, 40, 50], FP32)
    copies = [parameter(p) for p in params]
    both = []
    for cls, ps in ((torch.optim.AdamW, params), (AdamW, copies)):
        optimizer = cls([{"params": ps[:1], "lr": 0.1}, {"params": ps[1:], "weight_decay": 0.0, "betas": (0.8, 0.9)}])
        both.append((optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)))
    for _ in range(10):
        new_grads(params, FP32, generator)
        for p, q in zip(params, copies, strict=True):
            q.grad = p.grad.clone()
        for optimizer, scheduler in both:
            optimizer.step()
            scheduler.step()
    for p, q in zip(params, copies, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)

    def closure():
        both[1][0].zero_grad()
        loss = (copies[0] ** 2).sum()
        loss.backward()
        return loss

    both[1][0].param_groups[0]["lr"] = 0.1
    loss = both[1][0].step(closure)
    assert float(loss) > float((copies[0] ** 2).sum())


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("master", [False, True])
def test_state_dict_round_trip(tmp_path, dtype, master):
    """Moments stay fp32, masks and compact state come along, and the run goes on bit for bit."""

    def make():
        params, generator = with_grads([100, 3000, 7], dtype)
        masks = {params[1]: bits.pack(torch.rand(3000, generator=generator) < 0.1)}
        return params, generator, masks

    params, generator, masks = make()
    optimizer = AdamW(params, masks=masks, master_weights=master, track_changes=True)
    for _ in range(3):
        new_grads(params, dtype, generator)
        optimizer.step()
    torch.save({"model": params, "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=False)
    loaded = [parameter(p) for p in saved["model"]]
    again = AdamW(loaded, master_weights=master, track_changes=True)
    again.load_state_dict(saved["optimizer"])
    assert not any(words.any() for words in again.changes().values())  # the weights are as they were
    for _ in range(3):
        new_grads(params, dtype, generator)
        for p, q in zip(params, loaded, strict=True):
            q.grad = p.grad.clone()
        optimizer.step()
        again.step()
    for p, q in zip(params, loaded, strict=True):
        assert same_bits(p, q)
        assert again.state[q]["exp_avg"].dtype is FP32
        assert all(same_bits(v, again.state[q][k]) for k, v in optimizer.state[p].items() if v.dim())
    other = AdamW([parameter(p) for p in params], masks={}, master_weights=master)
    wrong = {k: v for k, v in optimizer.state_dict().items() if k != "masks"}
    with pytest.raises(ValueError, match="another mask"):
        other.load_state_dict(wrong)


def test_grad_scaler(monkeypatch):
    """Unscaled gradients with infinities: the scaler skips the step itself."""
    p = parameter(torch.ones(10))
    optimizer = AdamW([p], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale((p * torch.inf).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(p.detach(), torch.ones(10))
    assert scaler.get_scale() == 2.0
    optimizer.zero_grad()
    scaler.scale((p * 3).sum()).backward()
    scaler.step(optimizer)
    assert float(p[0]) < 1


def test_shapes_strides_and_many_small_tensors(form):
    """Non-contiguous parameters and gradients; 300 tensors of a few elements in one call."""
    weight = torch.randn(6, 10).mT
    p, q = torch.nn.Parameter(weight.clone(memory_format=torch.preserve_format)), parameter(weight.contiguous())
    assert not p.is_contiguous()
    small, _ = with_grads([n % 5 + 1 for n in range(300)], FP32)
    copies = [parameter(t) for t in small]
    grad = torch.randn(10, 6)
    p.grad, q.grad = grad.mT.contiguous().mT, grad
    for t, u in zip(small, copies, strict=True):
        u.grad = t.grad.clone()
    AdamW([p, *small]).step()
    torch.optim.AdamW([q, *copies], foreach=False).step()
    for a, b in zip([p, *small], [q, *copies], strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
def test_nothing_else_is_written(form, dtype):
    """Everything lies at odd addresses in the middle of poisoned memory."""
    guarded = []

    def guard(t):
        buffer = torch.full((t.numel() + 42,), 77, dtype=t.dtype)
        guarded.append((buffer, t.numel()))
        inside = buffer[21 : 21 + t.numel()]
        return inside.copy_(t.reshape(-1))

    for n in (1, 7, 8, 1023, 1025, 3000):
        values, active = torch.randn(n), torch.rand(n) < 0.3
        p, q = (torch.nn.Parameter(guard(values.to(dtype))) for _ in range(2))
        p.grad, q.grad = guard(values.to(dtype)), guard(values.to(dtype))
        masks = {q: bits.pack(active)}
        optimizer = AdamW([p, q], lr=0.1, masks=masks, compact=True, track_changes=True, master_weights=True)
        for t in (p, q):
            state = optimizer._state(t)
            optimizer.state[t] = {k: guard(v) if v.dim() else v for k, v in state.items()}
            optimizer._changes[t] = guard(optimizer._changes[t])
        optimizer.step()
        assert not torch.equal(p, values.to(dtype))
        for buffer, count in guarded:
            assert (buffer[:21] == 77).all()
            assert (buffer[21 + count :] == 77).all()


def test_versions_are_counted():
    p = parameter(torch.ones(10))
    y = (p * p).sum()
    p.grad = torch.ones(10)
    AdamW([p]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


# many parameters


def test_work_grows_with_the_number_of_parameters(monkeypatch):
    """Construction, groups, steps and maps look at each parameter a fixed number of times."""
    looks = 0

    def counted(name):
        real = getattr(torch.Tensor, name)

        def look(*args):
            nonlocal looks
            looks += 1
            return real(*args)

        return look

    for name in ("data_ptr", "stride", "numel", "element_size"):
        monkeypatch.setattr(torch.Tensor, name, counted(name))

    def run(count):
        nonlocal looks
        params, _ = with_grads([4] * count, FP32)
        looks = 0
        optimizer = AdamW(params[: count // 2], track_changes=True, nonfinite="propagate")
        optimizer.add_param_group({"params": params[count // 2 :]})
        with torch.no_grad():
            torch._foreach_add_(params, 1.0)
        optimizer.step()
        optimizer.changes()
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.mark_all_changed()
        optimizer.zero_changes()
        return looks

    once = run(100)
    assert run(400) <= 4.1 * once


def test_loading_is_linear(monkeypatch):
    """torch's own looks for each tensor's parameter among all of its group."""
    looks = 0

    class Index(int):
        __hash__ = int.__hash__

        def __eq__(self, other):
            nonlocal looks
            looks += 1
            return int(self) == int(other)

    for count in (50, 200):
        params, _ = with_grads([4] * count, FP32)
        optimizer = AdamW(params)
        optimizer.step()
        saved = optimizer.state_dict()
        saved["state"] = {Index(i): state for i, state in saved["state"].items()}
        looks = 0
        optimizer.load_state_dict(saved)
        assert looks <= 10 * count


def test_twenty_thousand_parameters():
    params = [torch.nn.Parameter(t) for t in torch.zeros(20_000, 3).unbind()]
    optimizer = AdamW(params, track_changes=True)
    optimizer.mark_all_changed(params[7])
    assert [i for i, words in enumerate(optimizer.changes().values()) if words.any()] == [7]
    with pytest.raises(ValueError, match="expected one of the parameters"):
        optimizer.mark_all_changed(parameter(torch.ones(3)))


def test_a_refused_group_is_not_there():
    """Overlap is found between groups, after parameters have moved, and where memory is used again."""
    p, q = parameter(torch.ones(40)), parameter(torch.ones(4))
    optimizer = AdamW([p])
    for bad, error in (
        ([q, torch.nn.Parameter(p.detach()[30:])], "parameter 0 of group 0 and parameter 1 of group 1 overlap"),
        ([q, parameter(torch.ones(3, dtype=torch.complex64))], "parameter 1 of group 1"),
    ):
        with pytest.raises((ValueError, TypeError), match=error):
            optimizer.add_param_group({"params": bad})
        assert len(optimizer.param_groups) == 1
    before = torch.nn.Parameter(p.detach()[:10])
    p.data = torch.ones(40)
    optimizer.add_param_group({"params": [before]})  # p lies elsewhere now
    with pytest.raises(ValueError, match="overlap"):
        optimizer.add_param_group({"params": torch.nn.Parameter(p.detach()[:10])})
    optimizer.add_param_group({"params": [q]})
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 1, 1]


# torch.optim.AdamW's options


NOTHING = {
    "foreach": [None, False], "fused": [None, False], "amsgrad": [False], "maximize": [False], "capturable": [False],
    "differentiable": [False],
}  # fmt: skip


def test_options_that_ask_for_nothing():
    """Alone, together, by position, in a group, and in the groups of a torch optimizer; none of them is kept."""
    p = parameter(torch.ones(4))
    bare = AdamW([p]).param_groups[0].keys()
    for name, values in NOTHING.items():
        for value in values:
            assert AdamW([p], **{name: value}).param_groups[0].keys() == bare
            assert AdamW([{"params": [p], name: value}]).param_groups[0].keys() == bare
    AdamW(
        [p],
        1e-3,
        (0.9, 0.999),
        1e-8,
        1e-2,
        False,
        **{name: values[0] for name, values in NOTHING.items() if name != "amsgrad"},
    )
    for chosen in ({}, {"foreach": True}, {"fused": True}, {"foreach": False, "fused": False}):
        torch_adamw = torch.optim.AdamW([p], lr=0.5, **chosen)
        p.grad = torch.ones(4)
        torch_adamw.step()
        ours = AdamW([p])
        ours.load_state_dict(torch_adamw.state_dict())
        assert ours.param_groups[0].keys() == bare
        assert ours.param_groups[0]["lr"] == 0.5
        again = torch.optim.AdamW([p], **chosen)
        again.load_state_dict(ours.state_dict())
        for optimizer in (ours, again):
            optimizer.step()
    assert AdamW(torch.optim.AdamW([p], lr=0.25).param_groups).param_groups[0]["lr"] == 0.25
    group = {"params": [parameter(p)], "lr": 0.125, "fused": None}
    ours.add_param_group(group)
    group["lr"] = 0.25  # the group itself, as torch keeps it
    assert ours.param_groups[1]["lr"] == 0.25


@pytest.mark.parametrize("name", NOTHING)
def test_options_that_ask_for_something(name):
    p, q = parameter(torch.ones(4)), parameter(torch.ones(4))
    error = f"AdamW: expected {name} to be .*False.*, got True"
    with pytest.raises(ValueError, match=error):
        AdamW([p], **{name: True})
    with pytest.raises(ValueError, match=error):
        AdamW([{"params": [p], name: True}])
    optimizer = AdamW([p])
    with pytest.raises(ValueError, match=error):
        optimizer.add_param_group({"params": [q], name: True})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("name", ["amsgrad", "maximize"])
def test_a_state_of_another_formula(name):
    p = parameter(torch.ones(4))
    p.grad = torch.ones(4)
    torch_adamw, ours = torch.optim.AdamW([p], **{name: True}), AdamW([p])
    torch_adamw.step()
    with pytest.raises(ValueError, match=f"expected {name} to be False.*, got True"):
        ours.load_state_dict(torch_adamw.state_dict())
    assert not ours.state
    with pytest.raises(TypeError, match="nonsense"):
        AdamW([p], nonsense=None)


def test_scalars_may_be_tensors():
    p, q = parameter(torch.ones(4)), parameter(torch.ones(4))
    p.grad, q.grad = torch.ones(4), torch.ones(4)
    lr, betas = torch.tensor(0.25), (torch.tensor(0.5), torch.tensor(0.75))
    ours = AdamW([p], lr, betas, weight_decay=torch.tensor(0.5), eps=1e-8)
    floats = AdamW([q], 0.25, [0.5, 0.75], weight_decay=0.5)
    for factor in (1, 0.5):
        lr.mul_(factor)
        floats.param_groups[0]["lr"] *= factor
        ours.step(), floats.step()
        assert same_bits(p, q)
    assert copy.deepcopy(ours).param_groups[0]["betas"] == (0.5, 0.75)


SCHEDULERS = {
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
    "cyclic": lambda o: torch.optim.lr_scheduler.CyclicLR(o, 1e-3, 0.1, step_size_up=3, cycle_momentum=False),
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "restarts": lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "sequence": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o, [torch.optim.lr_scheduler.ConstantLR(o), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)], [3]
    ),
    "plateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=1),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("to_none", [False, True])
def test_schedulers_that_go_on_after_a_save(name, to_none, tmp_path):
    """Groups come in between, state dicts of both go through a file; torch.optim.AdamW's rates and, in fp32, its steps."""
    runs = []
    for cls in (torch.optim.AdamW, AdamW):
        params, generator = with_grads([30, 40, 50], FP32)

        def make(params=params, cls=cls):
            optimizer = cls([{"params": params[:1], "lr": 0.01}, {"params": params[1:2]}], lr=0.02)
            return optimizer, SCHEDULERS[name](optimizer)

        optimizer, scheduler = make()
        for step in range(8):
            if step == 4:
                torch.save((optimizer.state_dict(), scheduler.state_dict()), tmp_path / "state.pt")
                optimizer, scheduler = make()
                saved = torch.load(tmp_path / "state.pt", weights_only=name != "lambda")
                optimizer.load_state_dict(saved[0]), scheduler.load_state_dict(saved[1])
            if step == 6:
                optimizer.add_param_group({"params": params[2:], "lr": 0.03})
            optimizer.zero_grad(set_to_none=to_none)
            for p in params:
                p.grad = (0 if p.grad is None else p.grad) + torch.randn(p.shape, generator=generator)
            optimizer.step()
            if step < 6:
                scheduler.step(*[1.0] * (name == "plateau"))
        runs.append((optimizer, params))
    (torch_adamw, params), (ours, copies) = runs
    assert [g["lr"] for g in torch_adamw.param_groups] == [g["lr"] for g in ours.param_groups]
    assert [g["betas"] for g in torch_adamw.param_groups] == [g["betas"] for g in ours.param_groups]
    for p, q in zip(params, copies, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


# states of other optimizers


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("by", [torch.optim.AdamW, AdamW])
def test_masters_are_made_where_a_state_has_none(by, dtype):
    """From the weights at hand, whether these come before the state or after; then small steps count."""
    p = parameter(torch.ones(40, dtype=dtype))
    p.grad = torch.ones_like(p)
    before = by([p], lr=1e-4, weight_decay=0)
    before.step()
    for late in (False, True):
        q = parameter(torch.zeros_like(p) if late else p)
        optimizer = AdamW([q], lr=1e-4, weight_decay=0, master_weights=True)
        optimizer.load_state_dict(before.state_dict())
        assert same_bits(optimizer.state[q]["master"], q.float())
        with torch.no_grad():
            q.copy_(p)
        fresh = parameter(p)
        with_masters = AdamW([fresh], lr=1e-4, weight_decay=0, master_weights=True)
        for _ in range(50):
            for t in (q, fresh):
                t.grad = torch.ones_like(t)
            optimizer.step()
            with_masters.step()
        assert float(optimizer.state[q]["step"]) == 51
        assert same_bits(q, optimizer.state[q]["master"].to(dtype))
        torch.testing.assert_close(q, fresh, rtol=torch.finfo(dtype).eps, atol=0)
        assert float(q[0]) == pytest.approx(0.995, abs=torch.finfo(dtype).eps)


@pytest.mark.parametrize("options", [{}, {"stochastic_rounding": True}], ids=str)
def test_masters_are_left_out_where_none_are_wanted(options):
    """What steps on is what would without: the weights."""
    p = parameter(torch.ones(40, dtype=BF16))
    p.grad = torch.ones_like(p)
    before = AdamW([p], master_weights=True)
    before.step()
    saved = before.state_dict()
    both = []
    for masters in (True, False):
        q = parameter(p)
        optimizer = AdamW([q], **options)
        if masters:
            with pytest.warns(UserWarning, match="made without master_weights: the state's masters are left out"):
                optimizer.load_state_dict(saved)
        else:
            bare = {k: v for k, v in saved["state"][0].items() if k != "master"}
            optimizer.load_state_dict({**saved, "state": {0: bare}})
        assert "master" not in optimizer.state[q]
        assert "master" not in optimizer.state_dict()["state"][0]
        for _ in range(3):
            q.grad = torch.ones_like(q)
            optimizer.step()
        both.append(q)
    assert same_bits(*both)
    in_fp32 = parameter(p.float())
    optimizer = AdamW([in_fp32], master_weights=True)
    optimizer.load_state_dict(saved)  # fp32 parameters are their own masters
    assert "master" not in optimizer.state[in_fp32]
    assert "master" in saved["state"][0]


def test_a_state_is_copied_checked_and_contiguous(form):
    """torch's moments lie as their parameter does; a state that does not fit changes nothing; an empty one is none."""
    p = torch.nn.Parameter(torch.randn(4, 3, 2, 2).contiguous(memory_format=torch.channels_last))
    q = torch.nn.Parameter(p.detach().clone(memory_format=torch.preserve_format))
    torch_adamw, ours = torch.optim.AdamW([p], foreach=False), AdamW([q])
    for _ in range(3):
        grad = torch.randn(4, 3, 2, 2)
        p.grad, q.grad = grad.clone(), grad.clone()
        torch_adamw.step()
        ours.step()
        ours.load_state_dict(torch_adamw.state_dict())
    torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-6, atol=1e-6)
    saved = ours.state_dict()
    again = AdamW([q])
    again.load_state_dict(saved)
    assert again.state[q]["exp_avg"].data_ptr() != saved["state"][0]["exp_avg"].data_ptr()
    for wrong in ({"exp_avg": torch.ones(3)}, {"master": torch.ones(3)}, {"exp_avg_sq": 1.0}):
        (name,) = wrong
        with pytest.raises(ValueError, match=f"expected {name} with 48 elements"):
            again.load_state_dict({**saved, "state": {0: saved["state"][0] | wrong}})
        assert again.state[q].keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert same_bits(again.state[q]["exp_avg"], ours.state[q]["exp_avg"])
    with pytest.raises(ValueError, match="different number of parameter groups"):
        again.load_state_dict({"state": {}, "param_groups": []})
    empty = AdamW([q])
    assert not empty.state[q]  # torch's defaultdict: asked for, it is there
    empty.load_state_dict(empty.state_dict())
    empty.step()
    assert float(empty.state[q]["step"]) == 1


def test_hooks_on_loading():
    """One before sees the state and may give another; one after finds the optimizer loaded."""
    p = parameter(torch.ones(4))
    p.grad = torch.ones(4)
    optimizer = AdamW([p])
    optimizer.step()
    saved, seen = optimizer.state_dict(), []

    def twice(_, given):
        state = {i: {**state, "exp_avg": 2 * state["exp_avg"]} for i, state in given["state"].items()}
        return {**given, "state": state}

    optimizer.register_load_state_dict_pre_hook(twice)
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append(float(o.state[p]["exp_avg"][0])))
    for _ in range(2):
        optimizer.load_state_dict(saved)
    assert seen == [float(2 * saved["state"][0]["exp_avg"][0])] * 2
    assert float(optimizer.state[p]["exp_avg"][0]) == seen[0]


# copies


def through_torch_save(optimizer):
    file = io.BytesIO()
    torch.save(optimizer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda o: pickle.loads(pickle.dumps(o)),
    "torch.save": through_torch_save,
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("options", [{}, {"master_weights": True}, {"stochastic_rounding": True, "seed": 5}], ids=str)
def test_a_copy_goes_on_as_the_original(how, steps, options):
    """The same bits of weights, moments, masters and maps; neither sees what the other does."""
    params, generator = with_grads([100, 3000, 64], BF16)
    masks = {params[1]: bits.pack(torch.rand(3000, generator=generator) < 0.1), "c": bits.pack(torch.arange(64) < 50)}
    groups = [{"params": [("a", params[0]), ("b", params[1])], "lr": 0.1}, {"params": [("c", params[2])]}]
    original = AdamW(groups, masks=masks, track_changes=True, nonfinite="skip", offsets={"a": 16}, **options)
    for _ in range(steps):
        new_grads(params, BF16, generator)
        original.step()
    params[0].grad[3] = math.inf
    original.step()
    original.zero_changes()
    with torch.no_grad():
        params[2].mul_(2)  # a write of others, not yet looked at
    copied = COPIES[how](original)
    again = [p for group in copied.param_groups for p in group["params"]]
    assert copied.skipped_steps == 1
    assert all(same_bits(p, q) and p is not q for p, q in zip(params, again, strict=True))

    def compare():
        for p, q in zip(params, again, strict=True):
            assert same_bits(p, q)
            assert torch.equal(original.changes()[p], copied.changes()[q])
            assert original.state.get(p, {}).keys() == copied.state.get(q, {}).keys()
            for name, value in original.state.get(p, {}).items():
                assert torch.equal(value, copied.state[q][name])

    compare()
    before = copy.deepcopy(original.state_dict())
    kept = [p.detach().clone() for p in params]
    for _ in range(2):
        for q in again:
            q.grad = torch.randn(q.shape, generator=generator).to(BF16)
        copied.step()
    assert all(same_bits(p, old) for p, old in zip(params, kept, strict=True))
    after = original.state_dict()
    assert after["state"].keys() == before["state"].keys()
    assert all(torch.equal(t, after["state"][i][k]) for i, state in before["state"].items() for k, t in state.items())
    copied = COPIES[how](original)
    again = [p for group in copied.param_groups for p in group["params"]]
    for _ in range(2):
        new_grads(params, BF16, generator)
        for p, q in zip(params, again, strict=True):
            q.grad = p.grad.clone()
        original.step()
        copied.step()
        compare()
    assert bits.unpack(copied.changes()[again[2]], again[2].shape).all()
    assert not bits.unpack(copied.changes()[again[1]], again[1].shape).all()
    copied.add_param_group({"params": [("d", parameter(torch.ones(3)))]})
    with pytest.raises(ValueError, match="overlap"):
        copied.add_param_group({"params": [("e", torch.nn.Parameter(again[0].detach()[:3]))]})


@pytest.mark.filterwarnings("ignore:Seems like")
def test_a_model_and_its_optimizer_are_copied_together():
    model = torch.nn.Linear(4, 3)
    optimizer = AdamW(model.named_parameters(), masks={"weight": bits.pack(torch.arange(12) < 3)})
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    for copier in (copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))):
        other, copied, schedule = copier((model, optimizer, scheduler))
        assert schedule.optimizer is copied
        other(torch.ones(2, 4)).sum().backward()
        copied.step()
        schedule.step()
        changed = other.weight != model.weight
        assert torch.equal(changed.view(-1), torch.arange(12) < 3)
        assert copied.param_groups[0]["lr"] == pytest.approx(0.1 * optimizer.param_groups[0]["lr"])


# views


VIEWS = {
    "column halves": lambda w: [w[:, :8], w[:, 8:]],
    "interleaved rows": lambda w: [w[::2], w[1::2]],
    "interleaved columns": lambda w: [w[:, i::3] for i in range(3)],
    "halves of rows and columns": lambda w: [w[:6, :8], w[:6, 8:], w[6:, :8], w[6:, 8:]],
    "a checkerboard's rows": lambda w: [w[::2, ::2], w[1::2, 1::2], w[::2, 1::2], w[1::2, ::2]],
    "transposed": lambda w: [w[:, :5].mT, w[:, 5:7].mT, w[:, 7:]],
    "a diagonal and a corner": lambda w: [w.diagonal(), w[8:, :8]],
    "blocks of a deeper shape": lambda w: list(w.view(3, 4, 4, 4).permute(2, 0, 3, 1).unbind(0)),
    "slices of a flat one": lambda w: list(w.view(-1).split([7, 100, 85])),
}


@pytest.mark.parametrize("views", VIEWS)
def test_views_that_share_no_element(views):
    """One tensor's parts step as separate parameters do, in one group or several, and nobody else's writes are seen."""
    whole = torch.randn(12, 16).to(BF16)
    parts = [torch.nn.Parameter(view) for view in VIEWS[views](whole)]
    apart = [parameter(p) for p in parts]
    for p, q in zip(parts, apart, strict=True):
        q.grad = torch.randn(p.shape).to(BF16)
        p.grad = q.grad.clone()
    ours = AdamW([{"params": [p], "lr": 0.1 + i} for i, p in enumerate(parts)], track_changes=True)
    of_copies = AdamW([{"params": [p], "lr": 0.1 + i} for i, p in enumerate(apart)], track_changes=True)
    for lr in (None, 1e-4):
        for optimizer in (ours, of_copies):
            optimizer.zero_changes()
            if lr is not None:
                optimizer.param_groups[0]["lr"] = lr
                optimizer.param_groups[-1]["params"][0].grad = None
            optimizer.step()
        for p, q in zip(parts, apart, strict=True):
            assert same_bits(p, q)
            assert torch.equal(ours.changes()[p], of_copies.changes()[q])
    assert len(AdamW(parts).param_groups[0]["params"]) == len(parts)


@pytest.mark.parametrize(
    "views",
    [
        lambda w: [w[:, :9], w[:, 8:]],
        lambda w: [w[::2], w[::3]],
        lambda w: [w[::2], w[1::2], w[3]],
        lambda w: [w[:, :8], w[:, 8:], w.view(-1)[40:42]],
        lambda w: [w.diagonal(), w[:, ::2]],
        lambda w: [w, w.mT],
        lambda w: [w, w.clone(), w.view(torch.int32).view(FP32)],
        lambda w: [w[:, :8], w[:, 8:].view(BF16), w.view(BF16)[1:, 17:19]],
    ],
)
@pytest.mark.parametrize("later", [False, True])
def test_views_that_share_an_element(views, later):
    params = [torch.nn.Parameter(view) for view in views(torch.randn(12, 16))]
    if not later:
        with pytest.raises(ValueError, match="overlap in memory"):
            AdamW(params)
        return
    optimizer = AdamW(params[:-1])
    with pytest.raises(ValueError, match="and parameter 0 of group 1 overlap in memory"):
        optimizer.add_param_group({"params": params[-1:]})
    optimizer.add_param_group({"params": parameter(params[-1])})


def test_a_view_that_repeats_an_element():
    for view in (torch.ones(1).expand(4), torch.ones(9).as_strided((4, 4), (1, 1)), torch.ones(9).unfold(0, 4, 2)):
        with pytest.raises(ValueError, match="parameter 0 of group 0 overlaps itself in memory"):
            AdamW([torch.nn.Parameter(view)])
    AdamW([torch.nn.Parameter(torch.ones(22).as_strided((4, 4), (3, 4))), parameter(torch.ones(1).expand(1, 1))])


# bad input


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_gradients_that_are_not_finite(value):
    p, q = parameter(torch.ones(40)), parameter(torch.ones(3))
    p.grad, q.grad = torch.ones(40), torch.ones(3)
    p.grad[7] = value
    optimizer = AdamW([("p", p), ("q", q)])
    with pytest.raises(NonFiniteGradientError, match="the gradient of p is not finite; nothing was written"):
        optimizer.step()
    assert not optimizer.state
    assert torch.equal(q.detach(), torch.ones(3))
    skipping = AdamW([p, q], nonfinite="skip")
    skipping.step()
    assert skipping.skipped_steps == 1
    assert torch.equal(q.detach(), torch.ones(3))
    masked = AdamW([p, q], masks={p: bits.pack(torch.arange(40) != 7)})
    masked.step()
    assert p.isfinite().all()
    assert p[0] < 1


def test_bad_arguments():
    p = parameter(torch.ones(40))
    words = torch.zeros(2, dtype=torch.int32)
    for options, error in (
        (dict(masks={p: words[:1]}), "expected a mask of 2 words"),
        (dict(masks={p: words.long()}), "masks as int32 words"),
        (dict(masks={p: "x"}), "masks as int32 words"),
        (dict(masks={"nobody": words}), "'nobody', which is none of the parameters"),
        (dict(masks={parameter(torch.ones(40)): words}), "none of the parameters"),
        (dict(offsets={p: 4}), "multiples of 8"),
        (dict(lr=-1), "lr does not fit"),
        (dict(betas=(0.9, 1.0)), "betas does not fit"),
        (dict(nonfinite="ignore"), "nonfinite does not fit"),
        (dict(seed=2**63), "seed does not fit"),
        (dict(master_weights=True, stochastic_rounding=True), "got both"),
    ):
        with pytest.raises((ValueError, TypeError), match=error):
            AdamW([p], **options)
    storage = torch.ones(50)
    overlapping = [torch.nn.Parameter(storage[:30]), torch.nn.Parameter(storage[20:])]
    with pytest.raises(ValueError, match="parameter 0 of group 0 and parameter 1 of group 0 overlap"):
        AdamW(overlapping)
    with pytest.raises(TypeError, match=r"expected fp32, bf16, fp16 or fp64, got torch\.complex64"):
        AdamW([parameter(torch.ones(3, dtype=torch.complex64))])
    embedding = torch.nn.Embedding(5, 3, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match="sparse gradient"):
        AdamW(embedding.parameters()).step()


def test_the_op_checks_what_it_writes():
    """A direct call with what does not fit raises instead of writing past an end."""
    if not _native.available("cpu"):
        pytest.skip(str(_native.why_not("cpu")))
    t, scalars = torch.ones(40), [1.0, 0.1, 0.9, 0.1, 1.0, 0.1, 1.0, 1e-8]
    lists = [[t.clone()], [t.clone()], [t.clone()], [t.clone()], [], [], [], []]
    numbers = [[0], [0], scalars, 0, 1, False]
    torch.ops.lowrank.adamw(*lists, *numbers)
    for i, wrong in ((1, [t[:39].clone()]), (2, [t[:8].clone()]), (5, [torch.zeros(1, dtype=torch.int32)]), (1, [])):
        with pytest.raises(RuntimeError, match="adamw"):
            torch.ops.lowrank.adamw(*[wrong if j == i else each for j, each in enumerate(lists)], *numbers)
    with pytest.raises(RuntimeError, match="adamw"):
        torch.ops.lowrank.adamw(*lists, [4], *numbers[1:])


def test_without_native_code_it_says_so_once(monkeypatch):
    from lowrank import stats

    monkeypatch.setattr(_native, "why_not", lambda library: "not built")
    p = parameter(torch.ones(3))
    p.grad = torch.ones(3)
    before = stats()["fallback"].get("adamw: not built", 0)
    with pytest.warns(UserWarning, match=r"adamw: not built"):
        AdamW([p]).step()
    assert stats()["fallback"]["adamw: not built"] == before + 1
