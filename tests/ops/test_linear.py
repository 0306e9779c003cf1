"""The plain LoRA linear against the general form: the same bits, forward and every gradient, from each of its forms."""

import contextlib
import itertools

import pytest
import torch
from right import PAIRS

from lowrank import _stats
from lowrank.ops import _boundary, _choice, linear, lora
from lowrank.ops._choice import choice, forced
from lowrank.ops.linear import Adapter, Projection
from lowrank.ops.node import CHANGED

CPU = torch.device("cpu")
SHAPES = [
    ((1, 8), [8], 1),
    ((3, 33), [65], 3),
    ((5, 7, 64), [100], 8),
    ((33, 130), [66, 17, 1], 24),
    ((2, 2, 70, 96), [200, 40], 16),
]


@contextlib.contextmanager
def without_a_node_of_c():
    chosen = choice(CPU)
    _choice._choices[CPU] = chosen._replace(node=False)
    try:
        yield
    finally:
        _choice._choices[CPU] = chosen


def forms():
    """Python's own body; one call of C++ under a node of Python's; under a node of C++'s; kernels where they run."""
    if choice(CPU).backend == "triton":
        return {"kernels": contextlib.nullcontext}
    contexts = {"python": lambda: forced("eager")}
    if choice(CPU).native:
        contexts["native"] = without_a_node_of_c
    if choice(CPU).node:
        contexts["node"] = contextlib.nullcontext
    return contexts


FORMS = forms()
if "kernels" in FORMS:
    SHAPES[-1] = ((2, 2, 17, 96), [72, 40], 16)  # two blocks of rows, which the interpreter has time for


def draw(shape, Ns, r, dtype, factor_dtype, *, bias=False, base=False, p=0.0, need_x=True, scaling=0.7):
    """(x, projections, leaves)."""
    K = shape[-1]
    x = torch.randn(shape, dtype=dtype, requires_grad=need_x)
    projections, leaves = [], [x] if need_x else []
    for i, N in enumerate(Ns):
        W = (torch.randn(N, K) / K**0.5).to(dtype)
        A = (torch.randn(r + i, K) / K**0.5).to(factor_dtype).requires_grad_()
        B = (torch.randn(N, r + i) / 4).to(factor_dtype).requires_grad_()
        b = torch.randn(N, dtype=dtype) if bias and i != 1 else None
        arguments = torch.randn(*shape[:-1], N, dtype=dtype, requires_grad=True) if base else None
        projections.append(Projection(None if base else W, b, (Adapter(A, B, scaling + i, None, p),), arguments))
        leaves += [A, B, *([arguments] if base else [])]
    return x, tuple(projections), leaves


def run(call, x, projections, leaves, **options):
    torch.manual_seed(3)
    ys = call(x, projections, **options)
    assert ys is not None, "not plain"
    dys = [torch.randn(y.shape, generator=torch.Generator().manual_seed(i)).to(y) for i, y in enumerate(ys)]
    return [*ys, *torch.autograd.grad(ys, leaves, dys)]


def assert_same_bits(ours, expected):
    for i, (a, b) in enumerate(zip(ours, expected, strict=True)):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), i
        assert torch.equal(a, b), f"{i}: {(a.double() - b.double()).abs().max()}"


CASES = {
    "alone": {},
    "bias": dict(bias=True),
    "base": dict(base=True),
    "dropout": dict(p=0.3),
    "dropout and bias": dict(p=0.5, bias=True),
    "everything dropped": dict(p=1.0),
    "frozen x": dict(need_x=False),
    "no scaling": dict(scaling=1.0),
}


@pytest.mark.parametrize(
    ("dtype", "factor_dtype"), PAIRS + ([] if "kernels" in FORMS else [(torch.float64, torch.float64)]), ids=str
)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("form", FORMS)
def test_the_general_forms_bits(form, case, dtype, factor_dtype):
    for shape, Ns, r in SHAPES:
        Ns = Ns[:1] if CASES[case].get("base") else Ns
        arguments = draw(shape, Ns, r, dtype, factor_dtype, **CASES[case])
        with FORMS[form]():
            assert_same_bits(run(linear.linears, *arguments), run(lora.general, *arguments))


