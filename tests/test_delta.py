"""lowrank.delta: bit for bit against the format read in plain Python, in each native form and in PyTorch."""

import json
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from lowrank import _native, _stats, bits, delta
from lowrank.ops import delta as op
from lowrank.optim import AdamW

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
FORMS = ["baseline", "avx2", "avx512", "torch"]
SPECIAL = [0.0, -0.0, math.inf, -math.inf, math.nan, 1.0, 6e-8, -1e-40]


@pytest.fixture(params=FORMS)
def form(request, monkeypatch):
    """Each instruction set of csrc/delta, and PyTorch."""
    use(request.param, monkeypatch)


def use(form, monkeypatch):
    if form == "torch":
        monkeypatch.setenv("LOWRANK_BACKEND", "eager")
        return
    if not _native.available("cpu"):
        pytest.skip(str(_native.why_not("cpu")))
    monkeypatch.delenv("LOWRANK_BACKEND", raising=False)
    monkeypatch.setenv("LOWRANK_ISA", form)
    try:
        op.map_changes(torch.ones(1), torch.ones(1))
    except RuntimeError as error:
        pytest.skip(str(error))


def raw(t):
    return t.detach().contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


def same_bits(a, b):
    return torch.equal(raw(a), raw(b))


def any_bits(numel, dtype, generator):
    """Numbers of any bits, a quarter of them special: NaN with every payload, infinities, zeros of both signs."""
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    info = torch.iinfo(kind)
    numbers = torch.randint(info.min, info.max, (numel,), generator=generator, dtype=kind).view(dtype)
    special = torch.tensor(SPECIAL, dtype=dtype)[torch.randint(len(SPECIAL), (numel,), generator=generator)]
    return torch.where(torch.rand(numel, generator=generator) < 0.25, special, numbers)


def changed_pair(numel, dtype, density, seed, ulps=False):
    """(old, new) with that share of elements changed, in runs and alone."""
    generator = torch.Generator().manual_seed(seed)
    old = any_bits(numel, dtype, generator)
    on = torch.rand(numel, generator=generator) < density
    if numel and seed % 3 == 0:
        on[int(torch.randint(numel, (1,), generator=generator)) :] = False  # a long end without changes
    new = torch.where(on, any_bits(numel, dtype, generator), old)
    if ulps:
        step = torch.randint(-1, 2, (numel,), generator=generator)
        near = on & (torch.rand(numel, generator=generator) < 0.9)
        new = torch.where(near, in_order(in_order(raw(old)) + step.to(raw(old).dtype)).view(dtype), new)
    return old, new


def in_order(raw):
    """Signed integers in the order of the numbers, and back."""
    return torch.where(raw < 0, ~raw ^ torch.iinfo(raw.dtype).min, raw)


