import pytest
import torch
import torch.nn as nn

from liger_kernel.ops.lora import MAX_RANK
from liger_kernel.transformers.functional import liger_lora_linear
from liger_kernel.transformers.lora import LigerLoRALinear
from liger_kernel.utils import infer_device

device = infer_device()
# Triton's interpreter, for runs without a GPU, multiplies bf16 as integers
no_bf16 = pytest.mark.skipif(device == "cpu", reason="bfloat16 needs a GPU")
dtypes = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=no_bf16)]


def torch_lora_linear(x, weight, lora_A, lora_B, scaling, bias):
    return torch.nn.functional.linear(x, weight, bias) + scaling * (x @ lora_A.t() @ lora_B.t())


def inputs(shape, out_features, rank, dtype, bias=True):
    torch.manual_seed(0)
    sizes = [shape, (out_features, shape[-1]), (rank, shape[-1]), (out_features, rank)]
    tensors = [torch.randn(size, device=device) / size[-1] ** 0.5 for size in sizes]
    tensors.append(torch.randn(out_features, device=device) if bias else None)
    return [None if t is None else t.to(dtype).requires_grad_() for t in tensors]


def run(function, tensors, scaling, dy):
    """[y, and the gradient of each tensor]"""
    x, weight, lora_A, lora_B, bias = tensors
    y = function(x, weight, lora_A, lora_B, scaling, bias)
    wanted = [t for t in tensors if t is not None and t.requires_grad]
    return [y, *torch.autograd.grad(y, wanted, dy.to(y.dtype))]


def error(out, oracle):
    return ((out.double() - oracle).norm() / oracle.norm()).item()


@pytest.mark.parametrize("dtype", dtypes)
@pytest.mark.parametrize(
    "shape, out_features, rank",
    [
        ((2, 64, 128), 192, 16),
        ((3, 41, 67), 35, 5),  # weird shapes
        ((1, 1, 123), 123, 1),
        ((1200, 48), 40, 8),  # more rows than one split of the reductions
        ((70, 96), 80, MAX_RANK),
    ],
)
def test_error_against_fp64_is_not_larger_than_torchs(shape, out_features, rank, dtype):
    tensors = inputs(shape, out_features, rank, dtype)
    doubles = [t.detach().double().requires_grad_() for t in tensors]
    dy = torch.randn(*shape[:-1], out_features, device=device)
    ours = run(liger_lora_linear, tensors, 1.5, dy.to(dtype))
    theirs = run(torch_lora_linear, tensors, 1.5, dy.to(dtype))
    oracle = run(torch_lora_linear, doubles, 1.5, dy.to(dtype))
    # where few numbers are summed the ratio of two errors is luck: 3u of what is summed, in absolute values
    sizes = run(torch_lora_linear, [t.detach().abs().requires_grad_() for t in doubles], 1.5, dy.to(dtype).abs())
    for name, out, eager, exact, size in zip(["y", "x", "weight", "A", "B", "bias"], ours, theirs, oracle, sizes):
        assert out.dtype == eager.dtype and out.shape == eager.shape
        noise = 1.5 * torch.finfo(dtype).eps * (size.norm() / exact.norm()).item()
        budget = max(1.15 * error(eager, exact), noise)
        assert error(out, exact) <= budget, f"{name}: {error(out, exact):.2e} > {budget:.2e}"


def test_a_frozen_weight_gets_no_gradient_and_gradients_of_factors_have_their_dtype():
    x, weight, lora_A, lora_B, _ = inputs((7, 40), 24, 4, torch.float16)
    weight.requires_grad_(False)
    lora_A, lora_B = (t.detach().float().requires_grad_() for t in (lora_A, lora_B))
    y = liger_lora_linear(x, weight, lora_A, lora_B, 2.0)
    y.sum().backward()  # strides of 0
    assert weight.grad is None and y.dtype == x.grad.dtype == torch.float16
    assert lora_A.grad.dtype == lora_B.grad.dtype == torch.float32
    exact = [t.detach().double().requires_grad_() for t in (x, weight, lora_A, lora_B)]
    torch_lora_linear(*exact, 2.0, None).sum().backward()
    for found, expected in zip((x, lora_A, lora_B), (exact[0], exact[2], exact[3])):
        assert error(found.grad, expected.grad) < 2e-3


def test_module_starts_as_the_base_and_trains_its_factors_alone():
    torch.manual_seed(0)
    base = nn.Linear(40, 24, device=device)
    layer, x = LigerLoRALinear(base, r=4, lora_alpha=16), torch.randn(5, 40, device=device)
    torch.testing.assert_close(layer(x), base(x), rtol=1e-4, atol=1e-5)
    trained = {name for name, p in layer.named_parameters() if p.requires_grad}
    assert trained == {"lora_A.weight", "lora_B.weight"} and layer.scaling == 4
    with torch.no_grad():
        layer.lora_B.weight.normal_()
    layer(x).square().sum().backward()
    A, B = (m.weight.detach().clone().requires_grad_() for m in (layer.lora_A, layer.lora_B))
    torch_lora_linear(x, base.weight, A, B, 4.0, base.bias).square().sum().backward()
    torch.testing.assert_close(layer.lora_A.weight.grad, A.grad, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(layer.lora_B.weight.grad, B.grad, rtol=1e-3, atol=1e-3)


def test_autocast():
    dtype = torch.float16 if device == "cpu" else torch.bfloat16
    tensors = inputs((6, 40), 24, 4, torch.float32, bias=False)
    with torch.autocast(device, dtype):
        y = liger_lora_linear(*tensors[:4], 2.0)
    assert y.dtype == dtype
    grads = torch.autograd.grad(y.float().sum(), tensors[:4])
    assert all(grad.dtype == torch.float32 for grad in grads)


def test_refusals():
    x, weight, lora_A, lora_B, _ = inputs((7, 40), 24, 4, torch.float32)
    with pytest.raises(ValueError, match="do not fit together"):
        liger_lora_linear(x, weight, lora_A, lora_B.t(), 1.0)
    x, weight, lora_A, lora_B, _ = inputs((7, 40), 24, MAX_RANK + 1, torch.float32)
    with pytest.raises(ValueError, match="rank must be between 1 and 128, got 129"):
        liger_lora_linear(x, weight, lora_A, lora_B, 1.0)