@pytest.mark.parametrize("form", FORMS)
def test_the_general_forms_bits_of_strided_and_shared(form):
    """x whose rows are strided or whose dims are swapped, dY of stride 0 and transposed, one mask for all."""
    dtypes = [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)]
    for (dtype, factor), p, shared in itertools.product(dtypes, (0.0, 0.25), (False, True)):
        x, projections, leaves = draw((24, 72), [12, 9], 4, dtype, factor, p=p)
        views = x[::2], x.as_strided((5, 72), (4, 1)), x.view(8, 3, 72).transpose(0, 1), x.view(72, 24).mT
        for view in views if form != "kernels" else views[:3]:  # which leave that view to PyTorch
            arguments = view, projections, leaves
            with FORMS[form]():
                assert_same_bits(
                    run(linear.linears, *arguments, shared_mask=shared),
                    run(lora.general, *arguments, shared_mask=shared),
                )
                for grads_of in (lambda y: y.sum(), lambda y: (y.mT @ torch.ones_like(y)).sum()):
                    pairs = []
                    for call in (linear.linears, lora.general):
                        torch.manual_seed(3)
                        loss = sum(grads_of(y) for y in call(view, projections, shared))
                        pairs.append(torch.autograd.grad(loss, leaves))
                    assert_same_bits(*pairs)


@pytest.mark.parametrize("form", FORMS)
def test_blocks_of_what_is_widened(form):
    """fp32 factors over more than a million elements of bf16: in blocks of rows, and of columns; and with dropout."""
    if form == "kernels":
        pytest.skip("kernels widen in registers")
    for (shape, Ns), p in itertools.product((((700, 1600), [1500]), ((40000, 64), [48, 16])), (0.0, 0.3)):
        arguments = draw(shape, Ns, 8, torch.bfloat16, torch.float32, p=p)
        with FORMS[form]():
            assert_same_bits(run(linear.linears, *arguments), run(lora.general, *arguments))


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("form", FORMS)
def test_autocast(form, p):
    for dtype, to in itertools.product((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float16)):
        arguments = draw((3, 5, 32), [24, 16], 4, dtype, torch.float32, bias=True, p=p)
        with FORMS[form](), torch.autocast("cpu", to):
            ours = run(linear.linears, *arguments)
            assert_same_bits(ours, run(lora.general, *arguments))
        assert ours[0].dtype is to


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("form", FORMS)
def test_the_same_bits_with_and_without_grad(form, case):
    for dtype, factor_dtype in PAIRS:
        for shape, Ns, r in SHAPES:
            Ns = Ns[:1] if CASES[case].get("base") else Ns
            x, projections, _ = draw(shape, Ns, r, dtype, factor_dtype, **CASES[case])
            with FORMS[form]():
                torch.manual_seed(3)
                with_grad = linear.linears(x, projections)
                for context in (torch.no_grad, torch.inference_mode):
                    torch.manual_seed(3)
                    with context():
                        assert_same_bits(linear.linears(x, projections), with_grad)


@pytest.mark.parametrize("form", FORMS)
def test_outputs_without_a_gradient(form):
    x, projections, leaves = draw((4, 10), [6, 5, 7], 2, torch.float32, torch.float32)
    for used in ((0,), (2, 1), ()):
        pairs = []
        for call in (linear.linears, lora.general):
            with FORMS[form]():
                ys = call(x, projections)
                loss = sum((ys[i] * (i + 1)).sum() for i in used) + 0 * sum(leaf.sum() for leaf in leaves[:1])
                pairs.append(torch.autograd.grad(loss, leaves, allow_unused=True))
        for a, b in zip(*pairs, strict=True):
            assert (a is None) == (b is None)
            assert a is None or torch.equal(a, b)


@pytest.mark.parametrize("form", FORMS)
def test_what_is_not_plain_is_left_to_the_general_form(form):
    x, (projection,), _ = draw((4, 10), [6], 2, torch.float32, torch.float32)
    (adapter,) = projection.adapters
    others = {
        "two adapters": projection._replace(adapters=(adapter, adapter)),
        "none": projection._replace(adapters=()),
        "lora_bias": projection._replace(adapters=(adapter._replace(bias=torch.randn(6)),)),
        "a scaling tensor": projection._replace(adapters=(adapter._replace(scaling=torch.tensor(2.0)),)),
        "a trained weight": projection._replace(weight=projection.weight.clone().requires_grad_()),
        "a trained bias": projection._replace(bias=torch.randn(6, requires_grad=True)),
        "a frozen factor": projection._replace(adapters=(adapter._replace(A=adapter.A.detach()),)),
        "another dtype": projection._replace(weight=projection.weight.bfloat16()),
        "another shape": projection._replace(weight=projection.weight[:, 1:]),
        "a scaling that is no number": projection._replace(adapters=(adapter._replace(scaling=float("nan")),)),
        "an output that is no tensor": projection._replace(weight=None, base=(torch.randn(4, 6),)),
        "a probability that is none": projection._replace(adapters=(adapter._replace(dropout_p=1.5),)),
    }
    with FORMS[form]():
        assert linear.linears(x, (projection,)) is not None
        for what, other in others.items():
            assert linear.linears(x, (other,)) is None, what
        assert linear.linears(x[:0], (projection,)) is None
    assert not _boundary.plainly(x.to("meta"))
    assert not _boundary.plainly(torch.nn.utils.rnn.pack_sequence([x]))
    with torch.utils._python_dispatch.TorchDispatchMode():
        assert not _boundary.plainly(x)


