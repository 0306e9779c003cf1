import kernels
import pytest
import torch

lowrank = kernels.get_kernel("ACCOUNT/lowrank", version=0, trust_remote_code=True)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def inputs(dtype):
    torch.manual_seed(0)
    shapes = {"x": (3, 7, 40), "weight": (24, 40), "A": (5, 40), "B": (24, 5)}
    return [torch.randn(shape, dtype=dtype, device=DEVICE, requires_grad=True) for shape in shapes.values()]


def formula(x, weight, A, B):
    return x @ weight.T + 2 * (x @ A.T @ B.T)


@pytest.mark.parametrize("compiled", [False, True])
def test_value_and_gradients(compiled):
    def op(x, weight, A, B):
        return lowrank.lora_linear(x, weight, A, B, 2.0)

    if compiled:
        op = torch.compile(op, fullgraph=True, backend="aot_eager")
    tensors = inputs(torch.float32)
    doubles = [t.detach().double().requires_grad_() for t in tensors]
    y, oracle = op(*tensors), formula(*doubles)
    torch.testing.assert_close(y.double(), oracle, rtol=1e-4, atol=1e-4)
    dy = torch.randn_like(y)
    found = torch.autograd.grad(y, tensors, dy)
    for grad, expected in zip(found, torch.autograd.grad(oracle, doubles, dy.double()), strict=True):
        torch.testing.assert_close(grad.double(), expected, rtol=1e-4, atol=1e-4)


def test_the_layer_is_pure():
    layer = lowrank.layers.PeftLoraLinear
    assert layer.has_backward
    assert layer.can_torch_compile
    assert layer.__init__ is torch.nn.Module.__init__