def reference(old, new, codes):
    """The format in plain Python: heads, index bytes and where the values are."""
    width, old, new = old.element_size(), raw(old).tolist(), raw(new).tolist()
    span, half = 1 << 8 * width, 1 << 8 * width - 1
    heads, index, values = [], [], []

    def order(bits):
        return ~bits & span - 1 if bits < 0 else bits + half

    for first in range(0, len(new), 1024):
        block = range(first, min(first + 1024, len(new)))
        on = [i for i in block if old[i] != new[i]]
        gaps, last = [], first - 1
        for i in on:
            gap, last = i - last - 1, i
            gaps += [255] * (gap // 255) + [gap % 255]
        pairs = [byte for i in on for byte in ((i - first) % 256, (i - first) // 256)]
        bitmap = [sum((j in set(on)) << j - i for j in range(i, min(i + 8, block.stop))) for i in block[::8]]
        forms = [(gaps, on), (pairs, on), (bitmap, on)]
        if codes:
            step = {1: 1, span - 1: 2}
            code = {i: step.get((order(new[i]) - order(old[i])) % span, 3) for i in on}
            dense = [sum(code.get(j, 0) << 2 * (j - i) for j in range(i, min(i + 4, block.stop))) for i in block[::4]]
            forms.append((dense, [i for i in on if code[i] == 3]))
        sizes = [len(part) + width * len(kept) for part, kept in forms]
        kind = sizes.index(min(sizes))
        part, kept = forms[kind]
        heads.append(len(kept) | kind << 11 | (len(gaps) - len(on)) * (kind == 0) << 13)
        index += part
        values += kept
    return heads, index, values


def unsigned(heads):
    return (heads.view(torch.int16).int() & 0xFFFF).tolist()


@pytest.mark.parametrize("name", FORMS)
@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    numel=st.one_of(st.sampled_from([0, 1, 7, 8, 31, 32, 33, 1023, 1024, 1025, 2047, 2048]), st.integers(0, 5000)),
    density=st.sampled_from([0, 0.0005, 0.002, 0.01, 0.1, 0.12, 0.13, 0.3, 0.9, 1]),
    dtype=st.sampled_from([BF16, FP16, FP32, FP64]),
    seed=st.integers(0, 2**31),
    codes=st.booleans(),
)
def test_the_format_and_back(name, numel, density, dtype, seed, codes):
    """The bytes that the format says, every bit back, twice as once; and what is left alone has one fingerprint."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        use(name, monkeypatch)
        old, new = changed_pair(numel, dtype, density, seed, ulps=codes)
        words = op.map_changes(old, new)
        assert torch.equal(words, bits.pack(raw(old) != raw(new)))
        heads, index, values = op.encode(new, words, old, codes)
        expected = reference(old, new, codes)
        assert (unsigned(heads), index.tolist()) == expected[:2]
        assert same_bits(values, new[expected[2]])
        op.check(numel, dtype, heads, index, values)
        target = old.clone()
        version = target._version
        for _ in range(1 if codes else 2):
            op.apply_(target, heads, index, values)
            assert same_bits(target, new)
        assert target._version > version
        assert torch.equal(op.changed_words(numel, heads, index), words)
        assert op.fingerprint(old, words) == op.fingerprint(new, words)
        assert op.fingerprint(new) == sum_of_hashes(new, torch.zeros_like(words))
        assert op.fingerprint(new, words) == sum_of_hashes(new, words)


def sum_of_hashes(t, words):
    total, full = 0, 2**64 - 1
    left = ~bits.unpack(words, t.shape)
    for i in left.nonzero().view(-1).tolist()[:300]:  # the rest of the formula in PyTorch, below
        total += splitmix((i + 1) * 0x9E3779B97F4A7C15 + (raw(t)[i].item() & (1 << 8 * t.element_size()) - 1) & full)
    rest = left.nonzero().view(-1)[300:]
    others = bits.pack(torch.ones(t.numel(), dtype=torch.bool).index_fill_(0, rest, False))
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("LOWRANK_BACKEND", "eager")
        return total + op.fingerprint(t, others) & full


def splitmix(x):
    full = 2**64 - 1
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & full
    x = (x ^ x >> 27) * 0x94D049BB133111EB & full
    return x ^ x >> 31


def test_every_kind_is_met():
    old, new = changed_pair(200_000, BF16, 0, 1)
    new = new.clone()
    raw(new)[:1024:2] ^= 4  # a bitmap
    raw(new)[1024 + 900] ^= 4  # three escapes for one element: an index
    raw(new)[2048:4096:9] ^= 4  # gaps
    raw(new)[8192 : 8192 + 1024] = in_order(in_order(raw(old)[8192 : 8192 + 1024]) + 1)
    heads, _, _ = op.encode(new, op.map_changes(old, new), old, True)
    kinds = heads.view(torch.int16) >> 11 & 3
    assert kinds[[0, 1, 2, 8]].tolist() == [2, 1, 0, 3]
    heads, _, _ = op.encode(new, op.map_changes(old, new))
    assert (heads.view(torch.int16) >> 11 & 3)[[0, 1, 2, 8]].tolist() == [2, 1, 0, 2]


def test_ties_go_to_the_lower_kind(form):
    """164 changed, 64 of them by one: a bitmap's 128 + 2 x 164 bytes are codes' 256 + 2 x 100."""
    old = torch.ones(1024, dtype=BF16)
    for near, kind in ((64, 2), (65, 3)):
        new = old.clone()
        raw(new)[:near] += 1
        raw(new)[near:164] += 9
        heads, _, _ = op.encode(new, op.map_changes(old, new), old, True)
        assert unsigned(heads)[0] >> 11 & 3 == kind


def test_bits_after_the_end_are_not_elements(form):
    new = torch.arange(40.0)
    _, index, values = op.encode(new, torch.full((2,), -1, dtype=torch.int32))
    assert len(values) == 40
    assert index.tolist() == [255] * 5


def test_a_tensor_of_several_hundred_blocks_on_two_threads(form):
    old, new = changed_pair(700_003, BF16, 0.01, 5)
    words = op.map_changes(old, new)
    parts, sums = op.encode(new, words), op.fingerprint(new, words)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert all(map(torch.equal, map(as_bytes, parts), map(as_bytes, op.encode(new, words))))
        assert op.fingerprint(old, words) == sums
        op.apply_(old, *parts)
    finally:
        torch.set_num_threads(threads)
    assert same_bits(old, new)


def as_bytes(t):
    return t.view(torch.uint8)


@pytest.mark.gpu
def test_a_gpu_gives_the_cpus_bytes():
    for dtype in (BF16, FP32, FP64):
        for numel in (0, 1, 1023, 1025, 70_001):
            for density in (0.002, 0.1, 0.5):
                old, new = changed_pair(numel, dtype, density, numel, ulps=True)
                there = old.cuda(), new.cuda()
                words, words_there = op.map_changes(old, new), op.map_changes(*there)
                assert torch.equal(words, words_there.cpu())
                for codes in (False, True):
                    parts, parts_there = (
                        op.encode(new, words, old, codes),
                        op.encode(there[1], words_there, there[0], codes),
                    )
                    op.check(numel, dtype, *parts_there)
                    assert all(
                        torch.equal(as_bytes(a), as_bytes(b.cpu())) for a, b in zip(parts, parts_there, strict=True)
                    )
                    target = there[0].clone()
                    op.apply_(target, *parts_there)
                    assert same_bits(target.cpu(), new)
                assert torch.equal(op.changed_words(numel, *parts_there[:2]).cpu(), words)
                assert op.fingerprint(new, words) == op.fingerprint(there[1], words_there)


def test_without_the_library_it_is_counted(monkeypatch):
    monkeypatch.setattr(_native, "available", lambda library: False)
    monkeypatch.setattr(_native, "why_not", lambda library: "not here")
    _stats.reset()
    with pytest.warns(UserWarning, match="delta: not here"):
        op.map_changes(torch.ones(3), torch.zeros(3))
    assert _stats.stats()["fallback"]["delta: not here"] >= 1


# what does not fit


def test_the_op_itself_refuses_what_does_not_fit():
    """A direct call, past Python's checks: pass, numel, data, old, changed, heads, index, values, starts, found."""
    if not _native.available("cpu"):
        pytest.skip(str(_native.why_not("cpu")))
    call = torch.ops.lowrank.delta.default
    data, words = torch.zeros(40, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    call(0, 40, data, data, words, *[None] * 5)
    for wrong in (
        (7, 40, data, data, words),
        (0, 40, data, None, words),
        (0, 40, data.float(), data, words),
        (0, 40, data, data[:39], words),
        (0, 40, data, data.short(), words),
        (0, 40, data, data.view(20, 2).mT, words),
        (0, 40, data, data, words[:1]),
    ):
        with pytest.raises(RuntimeError, match="delta: "):
            call(*wrong, *[None] * 5)


def damaged(numel, heads, index, values, match):
    with pytest.raises(ValueError, match=match):
        op.check(numel, BF16, heads, torch.tensor(index, dtype=torch.uint8), torch.zeros(values, dtype=BF16))


def heads_of(*heads):
    return op._uint16(torch.tensor(heads))


def head(n, kind, escapes=0):
    return n | kind << 11 | escapes << 13


@pytest.mark.parametrize(
    ("numel", "one", "index", "values"),
    [
        (10, head(1, 0), [10], 1),  # after the end
        (1000, head(1, 0, 3), [255, 255, 255, 235], 1),  # 1000
        (10, head(2, 0), [5, 4], 2),  # 10 again
        (600, head(1, 0, 1), [3, 255], 1),  # an escape to nowhere
        (600, head(1, 0, 1), [3, 4], 2 - 1),  # two elements, one counted
        (600, head(2, 0), [255, 4], 2),  # one element, two counted
        (10, head(1, 1), [10, 0], 1),
        (1024, head(1, 1), [0, 4], 1),  # 1024
        (1024, head(1, 1), [255, 255], 1),
        (1024, head(2, 1), [7, 0, 7, 0], 2),  # twice
        (1024, head(2, 1), [7, 0, 6, 0], 2),  # back
        (1024, head(1, 1, 1), [7, 0], 1),  # escapes of another kind
        (10, head(1, 2), [0, 4], 1),  # a bit after the end
        (10, head(2, 2), [1, 0], 2),  # one bit, two counted
        (10, head(1, 2), [3, 0], 1),  # two bits, one counted
        (10, head(1, 3), [0, 0, 0x30], 1),  # a code after the end
        (10, head(0, 3), [0, 0, 0x10], 0),
        (10, head(1, 3), [1, 0, 0], 1),  # no escape, one counted
        (10, head(0, 3), [3, 0, 0], 0),
        (3, head(4, 0), [0, 0, 0, 0], 4),  # more than there are
    ],
)
def test_blocks_that_do_not_fit(form, numel, one, index, values):
    damaged(numel, heads_of(one), index, values, "block 0 of 1 is damaged")
    damaged(numel + 1024, heads_of(0, one), index, values, "block 1 of 2 is damaged")


def test_parts_that_do_not_fit(form):
    damaged(10, heads_of(head(1, 0)), [1, 2], 1, "the heads need 1 bytes of index and 1 values, got 2 and 1")
    damaged(10, heads_of(head(1, 0)), [1], 2, "the heads need 1 bytes of index and 1 values, got 1 and 2")
    damaged(10, heads_of(2047), [1], 1, "the heads need 2047 bytes")
    damaged(1025, heads_of(0), [], 0, "expected 2 heads for 1025 elements, got 1")
    with pytest.raises(ValueError, match=r"expected values flat in torch\.float16"):
        op.check(3, FP16, heads_of(0), torch.zeros(0, dtype=torch.uint8), torch.zeros(0, dtype=BF16))
    with pytest.raises(ValueError, match="a contiguous tensor"):
        op.apply_(torch.zeros(4, 4).mT, heads_of(0), torch.zeros(0, dtype=torch.uint8), torch.zeros(0))
    with pytest.raises(ValueError, match="codes need old"):
        op.encode(torch.zeros(3), torch.zeros(1, dtype=torch.int32), codes=True)


# whole models


def model_pair(density=0.01, seed=0):
    shapes = {"layer.0.weight": (33, 70), "layer.0.bias": (70,), "norm.scale": (), "empty": (0, 4), "head.w": (3, 1100)}
    old, new = {}, {}
    for i, (name, shape) in enumerate(shapes.items()):
        dtype = (BF16, FP32, FP16, FP64)[i % 4]
        a, b = changed_pair(math.prod(shape), dtype, density, seed + i)
        old[name], new[name] = a.view(shape), b.view(shape)
    return old, new


def copies(tensors):
    return {name: t.clone() for name, t in tensors.items()}


def same(a, b):
    return a.keys() == b.keys() and all(same_bits(a[name], b[name]) for name in a)


@pytest.mark.parametrize("density", [0, 0.01, 1])
def test_a_model(form, density):
    old, new = model_pair(density)
    blob = delta.encode(new, old=old, stream="run", base_step=4, step=6)
    words = {name: op.map_changes(old[name], new[name]) for name in new}
    assert blob == delta.encode(new, changes=words, stream="run", base_step=4, step=6)
    assert blob == delta.encode(
        new, changes={new[name]: words[name] for name in new}, stream="run", base_step=4, step=6
    )
    target = {name: torch.nn.Parameter(t.clone()) for name, t in old.items()}
    for at in (4, 6):
        versions = {name: p._version for name, p in target.items()}
        applied = delta.apply_(target, blob, verify=True, stream="run", step=at)
        assert same(target, new)
        assert all(p._version > versions[name] or same_bits(old[name], p) for name, p in target.items())
    changed = sum(int((raw(old[name]) != raw(new[name])).sum()) for name in old)
    assert applied == ("run", 4, 6, changed, sum(t.numel() for t in old.values()))
    described = delta.describe(blob)
    assert described["tensors"]["layer.0.weight"]["shape"] == [33, 70]
    assert described["format"] == "lowrank delta 1"


def test_forms_give_the_same_bytes(monkeypatch):
    old, new = model_pair(0.05)
    blobs = set()
    for form in FORMS:
        with monkeypatch.context() as patch:
            try:
                use(form, patch)
            except pytest.skip.Exception:
                continue
            blobs.add(delta.encode(new, old=old))
    assert len(blobs) == 1


def test_strides_do_not_matter(form):
    old, new = changed_pair(60 * 50, BF16, 0.02, 1)
    old, new = old.view(60, 50), new.view(60, 50)
    blob = delta.encode({"w": new}, old={"w": old})
    assert blob == delta.encode({"w": new.mT.contiguous().mT}, old={"w": old})
    target = old.mT.contiguous().mT
    delta.apply_({"w": target}, blob)
    assert same_bits(target, new)
    padded = torch.zeros(60, 64, dtype=BF16)
    padded[:, :50] = old
    delta.apply_({"w": padded[:, :50]}, blob, verify=True)
    assert same_bits(padded[:, :50], new)
    with pytest.raises(ValueError, match="w: expected elements of their own"):
        delta.apply_({"w": torch.zeros(60, 1, dtype=BF16).expand(60, 50)}, blob)


def test_bytes_per_changed_element():
    generator = torch.Generator().manual_seed(0)
    old = torch.randn(4 << 20, generator=generator).to(BF16)
    new = old.clone()
    on = torch.rand(old.shape, generator=generator) < 0.01
    raw(new)[on] ^= 3
    assert len(delta.encode({"w": new}, old={"w": old})) <= 3.4 * int(on.sum())


def test_what_an_optimizer_changed(form):
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(40, 60), torch.nn.LayerNorm(60), torch.nn.Linear(60, 3)).to(BF16)
    receiver = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = AdamW(model.parameters(), lr=1e-4, track_changes=True)
    directions = [torch.randn_like(p) for p in model.parameters()]
    for sync in range(3):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        for _ in range(2):
            for p, direction in zip(model.parameters(), directions, strict=True):
                p.grad = direction
            optimizer.step()
        parameters, steps = dict(model.named_parameters()), dict(stream="rl", base_step=sync, step=sync + 1)
        blob = delta.encode(parameters, changes=optimizer.changes(), **steps)
        optimizer.zero_changes()
        assert blob == delta.encode(parameters, old=before, **steps)
        applied = delta.apply_(receiver, blob, verify=True, stream="rl", step=sync)
        assert 0 < applied.changed < applied.numel
        assert same(receiver, parameters)


# refusals: nothing is written


def refused(tensors, blob, match, error=ValueError, **options):
    before = copies(tensors)
    with pytest.raises(error, match=match):
        delta.apply_(tensors, blob, **options)
    assert same(tensors, before)


def test_truncated_and_flipped():
    old, new = model_pair(0.2)
    blob = delta.encode(new, old=old)
    header = 8 + int.from_bytes(blob[:8], "little")
    lengths = {*range(0, 200, 7), *range(header - 3, header + 4), *range(header, len(blob), 501), len(blob) - 1}
    for length in sorted(lengths):
        refused(old, blob[:length], "delta")
    refused(old, blob + b"\0", "delta")
    for other in (blob[:-1], blob + b"\0"):
        with pytest.raises(ValueError, match="delta: not a whole delta"):
            delta.describe(other)
    for at in [*range(header), *range(header, len(blob), 97), len(blob) - 1]:
        for bit in (1, 0x20, 0x80):
            flipped = bytearray(blob)
            flipped[at] ^= bit
            refused(old, bytes(flipped), "delta")


def forge(blob, edit):
    """A delta with another content and the right checksum."""
    description, parts = delta.describe(blob), load(blob)
    edit(description, parts)
    order = (parts[f"{name}.{part}"] for name in sorted(description["tensors"]) for part in delta.PARTS)
    description["sha256"] = delta.checksum(description, order)
    return save(parts, {"lowrank": json.dumps(description)})


def test_forged(form):
    """One tensor too late in the dict is wrong: those before it are not written."""
    old, new = model_pair(0.01)
    blob = delta.encode(new, old=old)
    delta.apply_(copies(old), forge(blob, lambda *_: None))

    def raising_the_gap(_, parts):
        parts["head.w.index"][0] = 254
        parts["head.w.index"][1:] = 254

    def kind_3(_, parts):
        parts["norm.scale.heads"] = heads_of(head(0, 3))
        parts["norm.scale.index"] = torch.ones(1, dtype=torch.uint8)

    def one_value_fewer(description, parts):
        parts["head.w.values"] = parts["head.w.values"][:-1].clone()
        description["tensors"]["head.w"]["changed"] -= 1

    def count(description, _):
        description["tensors"]["head.w"]["changed"] += 1

    def dtype(_, parts):
        parts["layer.0.weight.values"] = parts["layer.0.weight.values"].view(FP16)

    def two_dimensions(_, parts):
        parts["head.w.index"] = parts["head.w.index"][None].clone()

    def fewer_heads(_, parts):
        parts["head.w.heads"] = parts["head.w.heads"][:-1].clone()

    def another_part(_, parts):
        parts["head.w.more"] = torch.zeros(1)

    def no_part(_, parts):
        parts["head.w.values"], parts["other"] = parts["head.w.values"][:0].clone(), torch.zeros(1)

    for edit, match in (
        (raising_the_gap, r"head\.w: delta: block \d of \d is damaged"),
        (kind_3, r"norm\.scale: delta: block 0 of 1 is damaged"),
        (one_value_fewer, r"head\.w: delta: the heads need"),
        (count, r"head\.w: expected \d+ values"),
        (dtype, r"layer\.0\.weight: delta: expected values flat in torch\.bfloat16"),
        (two_dimensions, r"head\.w: delta: expected index flat"),
        (fewer_heads, r"head\.w: delta: expected 4 heads"),
        (another_part, "its parts are not those of its description"),
        (no_part, "its parts are not those of its description"),
    ):
        refused(old, forge(blob, edit), match)

    for key, value in (
        ("format", "lowrank delta 2"), ("stream", 3), ("step", "1"), ("step", True), ("base_step", -1), ("base_step", 1),
        ("tensors", []), ("tensors", {"w": {}}), ("tensors", {"w": 3}), ("tensors", None),
    ):  # fmt: skip
        forged = save(load(blob), {"lowrank": json.dumps({**delta.describe(blob), key: value})})
        refused(old, forged, "delta")
    for key, value in (
        ("shape", [-1]), ("shape", [1.0]), ("shape", 3), ("shape", "3"), ("dtype", "float8"), ("dtype", []), ("changed", None),
        ("changed", -1), ("fingerprint", 3), ("fingerprint", "x"),
    ):  # fmt: skip
        description = delta.describe(blob)
        description["tensors"]["head.w"][key] = value
        refused(old, save(load(blob), {"lowrank": json.dumps(description)}), "delta: not a description")
    refused(old, save(load(blob)), "delta: not a whole delta")
    refused(old, save(load(blob), {"lowrank": "[" * 100_000}), "delta: not a description")
    refused(old, b"", "delta: not a whole delta")


def test_other_tensors(form):
    old, new = model_pair()
    blob = delta.encode(new, old=old)
    refused({k: t for k, t in old.items() if k != "empty"}, blob, "tensors: lacks 'empty'")
    refused({**old, "more": torch.zeros(1)}, blob, "tensors: has 'more', which is not in the delta")
    refused(
        {**old, "head.w": old["head.w"].view(1100, 3)}, blob, r"head\.w: expected shape \[3, 1100\], got \[1100, 3\]"
    )
    widened = {**old, "head.w": old["head.w"].float()}
    refused(widened, blob, r"head\.w: expected torch\.bfloat16, got torch\.float32")
    with pytest.raises(TypeError, match=r"head\.w: expected a tensor, got list"):
        delta.apply_({**old, "head.w": [1]}, blob)
    with pytest.raises(TypeError, match=r"head\.w: expected a dense tensor with data"):
        delta.apply_({**old, "head.w": old["head.w"].to("meta")}, blob)


def test_a_foreign_base(form):
    old, new = model_pair()
    blob = delta.encode(new, old=old)
    foreign = copies(old)
    untouched = (raw(old["head.w"]) == raw(new["head.w"])).nonzero()[-1]
    raw(foreign["head.w"])[tuple(untouched)] ^= 1
    refused(foreign, blob, r"head\.w: not the base of this delta", verify=True)
    moved = copies(old)
    moved["head.w"] = moved["head.w"].roll(1)
    refused(moved, blob, r"head\.w: not the base of this delta", verify=True)
    delta.apply_(foreign, blob)  # not asked
    without = delta.encode(new, old=old, fingerprint=False)
    refused(old, without, "encoded with fingerprint=False", verify=True)
    delta.apply_(old, without)
    assert same(old, new)


def test_out_of_order(form):
    old, new = model_pair()
    blob = delta.encode(new, old=old, stream="a", base_step=3, step=5)
    for at in (0, 2, 4, 6):
        refused(old, blob, f"out of order: the delta is from step 3 to 5, the receiver at {at}", step=at)
    refused(old, blob, "expected a delta of stream 'b', got 'a'", stream="b", step=3)
    delta.apply_(old, blob, stream="a", step=3)
    delta.apply_(old, blob, stream="a", step=5)
    assert same(old, new)


def test_encode_refuses():
    w, words = torch.zeros(40), torch.zeros(2, dtype=torch.int32)
    for new, options, match in (
        ({"w": w}, {}, "expected one of changes and old, got none"),
        ({"w": w}, {"changes": {"w": words}, "old": {"w": w}}, "expected one of changes and old, got both"),
        ({"w": w, "v": w}, {"changes": {"w": words}}, "changes lacks 'v'; zeros if nothing of it changed"),
        ({"w": w}, {"changes": {"w": words, "v": words}}, "changes has 'v', which is not in new"),
        ({"w": w}, {"changes": {torch.zeros(3): words}}, r"changes has a tensor \[3\], which is not in new"),
        ({"w": w}, {"changes": {"w": words, w: words}}, "changes has 'w' twice"),
        ({"w": w}, {"changes": {"w": words[:1]}}, r"changes of 'w' as int32 \[2\], got \[1\]"),
        ({"w": w}, {"changes": {"w": words.long()}}, r"changes of 'w' as int32 \[2\], got \[2\] in torch\.int64"),
        ({"w": w}, {"changes": {"w": None}}, "changes of 'w' as int32"),
        ({"w": w}, {"old": {}}, "old: lacks 'w'"),
        ({"w": w}, {"old": {"w": w, "v": w}}, "old: has 'v'"),
        ({"w": w}, {"old": {"w": w[:3]}}, r"w in old: expected shape \[40\], got \[3\]"),
        ({"w": w}, {"old": {"w": w.half()}}, r"w in old: expected torch\.float32"),
        ({"w": w}, {"old": {"w": w}, "base_step": 2, "step": 2}, "expected step > base_step >= 0, got 2 and 2"),
        ({"w": w}, {"old": {"w": w}, "step": 1.5}, "as integers"),
        ({"w": w}, {"old": {"w": w}, "stream": None}, "expected stream as a string"),
        ({"w": w.bool()}, {"old": {"w": w}}, r"w: expected one of bfloat16.*, got torch\.bool"),
        ({"w": w.to_sparse()}, {"old": {"w": w}}, "w: expected a dense tensor"),
    ):
        with pytest.raises((ValueError, TypeError), match=match):
            delta.encode(new, **options)


def test_a_dtensor_is_refused_by_name():
    DTensor = type("DTensor", (torch.Tensor,), {})
    with pytest.raises(TypeError, match="w: a DTensor is not supported"):
        delta.encode({"w": torch.zeros(3).as_subclass(DTensor)}, old={"w": torch.zeros(3)})