def test_a_forward_and_its_backward_take_the_same_form():
    """Backward outside the context that its forward was in."""
    if "native" not in FORMS:
        pytest.skip("one form")
    arguments = draw((4, 10), [6], 2, torch.float32, torch.float32)
    with forced("eager"):
        y = linear.linears(*arguments[:2])
    (a,) = torch.autograd.grad(y, arguments[2][:1], torch.ones_like(y[0]))
    assert torch.equal(a, run_backward(arguments))


def run_backward(arguments):
    y = linear.linears(*arguments[:2])
    return torch.autograd.grad(y, arguments[2][:1], torch.ones_like(y[0]))[0]


@pytest.mark.parametrize("form", FORMS)
def test_a_weight_written_to_before_backward_is_torchs_own_error(form):
    x, projections, _ = draw((4, 10), [6], 2, torch.float32, torch.float32)
    with FORMS[form]():
        (y,) = linear.linears(x, projections)
    projections[0].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("gone", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_a_second_backward_is_torchs_own_error(form, gone):
    """Whatever was written to x since the first, and where x is gone and other tensors are in its place."""
    x, (projection,), _ = draw((4, 10), [6], 2, torch.float32, torch.float32)
    layer = torch.nn.Linear(1, 1)
    _stats.ran_fused(layer)
    x = x * 1
    with FORMS[form]():
        (y,) = linear.linears(x, (projection._replace(layer=layer),))
    loss = y.sum()
    loss.backward()
    if gone:
        del x
        others = [torch.zeros(4, 10).add_(1).add_(1) for _ in range(100)]
    else:
        others = [x.detach().add_(1)]
    with pytest.raises(RuntimeError, match="through the graph a second time"):
        loss.backward()
    assert CHANGED not in layer.__dict__, others


@pytest.mark.parametrize("form", FORMS)
def test_an_input_written_to_without_a_layer_is_torchs_own_error(form):
    x, projections, _ = draw((4, 10), [6], 2, torch.float32, torch.float32, need_x=False)
    with FORMS[form]():
        (y,) = linear.linears(x, projections)
    x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("form", FORMS)
def test_compiled_autograd_captures_once_for_every_input(form):
    if form == "kernels":
        pytest.skip("Dynamo follows no interpreter")
    from torch._dynamo import compiled_autograd
    from torch._dynamo.utils import counters

    _, projections, leaves = draw((4, 10), [6], 2, torch.float32, torch.float32, p=0.5, need_x=False)
    xs = [torch.randn(4, 10, requires_grad=True) for _ in range(4)]
    torch._dynamo.reset()
    counters.clear()
    with FORMS[form]():
        for x in xs:
            torch.manual_seed(3)
            (y,) = linear.linears(x * 1, projections)
            expected = torch.autograd.grad(y.sum(), [x, *leaves])
            torch.manual_seed(3)
            (y,) = linear.linears(x * 1, projections)
            with compiled_autograd._enable(torch.compile(backend="eager")):
                y.sum().backward()
            assert_same_bits([t.grad for t in (x, *leaves)], expected)
            for leaf in leaves:
                leaf.grad = None
    assert counters["compiled_autograd"]["captures"] <= 2  # the first, and one whose sizes and numbers may change


def left_behind(t):
    """t as a function that torch.func transformed had it."""
    kept = []
    torch.func.grad(lambda t: kept.append(t) or t.sum())(t.detach())
    return kept[0]


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("form", FORMS)
def test_tensors_that_are_not_ordinary_are_left_to_what_knows_them(form, p):
    if form == "kernels":
        pytest.skip("a CPU's")
    x, (projection,), _ = draw((4, 10), [6], 2, torch.float32, torch.float32, p=p, need_x=False)
    (adapter,) = projection.adapters
    A = left_behind(adapter.A).requires_grad_()
    cases = {
        "a sparse weight": (x, projection._replace(weight=projection.weight.to_sparse_csr())),
        "a wrapper as x": (left_behind(x), projection),
        "a wrapper as a weight": (x, projection._replace(weight=left_behind(projection.weight))),
        "a wrapper as a factor": (x, projection._replace(adapters=(adapter._replace(A=A),))),
        "a negated base": (x, projection._replace(weight=None, base=torch._neg_view(torch.randn(4, 6)))),
    }
    if p == 0:
        cases["a sparse x"] = x.to_sparse(), projection
    elif form != "python":  # its masks view x
        cases["a negated x"] = torch._neg_view(x), projection
    for what, arguments in cases.items():
        x, projection = arguments
        for grad in (True, False):
            pairs = []
            for call in (lora.lora_projections, lora.general):
                torch.manual_seed(3)
                with FORMS[form](), torch.set_grad_enabled(grad):
                    (y,) = call(x, (projection,))
                    pairs.append([y, *(torch.autograd.grad(y.sum(), [adapter.B]) if grad else ())])
            for ours, expected in zip(*pairs, strict=True):
                torch.testing.assert_close(ours, expected, msg=lambda m, what=what: f"{what}: {m}")


@pytest.mark.parametrize("form", FORMS)
def test_a_number_that_is_too_large_is_an_error(form):
    x, (projection,), _ = draw((4, 10), [6], 2, torch.float32, torch.float32)
    (adapter,) = projection.adapters
    large = projection._replace(adapters=(adapter._replace(scaling=10**400),))
    with FORMS[form](), pytest.raises((OverflowError, RuntimeError)):
        linear.linears(x, (large,))


def test_where_there_is_no_memory_the_node_raises_torchs_own_error(capfd):
    if "node" not in FORMS:
        pytest.skip("the one call's has torch's stable ABI between")
    _, projections, _ = draw((4, 10), [6], 2, torch.float32, torch.float32)
    x = torch.randn(1, 10).expand(2**50, 10)
    with pytest.raises(RuntimeError, match=r"^\[enforce fail.*can't allocate memory"):
        linear.linears(x, projections)
    assert "Exception" not in capfd.readouterr().err


@pytest.mark.gpu
def test_saved_tensors_hooks_on_a_gpu():
    """No node of C++ under them, and no one call outside of it."""
    x, (projection,), _ = draw((3, 64), [32], 4, torch.float32, torch.float32, need_x=False)
    (adapter,) = projection.adapters
    A, B = (t.detach().cuda().requires_grad_() for t in (adapter.A, adapter.B))
    arguments = x.cuda(), (Projection(projection.weight.cuda(), None, (adapter._replace(A=A, B=B),)),), [A, B]
    with torch.autograd.graph.save_on_cpu():
        ours = run(linear.linears, *arguments)
    assert_same_bits(ours, run(linear.linears, *arguments))


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [3, 2048])
@pytest.mark.parametrize("case", ["alone", "bias", "base", "dropout", "frozen x"])
def test_the_general_forms_bits_on_a_gpu(case, rows):
    """Rows that a node of C++ answers in GEMMs, and rows for kernels; after the second call by planned launches."""
    device = torch.device("cuda")
    for dtype, factor_dtype in PAIRS:
        Ns = [1024] if case == "base" else [1024, 512, 8]
        x, projections, leaves = draw((rows, 2048), Ns, 16, dtype, factor_dtype, **CASES[case])
        with torch.no_grad():
            moved = {id(t): t.detach().to(device).requires_grad_(t.requires_grad) for t in leaves}

        def there(t, moved=moved):
            return None if t is None else moved[id(t)] if id(t) in moved else t.detach().to(device)

        arguments = tuple(
            Projection(
                there(weight), there(bias), tuple(a._replace(A=there(a.A), B=there(a.B)) for a in adapters), there(base)
            )
            for weight, bias, adapters, base, _, _ in projections
        )
        call = there(x), arguments, [moved[id(t)] for t in leaves]
        for _ in range(3):
            assert_same_bits(run(linear.linears, *call), run(lora.general, *call))
        with forced("eager"):
            python = run(linear.linears, *call)
            assert_same_bits(python, run(lora.general, *call))
        if rows == 3 and case != "dropout" and factor_dtype is dtype and choice(device).node:
            assert_same_bits(run(linear.linears, *call), python)
