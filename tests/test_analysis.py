"""lowrank.analysis: against numpy, torch.topk and Python's sets, in each native form and in PyTorch."""

import json
import math
import weakref
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lowrank
from lowrank import _native, _stats, analysis, bits, checkpoints
from lowrank.analysis import DiffStats, diff_stats, overlap, stable_rank, topk_mask, total
from lowrank.ops import analysis as ops

FP64, FP32, BF16, FP16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
DTYPES = [FP32, BF16, FP16, FP64]
FORMS = ["baseline", "avx2", "avx512", "torch"]
NATIVE = FORMS[:-1]
RAW = {2: torch.int16, 4: torch.int32, 8: torch.int64}
quick = settings(
    max_examples=25, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def choose(monkeypatch, form):
    """That instruction set, or PyTorch; a skip where this machine lacks it."""
    if form == "torch":
        return monkeypatch.setenv("LOWRANK_BACKEND", "eager")
    if not _native.available("cpu"):
        pytest.skip(str(_native.why_not("cpu")))
    monkeypatch.setenv("LOWRANK_ISA", form)
    try:
        ops.intersections([torch.zeros(1, dtype=torch.int32)])
    except RuntimeError as error:
        pytest.skip(str(error))


@pytest.fixture(params=FORMS)
def form(request, monkeypatch):
    choose(monkeypatch, request.param)
    return request.param


def in_every_form(monkeypatch, compute):
    """What ``compute`` gives; the same in every form there is."""
    results = []
    for form in FORMS:
        with monkeypatch.context() as patch:
            try:
                choose(patch, form)
            except pytest.skip.Exception:
                continue
            results.append(compute())
    assert all(repr(result) == repr(results[0]) for result in results[1:])
    return results[0]


SPECIAL = [0.0, -0.0, math.inf, -math.inf, math.nan, 1e-42, -1e-42, 6e-8, 3e38, -3e38, 65504.0, 1e-5, 1.0]


def special_values(n, dtype, seed):
    """Any bits at all, small numbers, and special ones."""
    generator = torch.Generator().manual_seed(seed)
    kind = torch.randint(4, (n,), generator=generator)
    info = torch.iinfo(RAW[dtype.itemsize])
    anything = torch.randint(info.min, info.max, (n,), generator=generator, dtype=torch.int64).to(RAW[dtype.itemsize])
    special = torch.tensor(SPECIAL, dtype=FP64)[torch.randint(len(SPECIAL), (n,), generator=generator)].to(dtype)
    small = (torch.randn(n, generator=generator, dtype=FP64) * 0.02).to(dtype)
    return torch.where(kind == 0, anything.view(dtype), torch.where(kind == 1, special, small))


def changed_a_bit(old, seed):
    """Half of it as it was, a quarter off by a small step, the rest anything."""
    generator = torch.Generator().manual_seed(seed + 1)
    kind = torch.randint(4, old.shape, generator=generator)
    moved = (old.double() + torch.randn(old.shape, generator=generator, dtype=FP64) * 1e-5).to(old.dtype)
    other = special_values(old.numel(), old.dtype, seed + 2).view(old.shape)
    return torch.where(kind < 2, old, torch.where(kind == 2, moved, other))


# diff_stats


def reference(old, new, tol, rel, ulp):
    """DiffStats element by element, in numpy; the norms exactly rounded."""
    acc_dtype = np.float64 if old.dtype is FP64 else np.float32
    raw = [t.flatten().view(RAW[t.element_size()]).tolist() for t in (old, new)]
    x, y = (t.flatten().to(FP64 if acc_dtype is np.float64 else FP32).numpy() for t in (old, new))
    top = (1 << 8 * old.element_size() - 1) - 1
    counts, squares, olds, largest = [0] * 4, Fraction(0), Fraction(0), 0.0
    infinite = [False, False]
    with np.errstate(all="ignore"):
        for a, b, i, j in zip(x, y, *raw, strict=True):
            equal = a == b or (np.isnan(a) and np.isnan(b))
            d = acc_dtype(0) if equal else abs(b - a)
            nan = bool(np.isnan(d))
            i, j = (-(n & top) if n < 0 else n for n in (i, j))
            counts[1] += nan or bool(d > acc_dtype(tol))
            counts[2] += nan or bool(d > acc_dtype(rel) * abs(a)) or bool(np.isinf(d))
            counts[3] += not equal and (nan or abs(i - j) > ulp)
            if not nan:
                largest = max(largest, float(d))
                infinite[0] |= bool(np.isinf(d))
                squares += 0 if np.isinf(d) else Fraction(float(d)) ** 2
            if not np.isnan(a):
                infinite[1] |= bool(np.isinf(a))
                olds += 0 if np.isinf(a) else Fraction(float(a)) ** 2
    counts[0] = sum(i != j for i, j in zip(*raw, strict=True))
    norms = [math.inf if inf else root(sum_) for inf, sum_ in zip(infinite, (squares, olds), strict=True)]
    return DiffStats(old.numel(), *map(int, counts), largest, *norms)


def root(x: Fraction) -> float:
    try:
        return math.sqrt(x)
    except OverflowError:
        return math.inf


def assert_close(actual, want):
    assert actual[:6] == want[:6]
    assert actual[6:] == pytest.approx(want[6:], rel=1e-12, abs=1e-150)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(
    n=st.integers(0, 5000), seed=st.integers(0, 2**31), ulp=st.sampled_from([0, 1, 3, 2**40]),
    limits=st.sampled_from([(0.0, 0.0), (1e-5, 1e-3), (1e-2, 0.6), (1e30, 1e38)]),
)  # fmt: skip
@quick
def test_diff_stats_is_numpys(monkeypatch, dtype, n, seed, ulp, limits):
    old = special_values(n, dtype, seed)
    new = changed_a_bit(old, seed)
    tol, rel = limits
    stats = in_every_form(monkeypatch, lambda: diff_stats(old, new, tol, rel=rel, ulp=ulp))
    assert_close(stats, reference(old, new, tol, rel, ulp))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tol", [0.0, 1e-8, 1e-5, 1e-2])
def test_beyond_abs_is_isclose(form, dtype, tol):
    old = special_values(9000, dtype, 3)
    new = changed_a_bit(old, 3)
    acc_dtype = FP64 if dtype is FP64 else FP32
    close = torch.isclose(new.to(acc_dtype), old.to(acc_dtype), rtol=0, atol=tol, equal_nan=True)
    assert diff_stats(old, new, tol).beyond_abs == int((~close).sum())


def test_beyond_abs_beside_the_papers_code():
    """arXiv 2505.11711's check_sparsity.py, all in bf16: another count only for |d| within 1 % of the tolerance."""
    old = (torch.randn(200_000) * 1e-3).to(BF16)
    new = (old.float() + torch.randn(old.shape) * 1e-5).to(BF16)
    delta = new - old
    by_isclose = ~torch.isclose(delta, torch.zeros_like(delta), atol=1e-5)
    d = (new.float() - old.float()).abs()
    near = (d / 1e-5 - 1).abs() < 0.01
    assert torch.equal(by_isclose[~near], (d > 1e-5)[~near])
    assert 0 < abs(diff_stats(old, new).beyond_abs - int(by_isclose.sum())) <= int(near.sum())


def test_special_pairs(form):
    """One element at a time: changed, beyond tol, rel, ulp, max."""
    other = torch.tensor([0x7FC1], dtype=torch.int16).view(BF16)
    nan, inf, tiny = torch.tensor([math.nan]), torch.tensor([math.inf]), torch.tensor([1e-45])
    pairs = [
        (torch.tensor([0.0]), torch.tensor([-0.0]), [1, 0, 0, 0, 0.0]),
        (nan, nan, [0, 0, 0, 0, 0.0]),
        (nan.to(BF16), other, [1, 0, 0, 0, 0.0]),
        (nan, torch.ones(1), [1, 1, 1, 1, 0.0]),
        (torch.ones(1), nan, [1, 1, 1, 1, 0.0]),
        (inf, inf, [0, 0, 0, 0, 0.0]),
        (inf, -inf, [1, 1, 1, 1, math.inf]),
        (inf, torch.ones(1), [1, 1, 1, 1, math.inf]),
        (tiny, -tiny, [1, 0, 1, 1, float(2 * tiny)]),
        (tiny, 0 * tiny, [1, 0, 1, 0, float(tiny)]),
        (torch.tensor([1.0]), torch.tensor([1.002]), [1, 1, 1, 1, float(torch.tensor(1.002) - 1)]),
        (torch.tensor([-3e38]), torch.tensor([3e38]), [1, 1, 1, 1, math.inf]),
    ]
    for old, new, want in pairs:
        stats = diff_stats(old, new)
        assert [*stats[1:5], stats.max] == want, (old, new, stats)
    assert diff_stats(inf, nan).old_norm == math.inf
    assert diff_stats(torch.ones(1), torch.full((1,), 2.0), rel=0.6).beyond_rel == 1
    assert diff_stats(torch.full((1,), 2.0), torch.ones(1), rel=0.6).beyond_rel == 0
    assert diff_stats(torch.zeros(1), torch.tensor([0.1]), 0.1).beyond_abs == 0  # fp32's 0.1 is above fp64's
    assert diff_stats(nan, nan)[6:] == (0.0, 0.0)


@pytest.mark.parametrize("form", NATIVE)
def test_sums_do_not_depend_on_threads_or_form(monkeypatch, form):
    choose(monkeypatch, form)
    old = torch.randn(300_001).to(BF16)
    new = (old.float() + torch.randn(old.shape) * 1e-2).to(BF16)
    threads, results = torch.get_num_threads(), []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append((diff_stats(old, new), topk_mask((old, new), 0.3).tolist()))
    torch.set_num_threads(threads)
    monkeypatch.setenv("LOWRANK_BACKEND", "eager")
    monkeypatch.setattr(ops, "CHUNK", 1 << 14)
    results.append((diff_stats(old, new), topk_mask((old, new), 0.3).tolist()))
    assert results[0] == results[1] == results[2]


def test_sums_have_one_order(monkeypatch):
    """Of numbers whose squares do not add up exactly, so that another order of rows shows in some of the blocks."""
    old = torch.randn(40, ops.BLOCK) * torch.exp(torch.randn(40, ops.BLOCK))
    new = old * (1 + 1e-2 * torch.randn(40, ops.BLOCK))

    def sums(old, new):
        return [ops.diff(x, y, 1e-5, 1e-3, 1)[2:] for x, y in zip(old, new, strict=True)]

    straight = in_every_form(monkeypatch, lambda: sums(old, new))
    flipped = sums(*(t.view(40, -1, ops.LANES).flip(1).reshape(40, -1) for t in (old, new)))
    assert flipped != straight
    assert all(a == pytest.approx(b, rel=1e-14) for a, b in zip(flipped, straight, strict=True))


def test_views_shapes_and_gradients(form):
    old = torch.randn(40, 50, requires_grad=True)
    new = torch.randn(40, 50)
    want = diff_stats(old.detach().clone()[3:, ::2].clone(), new[3:, ::2].clone())
    assert diff_stats(old[3:, ::2], new[3:, ::2]) == want
    assert diff_stats(torch.ones(()), torch.ones(())).numel == 1
    flat = torch.randn(1001)
    assert diff_stats(flat[1:], flat[1:] + 1) == diff_stats(flat[1:].clone(), flat[1:].clone() + 1)


def test_total_is_of_one_long_tensor():
    old = {"a": torch.randn(100), "b": torch.randn(3, 1500)}
    new = {"b": old["b"] + 1e-3, "a": old["a"]}
    parts = diff_stats(old, new)
    assert list(parts) == ["a", "b"]
    whole = diff_stats(*(torch.cat([t["a"].flatten(), t["b"].flatten()]) for t in (old, new)))
    for stats in (total(parts), total(list(parts.values()))):
        assert stats[:6] == whole[:6]
        assert stats[6:] == pytest.approx(whole[6:])
    assert total([]) == DiffStats(0, 0, 0, 0, 0, 0.0, 0.0, 0.0)
    assert total({}).share_changed == 0.0
    assert whole.share_changed == whole.changed / 4600
    assert whole.share_beyond == whole.beyond_abs / 4600
    assert whole.relative_norm == whole.norm / whole.old_norm
    assert diff_stats(torch.zeros(2), torch.ones(2)).relative_norm == math.inf
    assert diff_stats(torch.zeros(2), torch.zeros(2)).relative_norm == 0.0


def save(folder, tensors, shards):
    from safetensors.torch import save_file

    folder.mkdir()
    names, index = sorted(tensors), {}
    for i in range(shards):
        file = f"model-{i}.safetensors"
        save_file({name: tensors[name] for name in names[i::shards]}, folder / file)
        index |= dict.fromkeys(names[i::shards], file)
    (folder / checkpoints.INDEX).write_text(json.dumps({"weight_map": index}))
    return folder


def test_checkpoints_are_streamed(tmp_path, monkeypatch):
    """Never more than a tensor of each is alive, whatever the shards."""
    from safetensors.torch import save_file

    old = {f"layer.{i}": torch.randn(50 + i, 7).to(BF16) for i in range(9)}
    new = {name: (t.float() + 1e-3).to(BF16) for name, t in old.items()}
    folders = save(tmp_path / "old", old, 3), save(tmp_path / "new", new, 2)
    alive, most = set(), 0
    opened = checkpoints.open_tensors

    def watched(path):
        file = opened(path)

        class File:
            def __enter__(self):
                file.__enter__()
                return self

            def __exit__(self, *error):
                return file.__exit__(*error)

            keys = file.keys

            def get_tensor(self, name):
                nonlocal most
                t = file.get_tensor(name)
                reference = weakref.ref(t, lambda r: alive.discard(r))
                alive.add(reference)
                most = max(most, len(alive))
                return t

        return File()

    monkeypatch.setattr(checkpoints, "open_tensors", watched)
    assert diff_stats(*folders) == diff_stats(old, new)
    assert most == 2
    assert not alive
    save_file(new, tmp_path / "one.safetensors")
    assert diff_stats(str(folders[0]), tmp_path / "one.safetensors") == diff_stats(old, new)


def test_diff_stats_refuses(tmp_path):
    a, b = torch.ones(2), torch.ones(2, dtype=BF16)
    for arguments, error, message in [
        ((a, b), ValueError, r"one dtype of the tensor, got torch.float32 in old and torch.bfloat16 in new"),
        ((a, torch.ones(3)), ValueError, r"one shape of the tensor, got torch.Size\(\[2\]\) in old"),
        ((a, a.to("meta")), ValueError, r"one device of the tensor, got cpu in old and meta in new"),
        (({"w": a}, {"w": torch.ones(3)}), ValueError, r"one shape of tensor 'w'"),
        (({"w": a}, {"v": a}), ValueError, r"same names in old and new, got \['w'\] \(1\) in old alone and \['v'\]"),
        (({"w": a}, {"w": 3}), TypeError, r"expected tensor 'w' to be a tensor, got int"),
        ((a.long(), a.long()), TypeError, r"expected the tensor in torch.float32, .*, got torch.int64"),
        ((a, {"w": a}), TypeError, r"two tensors, two \{name: tensor\} or two paths, got Tensor and dict"),
        ((a, a, -1.0), ValueError, r"tol finite in fp32 and >= 0, got -1.0"),
        ((a, a, math.nan), ValueError, r"tol finite in fp32 and >= 0, got nan"),
        ((a, a, "x"), TypeError, r"tol as a float, got str"),
        ((str(tmp_path), str(tmp_path)), ValueError, r"a folder or a file with safetensors, got '"),
    ]:
        with pytest.raises(error, match=message):
            diff_stats(*arguments)
    with pytest.raises(ValueError, match=r"rel finite in fp32 and >= 0, got 1e\+39"):
        diff_stats(a, a, rel=1e39)
    with pytest.raises(ValueError, match=r"ulp >= 0, got -1"):
        diff_stats(a, a, ulp=-1)
    with pytest.raises(TypeError, match=r"ulp as an int, got float"):
        diff_stats(a, a, ulp=1.0)
    with pytest.raises(TypeError, match=r"total: expected DiffStats, got int"):
        total([0])
    index = {"weight_map": {"w": "gone.safetensors"}}
    (tmp_path / checkpoints.INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"gone.safetensors: is not there, and the index has 'w'"):
        diff_stats(tmp_path, tmp_path)


# topk_mask


def unpacked(words, t):
    return bits.unpack(words, t.shape)


def splitmix(seed, index):
    """Steele, Lea and Flood 2014, in Python's integers."""
    mask = (1 << 64) - 1
    z = (seed + (index + 1) * 0x9E3779B97F4A7C15) & mask
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & mask
    z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
    return z ^ z >> 31


def expected_mask(scores, p):
    """{name: bools} by sorting all of (-|score|, hash)."""
    rows = []
    for name, t in scores.items():
        rows += [(-abs(s), splitmix(analysis._seed(name), i), name, i) for i, s in enumerate(t.flatten().tolist())]
    masks = {name: torch.zeros(t.numel(), dtype=torch.bool) for name, t in scores.items()}
    for *_, name, i in sorted(rows)[: round(p * len(rows))]:
        masks[name][i] = True
    return {name: mask.view(scores[name].shape) for name, mask in masks.items()}


def test_hashes_are_splitmix64():
    """Known answers of the reference implementation for seed 1234567."""
    want = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert [splitmix(1234567, i) for i in range(5)] == want
    index = torch.tensor([0, 1, 2, 3, 4, 2**40 + 5])
    hashes = [n % 2**64 for n in ops.hashes(index, 1234567).tolist()]
    assert hashes == [*want, splitmix(1234567, 2**40 + 5)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(
    sizes=st.lists(st.integers(0, 1700), min_size=1, max_size=3), seed=st.integers(0, 2**31),
    p=st.sampled_from([1e-3, 0.01, 0.2, 0.5, 0.999, 1.0]), levels=st.sampled_from([1, 3, 1000]), pair=st.booleans(),
)  # fmt: skip
@quick
def test_topk_is_a_sort(monkeypatch, dtype, sizes, seed, p, levels, pair):
    """Ties by hash; infinities and denormals among the scores."""
    generator = torch.Generator().manual_seed(seed)
    scores = {}
    for i, n in enumerate(sizes):
        steps = torch.randint(-levels, levels + 1, (n,), generator=generator, dtype=FP64)
        values = torch.where(torch.rand(n, generator=generator) < 0.02, math.inf, steps * 2.0 ** (-i - 9))
        scores[f"t{i}"] = torch.where(steps == 1, 2.0**-24, values).to(dtype)  # denormal in fp16
    given_ = scores
    if pair:
        given_ = {k: torch.full_like(t, 0.5) for k, t in scores.items()}, scores
        scores = {k: t.to(FP64 if dtype is FP64 else FP32) - 0.5 for k, t in scores.items()}
    words = in_every_form(monkeypatch, lambda: {k: w.tolist() for k, w in topk_mask(given_, p).items()})
    masks = {k: unpacked(torch.tensor(w, dtype=torch.int32), scores[k]) for k, w in words.items()}
    want = expected_mask(scores, p)
    assert all(torch.equal(masks[k], want[k]) for k in scores)
    assert sum(int(m.sum()) for m in masks.values()) == round(p * sum(sizes))
    for k, t in scores.items():  # the bits after the last
        assert torch.equal(bits.pack(masks[k]), torch.tensor(words[k], dtype=torch.int32).view(-1)), t.shape


@pytest.mark.parametrize("dtype", [FP32, FP64], ids=str)
def test_without_ties_it_is_torch_topk(form, dtype):
    scores = {"a": torch.randn(300, 7, dtype=dtype), "b": torch.randn(70_000, dtype=dtype)}
    flat = torch.cat([t.flatten() for t in scores.values()]).abs()
    assert flat.unique().numel() == flat.numel() or dtype is FP32
    for p in (1e-4, 0.01, 0.5):
        k = round(p * flat.numel())
        mask = torch.cat([unpacked(w, scores[n]).flatten() for n, w in topk_mask(scores, p).items()])
        assert mask.sum() == k
        assert flat[mask].min() >= flat.topk(k).values.min()
        if flat.unique().numel() == flat.numel():
            assert torch.equal(mask.nonzero().view(-1), flat.topk(k).indices.sort().values)


def test_fp64_beside_fp32_is_compared_in_fp64(form):
    scores = {"a": torch.ones(40), "b": torch.full((40,), 1 + 1e-12, dtype=FP64)}
    masks = topk_mask(scores, 0.5)
    assert masks["b"].tolist() == bits.pack(torch.ones(40, dtype=torch.bool)).tolist()
    assert not masks["a"].any()


def heavy_ties():
    """bf16's differences: most are 0, and the rest takes few values."""
    generator = torch.Generator().manual_seed(5)
    old = {n: torch.randn(9000 + 77 * i, generator=generator).to(BF16) for i, n in enumerate("cab")}
    steps = {n: torch.randint(0, 9, t.shape, generator=generator) for n, t in old.items()}
    return old, {n: torch.where(steps[n] == 0, t * 1.0078125, t) for n, t in old.items()}


@pytest.mark.parametrize("p", [0.001, 0.04, 0.4])
def test_the_order_of_tensors_does_not_matter(form, p):
    old, new = heavy_ties()
    masks = topk_mask((old, new), p)
    assert list(masks) == ["c", "a", "b"]
    again = topk_mask(({n: old[n] for n in "abc"}, {n: new[n] for n in "bca"}), p)
    assert list(again) == ["b", "c", "a"]
    assert all(torch.equal(masks[n], again[n]) for n in "abc")
    count = sum(int(unpacked(masks[n], old[n]).sum()) for n in "abc")
    assert count == round(p * sum(t.numel() for t in old.values()))


def test_ties_are_spread_evenly(form):
    """All tied: each tensor gets its share within 4 sigma, and so does each half of it."""
    scores = {name: torch.ones(20_000) for name in ("model.layers.0.q", "model.layers.0.k", "model.layers.1.q")}
    masks = {name: unpacked(w, scores[name]) for name, w in topk_mask(scores, 0.1).items()}
    assert sum(int(m.sum()) for m in masks.values()) == 6000
    for mask in masks.values():
        assert abs(int(mask.sum()) - 2000) < 4 * math.sqrt(2000 * 0.9)
        assert abs(int(mask[:10_000].sum()) - 1000) < 4 * math.sqrt(1000 * 0.9)
    assert not torch.equal(*list(masks.values())[:2])


def test_per_tensor_scope(form):
    old, new = heavy_ties()
    masks = topk_mask((old, new), 0.03, scope="tensor")
    for n in old:
        alone = topk_mask(({n: old[n]}, {n: new[n]}), 0.03)[n]
        assert torch.equal(masks[n], alone)
        assert unpacked(alone, old[n]).sum() == round(0.03 * old[n].numel())


def test_bare_tensors_views_and_small_shares(form):
    t = torch.randn(40, 50)
    words = topk_mask(t, 0.1)
    assert torch.equal(words, topk_mask({"": t}, 0.1)[""])
    assert torch.equal(topk_mask(t[3:, ::2], 0.1), topk_mask(t[3:, ::2].clone(), 0.1))
    assert torch.equal(topk_mask((t, t + t), 0.1), topk_mask([t, t + t], 0.1))
    assert not topk_mask(t, 1e-9).any()
    assert topk_mask(torch.zeros(33), 1.0).tolist() == [-1, 1]
    assert topk_mask(torch.zeros(0), 1.0).tolist() == []
    assert topk_mask({}, 0.5) == {}
    assert unpacked(topk_mask(-t.abs(), 0.1), t).equal(unpacked(topk_mask(t.abs(), 0.1), t))


def test_nothing_but_the_outputs_is_written(form):
    old, new = heavy_ties()
    before = [t.clone() for t in (*old.values(), *new.values())]
    diff_stats(old, new)
    words = topk_mask((old, new), 0.1)
    kept = [w.clone() for w in words.values()]
    overlap([words, words])
    assert all(torch.equal(a, b) for a, b in zip(before, (*old.values(), *new.values()), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(kept, words.values(), strict=True))


CUTS = {"c": (0, 1, 9000), "a": (0, 4000, 9077), "b": (0, 9154, 9154)}


def shards(rank):
    """Pieces of heavy_ties at odd places; process 1 has none of "b", and not its name."""
    cut = []
    for tensors in heavy_ties():
        cut.append({n: t[CUTS[n][rank] : CUTS[n][rank + 1]] for n, t in tensors.items() if rank == 0 or n != "b"})
    return tuple(cut), {n: CUTS[n][rank] for n in cut[0]}


def run_rank(rank, store, results):
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    pair, offsets = shards(rank)
    outcomes = {}
    for scope in ("global", "tensor"):
        for p in (0.001, 0.04, 0.4):
            outcomes[scope, p] = topk_mask(pair, p, scope=scope, offsets=offsets, group=dist.group.WORLD)
    bad = dict(pair[1])
    if rank:
        bad["a"] = bad["a"].clone().fill_(math.nan)
    try:
        topk_mask((pair[0], bad), 0.1, group=dist.group.WORLD)
    except ValueError as error:
        outcomes["error"] = str(error)
    torch.save(outcomes, f"{results}.{rank}")
    dist.destroy_process_group()


def test_shards_get_their_part_of_the_whole(tmp_path):
    import torch.multiprocessing as mp

    mp.spawn(run_rank, (str(tmp_path / "store"), str(tmp_path / "words")), nprocs=2)
    ranks = [torch.load(f"{tmp_path / 'words'}.{rank}") for rank in range(2)]
    assert "NaN, got some in tensor 'a'" in ranks[1].pop("error")
    assert "NaN, got some in a tensor of another process" in ranks[0].pop("error")
    pair = heavy_ties()
    for (scope, p), first in ranks[0].items():
        whole = topk_mask(pair, p, scope=scope)
        for n, t in pair[0].items():
            parts = []
            for rank, words in enumerate((first, ranks[1][scope, p])):
                if n in words:
                    size = CUTS[n][rank + 1] - CUTS[n][rank]
                    parts.append(bits.unpack(words[n], (size,)))
            assert torch.equal(torch.cat(parts), unpacked(whole[n], t)), (scope, p, n)


def test_offsets_alone_shift_the_hash(form):
    """A shard that is all tied, from its 5,000th element on."""
    key, last = 1, splitmix(analysis._seed("w"), 5000)
    t = torch.full((3000,), 1e-45)
    words = ops.emit(ops.Scores(t, None, analysis._seed("w"), 5000), key, last, 31)
    want = torch.tensor([splitmix(analysis._seed("w"), 5000 + i) <= last for i in range(3000)])
    assert torch.equal(bits.unpack(words, (3000,)), want)


def test_topk_refuses():
    a = torch.ones(4)
    for arguments, error, message in [
        ((a, 0.0), ValueError, r"0 < p <= 1, got 0.0"),
        ((a, 1.5), ValueError, r"0 < p <= 1, got 1.5"),
        ((a, math.nan), ValueError, r"0 < p <= 1, got nan"),
        ((a, True), TypeError, r"p as a float, got bool"),
        ((3, 0.1), TypeError, r"a tensor, \{name: tensor\} or a pair of either, got int"),
        (((a, {"w": a}), 0.1), TypeError, r"or a pair of either, got tuple"),
        (((a, a, a), 0.1), TypeError, r"or a pair of either, got tuple"),
        (({"w": 3}, 0.1), TypeError, r"expected tensor 'w' to be a tensor, got int"),
        (({0: a}, 0.1), TypeError, r"names as strings, got 0"),
        (({"w": a.int()}, 0.1), TypeError, r"expected tensor 'w' in torch.float32, .*, got torch.int32"),
        ((({"w": a}, {"v": a}), 0.1), ValueError, r"the same names in old and new"),
        ((({"w": a}, {"w": a.double()}), 0.1), ValueError, r"one dtype of tensor 'w'"),
    ]:
        with pytest.raises(error, match=f"topk_mask: .*{message}"):
            topk_mask(*arguments)
    with pytest.raises(ValueError, match=r"scope in \('global', 'tensor'\), got 'layer'"):
        topk_mask(a, 0.1, scope="layer")
    with pytest.raises(ValueError, match=r"offsets has 'v', which is none of the tensors"):
        topk_mask({"w": a}, 0.1, offsets={"v": 1})
    with pytest.raises(ValueError, match=r"offsets as integers >= 0, got -8 for 'w'"):
        topk_mask({"w": a}, 0.1, offsets={"w": -8})


def test_nan_scores_are_named(form):
    nan, inf = torch.tensor([1.0, math.nan]), torch.tensor([1.0, math.inf])
    with pytest.raises(ValueError, match=r"scores without NaN, got some in tensor 'b' \(1 scores are NaN\)"):
        topk_mask({"a": inf, "b": nan}, 0.5)
    with pytest.raises(ValueError, match=r"scores without NaN, got some in the tensor \(1 "):
        topk_mask((inf, inf), 0.5)
    with pytest.raises(ValueError, match=r"in tensor 'b' \(2 "):
        topk_mask({"a": inf.double(), "b": torch.cat([nan, nan]).double()}, 0.5, scope="tensor")


# overlap


@given(
    sizes=st.lists(st.integers(0, 2000), min_size=1, max_size=2), E=st.integers(1, 5), seed=st.integers(0, 2**31)
)  # fmt: skip
@quick
def test_overlap_is_of_sets(monkeypatch, sizes, E, seed):
    generator = torch.Generator().manual_seed(seed)
    masks = [{f"t{t}": torch.rand(n, generator=generator) < 0.3 for t, n in enumerate(sizes)} for _ in range(E)]
    words = [{name: bits.pack(m) for name, m in mask.items()} for mask in masks]
    numel = {f"t{t}": n for t, n in enumerate(sizes)}
    overlaps = overlap(words, numel)
    in_every_form(monkeypatch, lambda: [t.tolist() for t in overlap(words, numel)])
    sets = [{(name, i) for name, m in mask.items() for i in m.nonzero().view(-1).tolist()} for mask in masks]
    N = sum(sizes)
    assert overlaps.sizes.tolist() == [len(s) for s in sets]
    for i, a in enumerate(sets):
        for j, b in enumerate(sets):
            assert overlaps.intersections[i, j] == len(a & b)
            chance = len(a) * len(b) / N if N else math.nan
            for value, over, under in [
                (overlaps.jaccard, len(a & b), len(a | b)),
                (overlaps.one_sided, len(a & b), len(a)),
                (overlaps.random_jaccard, chance, len(a) + len(b) - chance),
                (overlaps.random_one_sided, len(b), N),
            ]:
                want = over / under if under else math.nan
                assert float(value[i, j]) == pytest.approx(want, nan_ok=True)


@pytest.mark.parametrize("E", [31, 32, 33, 50])
def test_overlap_of_many_masks(form, E):
    words = [torch.randint(-(2**31), 2**31, (700,)).to(torch.int32) for _ in range(E)]
    overlaps = overlap(words)
    flat = torch.stack([bits.unpack(w, (22_400,)) for w in words]).double()
    assert torch.equal(overlaps.intersections, (flat @ flat.T).long())
    assert torch.equal(overlaps.sizes, flat.sum(1).long())
    assert torch.equal(overlaps.random_one_sided[3], overlaps.sizes.double() / 22_400)


def test_independent_masks_are_at_the_baseline(form):
    masks = [bits.pack(torch.rand(100_000) < share) for share in (0.1, 0.4)]
    overlaps = overlap(masks, 100_000)
    for name in ("jaccard", "one_sided"):
        random = getattr(overlaps, f"random_{name}")
        assert float(getattr(overlaps, name)[0, 1]) == pytest.approx(float(random[0, 1]), rel=0.1)
    assert float(overlaps.one_sided[1, 0]) == pytest.approx(0.1, rel=0.1)
    assert overlaps.jaccard.diagonal().tolist() == overlaps.one_sided.diagonal().tolist() == [1.0, 1.0]


def test_overlap_refuses():
    a, b = torch.zeros(2, dtype=torch.int32), torch.zeros(3, dtype=torch.int32)
    for arguments, error, message in [
        (([],), TypeError, r"a list of masks, got none"),
        ((a,), TypeError, r"a list of masks, got Tensor"),
        (([a, 3],), TypeError, r"mask 1 as words or \{name: words\}, got int"),
        (([a.long()],), TypeError, r"int32 words \[ceil\(numel / 32\)\] in mask 0, got torch.int64 \[2\]"),
        (([a, b],), ValueError, r"2 words on cpu for '' in mask 1, got 3 on cpu"),
        (([{"a": a}, {"b": a}],), ValueError, r"same names in every mask, got \['a', 'b'\]"),
        (([a], 65), ValueError, r"numel to fit 2 words, got 65"),
        (([a], 32), ValueError, r"numel to fit 2 words, got 32"),
        (([a], 40.0), TypeError, r"numel as an int or \{name: int\}, got float"),
        (([{"a": a}], {"a": 65}), ValueError, r"numel to fit 2 words of 'a', got 65"),
        (([{"a": a}], {}), ValueError, r"numel to fit 2 words of 'a', got None"),
    ]:
        with pytest.raises(error, match=f"overlap: .*{message}"):
            overlap(*arguments)


# stable_rank


def test_stable_rank():
    assert stable_rank(torch.diag(torch.tensor([3.0, 2.0, 1.0]))) == pytest.approx(14 / 9, rel=1e-5)
    assert stable_rank(torch.diag(torch.tensor([3.0, 2.0, 1.0])).to(BF16) * 2.0**100) == pytest.approx(14 / 9, rel=1e-5)
    assert stable_rank(torch.diag(torch.tensor([3.0, 2.0], dtype=FP64)) * 1e-300) == pytest.approx(13 / 9, rel=1e-5)
    assert stable_rank(torch.zeros(3, 4)) == 0.0
    for bad, error, message in [
        (torch.ones(3), ValueError, r"delta \[N, K\], got \[3\]"),
        (torch.ones(0, 3), ValueError, r"delta \[N, K\], got \[0, 3\]"),
        (torch.full((2, 2), math.nan), ValueError, r"delta to be finite"),
        (torch.tensor([[1.0, -math.inf]]), ValueError, r"delta to be finite"),
        (torch.ones(2, 2).long(), TypeError, r"got torch.int64"),
        ([[1.0]], TypeError, r"to be a tensor, got list"),
    ]:
        with pytest.raises(error, match=f"stable_rank: .*{message}"):
            stable_rank(bad)


# where the library is not


def test_without_the_library_it_is_counted_and_told_once(monkeypatch):
    old = torch.randn(100)
    want = diff_stats(old, old + 1), topk_mask(old, 0.1).tolist(), overlap([topk_mask(old, 0.1)]).sizes.tolist()
    monkeypatch.setattr(_native, "available", lambda library: False)
    monkeypatch.setattr(_native, "why_not", lambda library: f"no {library} for the test")
    _stats.reset()
    with pytest.warns(UserWarning, match="diff_stats: no cpu for the test"):
        assert diff_stats(old, old + 1) == want[0]
    assert diff_stats(old, old + 1) == want[0]
    with pytest.warns(UserWarning, match="topk_mask: no cpu for the test"):
        assert topk_mask(old, 0.1).tolist() == want[1]
    with pytest.warns(UserWarning, match="overlap: no cpu for the test"):
        assert overlap([topk_mask(old, 0.1)]).sizes.tolist() == want[2]
    assert lowrank.stats()["fallback"]["diff_stats: no cpu for the test"] >= 2
    with lowrank.strict(), pytest.raises(lowrank.FallbackError, match="topk_mask: no cpu"):
        topk_mask(old, 0.1)


def test_ops_refuse_what_does_not_fit():
    """A direct call of an op, past Python's checks."""
    if not _native.available("cpu"):
        pytest.skip(str(_native.why_not("cpu")))
    a, counts, sums = torch.ones(5000), torch.zeros(2, 4, dtype=torch.int64), torch.zeros(2, 3, dtype=FP64)
    op = torch.ops.lowrank
    for call in (
        lambda: op.diff_stats(a, a[1:], 0.0, 0.0, 1, counts, sums),
        lambda: op.diff_stats(a, a, 0.0, 0.0, 1, counts[:1], sums),
        lambda: op.diff_stats(a, a.to(BF16), 0.0, 0.0, 1, counts, sums),
        lambda: op.topk_histogram(a, None, 0, 0, 31, 10, False, 0, 0, torch.zeros(2049, dtype=torch.int64)),
        lambda: op.topk_histogram(a, None, 0, 0, 31, 20, False, 0, 0, torch.zeros(2048, dtype=torch.int64)),
        lambda: op.topk_emit(a, None, 0, 0, 0, 0, torch.zeros(5, dtype=torch.int32)),
        lambda: op.mask_overlap([counts[0].int(), counts[0, 1:].int()], torch.zeros(2, 2, dtype=torch.int64)),
    ):
        with pytest.raises(RuntimeError, match="analysis: "):
            call()
