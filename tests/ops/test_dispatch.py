import os

import pytest
import torch

import lowrank
from lowrank import _stats
from lowrank.ops import _choice, thin_eager
from lowrank.ops._choice import backend
from lowrank.ops._dispatch import prefers_eager
from lowrank.ops.lora import Adapter, Projection, lora_projections
from lowrank.ops.lora_impl import thin_products

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def fresh(environment):
    environment.delenv("LOWRANK_BACKEND", raising=False)
    environment.delenv("TRITON_INTERPRET", raising=False)
    _stats.reset()
    yield environment
    lowrank.strict(False)


def test_the_chain_of_conditions(fresh):
    assert backend(CPU)[0] == "eager"
    assert backend(CUDA) == ("triton", "a GPU")
    fresh.setenv("LOWRANK_BACKEND", "eager")
    assert backend(CUDA) == ("eager", "LOWRANK_BACKEND=eager")
    fresh.setenv("LOWRANK_BACKEND", "triton")
    assert backend(CUDA)[0] == "triton"
    with pytest.raises(ValueError, match="cpu needs triton and a GPU, or TRITON_INTERPRET=1"):
        backend(CPU)
    fresh.setenv("TRITON_INTERPRET", "1")
    assert backend(CPU)[0] == "triton"
    fresh.delenv("LOWRANK_BACKEND")
    fresh.setattr(_choice, "_has_triton", lambda: False)
    _choice.read_environment()
    assert backend(CUDA) == ("eager", "triton is not installed")


def module(x, A, B, thin_dtype=None, dropout=False):
    weight = torch.empty(B.shape[0], A.shape[1], device=x.device)
    return thin_products(x, [weight], [None], [A], [B], thin_dtype or x.dtype, dropout)


def tensors(M, K, N, r, dtype=torch.bfloat16, adapter=torch.bfloat16):
    return torch.empty(M, K, dtype=dtype), torch.empty(r, K, dtype=adapter), torch.empty(N, r, dtype=adapter)


@pytest.fixture
def interpreted(fresh):
    """Kernels are chosen, and none is launched."""
    fresh.setenv("TRITON_INTERPRET", "1")
    return fresh


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (dict(dtype=torch.float64), "float64"),
        (dict(adapter=torch.float64), "float64"),
        (dict(r=513), "a rank above 512"),
        (dict(transposed=True), "not contiguous"),
    ],
)
def test_what_kernels_cannot_do_is_counted_and_refused_by_strict(interpreted, change, reason):
    transposed = change.pop("transposed", False)
    sizes = dict(M=8, K=6, N=4, r=2) | change
    x, A, B = tensors(**sizes)
    x = x.mT.contiguous().mT if transposed else x
    thin_dtype = torch.promote_types(x.dtype, A.dtype)
    with pytest.warns(UserWarning, match="in PyTorch instead of its kernels"):
        assert module(x, A, B, thin_dtype) is thin_eager
    assert [reason in key for key in lowrank.stats()["fallback"]] == [True]
    with lowrank.strict(), pytest.raises(lowrank.FallbackError, match=reason):
        module(x, A, B, thin_dtype)


def test_a_base_output_of_another_dtype(interpreted):
    """Quantised layers may answer in another dtype than they were asked in: eager takes it, forward and backward."""
    x, A, B = (t.normal_().requires_grad_() for t in tensors(8, 6, 4, 2))
    base = torch.randn(8, 4)
    with pytest.warns(UserWarning, match="a base output of torch.float32 beside adapters in torch.bfloat16"):
        (y,) = lora_projections(x, (Projection(None, None, (Adapter(A, B),), base),))
    y.sum().backward()
    assert y.dtype is torch.float32
    torch.testing.assert_close(y, base + (x @ A.mT @ B.mT).float(), rtol=2e-2, atol=2e-2)


def test_nothing_to_do_is_no_fallback(interpreted):
    assert module(*tensors(0, 6, 4, 2)) is thin_eager
    assert module(*tensors(8, 6, 0, 2)) is thin_eager
    assert module(*tensors(8, 6, 4, 2)).__name__ == "lowrank.kernels.thin"
    assert lowrank.stats()["fallback"] == {}


def test_small_calls_take_fewer_launches_on_a_gpu(fresh):
    factors = tensors(1, 4096, 4096, 16)[1:]

    def small(M, dtype=torch.bfloat16, thin=torch.bfloat16, dropout=False, factors=factors):
        return prefers_eager(M, 4096, 4096, dtype, factors, thin, dropout)

    assert small(1)
    assert small(128)
    assert not small(8192)
    # what would cost PyTorch launches of its own stays with the kernels
    assert not small(1, dropout=True)
    assert not small(1, thin=torch.float32)
    assert not small(1, factors=tensors(1, 4096, 4096, 16, adapter=torch.float32)[1:])


def test_eager_needs_no_more_launches_than_peft_where_it_is_chosen(fresh):
    """Operators that would launch a kernel, one forward: PEFT's five (two thin GEMMs, base, scale, add), ours three."""
    x, A, B = (torch.randn(4, 64), torch.randn(8, 64), torch.randn(32, 8))
    W = torch.randn(32, 64)

    def launches(f):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile, torch.no_grad():
            f()
        names = {"aten::mm", "aten::addmm", "aten::addmm_", "aten::mul", "aten::add", "aten::add_", "aten::copy_"}
        return sum(event.count for event in profile.key_averages() if event.key in names)

    linear = torch.nn.functional.linear
    fresh.setenv("LOWRANK_BACKEND", "eager")  # a GPU's order of operations: a CPU's is one call
    assert launches(lambda: lowrank.lora_linear(x, W, A, B, 2.0)) == 3
    assert launches(lambda: linear(x, W) + linear(linear(x, A), B) * 2.0) >= 5


def test_importing_the_package_imports_no_kernel():
    import subprocess
    import sys

    code = "import lowrank, sys; lowrank.lora_linear; print('lowrank.kernels.thin' in sys.modules or 'triton' in sys.modules)"
    environment = {k: v for k, v in os.environ.items() if k not in ("LOWRANK_BACKEND", "TRITON_INTERPRET")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == "False"
