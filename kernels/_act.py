"""Device functions for what stands between an expert's two products: lowrank/ops/activations.py, in fp32."""

import triton
import triton.language as tl


@triton.jit
def act(gate, up, alpha, limit, NAME: tl.constexpr, GATED: tl.constexpr):
    """h of fp32 tiles; without a gate of ``gate`` alone."""
    if NAME == "clamped":
        gate, up = tl.minimum(gate, limit), tl.minimum(tl.maximum(up, -limit), limit)
        return (up + 1.0) * gate * tl.sigmoid(alpha * gate)
    else:
        f, _ = function(gate, NAME)
        if GATED:
            f *= up
        return f


@triton.jit
def act_backward(gate, up, dh, alpha, limit, NAME: tl.constexpr, GATED: tl.constexpr):
    """(dgate, dup) of fp32 tiles; without a gate (dG, zeros)."""
    if NAME == "clamped":
        inside_gate, inside_up = gate <= limit, (up >= -limit) & (up <= limit)
        gate, up = tl.minimum(gate, limit), tl.minimum(tl.maximum(up, -limit), limit)
        sigmoid = tl.sigmoid(alpha * gate)
        dup = tl.where(inside_up, dh * gate * sigmoid, 0.0)
        dgate = tl.where(inside_gate, dh * (up + 1.0) * sigmoid * (1.0 + alpha * gate * (1.0 - sigmoid)), 0.0)
        return dgate, dup
    else:
        f, slope = function(gate, NAME)
        if GATED:
            return dh * up * slope, dh * f
        else:
            return dh * slope, tl.zeros_like(dh)


@triton.jit
def function(x, NAME: tl.constexpr):
    """(f(x), its derivative)."""
    if NAME == "silu":
        sigmoid = tl.sigmoid(x)
        return x * sigmoid, sigmoid * (1.0 + x * (1.0 - sigmoid))
    elif NAME == "relu2":
        positive = tl.maximum(x, 0.0)
        return positive * positive, 2.0 * positive
    elif NAME == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        return x * cdf, cdf + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    else:  # gelu_tanh, by 1 + tanh(z) = 2 sigmoid(2 z)
        inner = 1.5957691216057308 * x * (1.0 + 0.044715 * x * x)
        sigmoid = tl.sigmoid(inner)
        slope = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
        return x * sigmoid, sigmoid + x * sigmoid * (1.0 - sigmoid) * slope
