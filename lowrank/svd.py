"""Singular value decompositions of weights, W = U diag(S) Vh, for SVD-scaled layers (SVF; arXiv 2501.06252)."""

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch

METHODS = ("auto", "svd", "eigh", "randomized")
WEIGHT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_BLOCK = 1024  # rows or columns that errors() holds in fp64 at a time
_WELL_CONDITIONED = 1e-3  # σ/σ₁ above which eps σ₁² is nothing beside σ²: 2e-10 in fp64
_MOST_ITERATIONS = 32
_SETTLED = 1e-5  # the largest relative change of a singular value in the last power iteration


class FactorErrors(NamedTuple):
    """How good factors of a weight are, all computed in fp64.

    orthogonality: the largest entry of |UᵀU − I| and |Vh Vhᵀ − I|.
    reconstruction: ‖W − U S Vh‖_F / ‖W‖_F.  With every direction it is rounding; with the first k of them it is the
        share of the weight that lies outside, whoever computed them.
    residual: whether the directions are the singular ones: the largest ‖W vᵢ − σᵢ uᵢ‖ or ‖Wᵀ uᵢ − σᵢ vᵢ‖ over σ₁.
    """

    orthogonality: float
    reconstruction: float
    residual: float


class SVDFactors(NamedTuple):
    """The first k singular directions of a weight [N,K]: U [N,k] and Vh [k,K] orthonormal, S [k] descending and ≥ 0."""

    U: torch.Tensor
    S: torch.Tensor
    Vh: torch.Tensor

    @torch.no_grad()
    def errors(self, weight: torch.Tensor) -> FactorErrors:
        """How well these are factors of ``weight`` [N,K], on the factors' device, block by block in fp64.

        Raises: ValueError if the shapes do not fit.
        """
        U, S, Vh = self
        (N, k), K = U.shape, Vh.shape[1]
        if tuple(weight.shape) != (N, K):
            raise ValueError(f"weight: expected [{N}, {K}], the shape of these factors, got {list(weight.shape)}")
        weight, V, S = weight.detach().to(U.device), Vh.mT, S.double()
        with torch.autocast(U.device.type, enabled=False):
            orthogonality = max(_orthogonality(U), _orthogonality(V))
            outside, total = S.new_zeros(()), S.new_zeros(())
            for rows in _blocks(N):
                US = U[rows].double() * S
                for columns in _blocks(K):
                    block = weight[rows, columns].double()
                    total += block.square().sum()
                    outside += (block - US @ V[columns].double().mT).square().sum()
            if k < min(N, K):
                residual = max(_residual(weight, V, U, S), _residual(weight.mT, U, V, S))
            else:  # nothing is outside, so what is left of W bounds every direction's residual
                residual = outside.sqrt().item()
        norm, largest = total.sqrt().item(), S[0].item()
        return FactorErrors(
            orthogonality, outside.sqrt().item() / norm if norm else 0.0, residual / largest if largest else residual
        )


@torch.no_grad()
def svd_factors(
    weight: torch.Tensor, k: int | None = None, *, method: str = "auto", dtype: torch.dtype = torch.float32
) -> SVDFactors:
    """The first ``k`` singular directions of ``weight`` (all of them by default), with a fixed sign.

    In every column of U the entry of largest magnitude is positive (the first of equals).  U and Vh are orthonormal for
    weights of any rank, zero included.  The same call gives the same bits; torch's generators are not touched.

    Args:
        weight: [N,K] fp16, bf16, fp32 or fp64, on any device; computed there.
        k: 1 ≤ k ≤ min(N,K).
        method:
            "svd": torch.linalg.svd in ``dtype`` (on CUDA its default: Jacobi, then QR where that does not converge).
            "eigh": eigenvectors of the Gram matrix of the smaller side in fp64, the other side by QR.  Exact to fp32;
                singular values below 1e-8 σ₁ are not resolved.
            "randomized": subspace iteration on 2k+32 random directions (Halko, Martinsson, Tropp 2011) until no
                singular value moves by more than 1e-5, at most 32 times; the last projection in fp64.  Its residual (see
                :meth:`SVDFactors.errors`) is small where the spectrum falls off and largest where it is flat at k.
            "auto": see :func:`resolve_method`.
        dtype: float32 or float64, of the result and, at least, of the computation.

    Of a weight on the meta device the factors are there too: shapes and dtypes alone.

    Raises: ValueError for a weight that is not 2-D, is empty or not finite, for k or method out of range; TypeError for
        dtypes that are not floating point.
    """
    if not isinstance(weight, torch.Tensor):
        raise TypeError(f"weight: expected a tensor, got {type(weight).__name__}")
    if weight.dtype not in WEIGHT_DTYPES:
        raise TypeError(f"weight: expected float16, bfloat16, float32 or float64, got {weight.dtype}")
    if weight.dim() != 2 or not weight.numel():
        raise ValueError(f"weight: expected [N, K] with N, K ≥ 1, got {list(weight.shape)}")
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"dtype: expected torch.float32 or torch.float64, got {dtype}")
    n = min(weight.shape)
    method = resolve_method(method, weight.shape, k, dtype)
    k = n if k is None else k
    if weight.is_meta:
        (N, K), empty = weight.shape, torch.empty(0, dtype=dtype, device="meta")
        return SVDFactors(empty.new_empty(N, k), empty.new_empty(k), empty.new_empty(k, K))
    low, high = torch.aminmax(weight.detach())
    largest = max(-low.item(), high.item())
    if not math.isfinite(largest):
        raise ValueError("weight: expected finite values, got NaN or infinity")
    working = torch.float64 if method == "eigh" else dtype
    work = weight.detach().to(torch.promote_types(weight.dtype, working))
    # by a power of two, so exact: no square overflows, nothing is lost below the smallest normal number
    limit = 100 if work.dtype is torch.float32 else 1000
    exponent = max(-limit, min(math.frexp(largest)[1], limit)) if largest else 0
    work = (work * 2.0**-exponent).to(working)
    with torch.autocast(weight.device.type, enabled=False):
        U, S, Vh = _DECOMPOSE[method](work, k, dtype)
    S = S[:k].double() * 2.0**exponent
    U, S, Vh = (t.to(dtype).contiguous() for t in (U[:, :k], S, Vh[:k]))
    sign = U.gather(0, U.abs().argmax(dim=0, keepdim=True)).sign()  # [1,k]; no column of U is zero
    return SVDFactors(U * sign, S, Vh * sign.mT)


def resolve_method(method: str, shape: Iterable[int], k: int | None, dtype: torch.dtype = torch.float32) -> str:
    """Which method "auto" is for a weight of ``shape``; another one is returned as it is.

    "randomized" for k ≤ min(N,K)/64, where it is up to four times faster on square weights; otherwise what finds every
    direction: "eigh" for float32 results, as fast as "svd" on square weights, faster on others and a hundred times closer
    to orthonormal (it computes in fp64), and "svd" for float64.  Measured on CPUs.

    Raises: ValueError for an unknown method or k outside 1 ... min(N,K).
    """
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    n = min(shape)
    if k is not None and (not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= n):
        raise ValueError(f"k: expected an integer from 1 to min(N, K) = {n}, or None, got {k!r}")
    if method != "auto":
        return method
    if k is not None and k <= n // 64:
        return "randomized"
    return "eigh" if dtype is torch.float32 else "svd"


def _svd(W, k, dtype):
    return torch.linalg.svd(W, full_matrices=False)


def _eigh(W, k, dtype):
    N, K = W.shape
    if N > K:
        V, S, Uh = _eigh(W.mT, k, dtype)
        return Uh.mT, S, V.mT
    Q = torch.linalg.eigh(W @ W.mT).eigenvectors.flip(1)[:, :k]  # [N,k], by falling eigenvalue
    P = W.mT @ Q  # columns σv, orthogonal up to eps σ₁² in their products
    S = P.norm(dim=0)
    if dtype is torch.float32 and S.min() > _WELL_CONDITIONED * S.max():
        V = P / S
    else:  # Householder's QR makes them orthonormal whatever their size, zero included
        V, R = torch.linalg.qr(P)
        V, S = V * torch.where(R.diagonal() < 0, -1.0, 1.0), R.diagonal().abs()
    S, order = S.sort(descending=True, stable=True)  # rounding may have swapped equals
    return Q[:, order], S, V[:, order].mT


def _randomized(W, k, dtype):
    N, K = W.shape
    if N > K:
        V, S, Uh = _randomized(W.mT, k, dtype)
        return Uh.mT, S, V.mT
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(K, min(2 * k + 32, N), generator=generator, dtype=torch.float32).to(W)
    Q, S = torch.linalg.qr(W @ random).Q, None
    for _ in range(_MOST_ITERATIONS):
        Z, R = torch.linalg.qr(W.mT @ Q)
        previous, S = S, torch.linalg.svdvals(R)[:k]
        Q = torch.linalg.qr(W @ Z).Q
        if previous is not None and ((S - previous).abs() <= _SETTLED * S).all():
            break
    Q = torch.linalg.qr(Q.double()).Q  # fp64 here makes the result independent of TF32 and the like, too
    U, S, Vh = torch.linalg.svd(Q.mT @ W.double(), full_matrices=False)
    return Q @ U[:, :k], S[:k], Vh[:k]


_DECOMPOSE = {"svd": _svd, "eigh": _eigh, "randomized": _randomized}


def _blocks(size: int) -> Iterator[slice]:
    return (slice(start, start + _BLOCK) for start in range(0, size, _BLOCK))


def _orthogonality(U: torch.Tensor) -> float:
    """The largest entry of |UᵀU − I|."""
    k, worst = U.shape[1], U.new_zeros((), dtype=torch.float64)
    for rows in _blocks(k):
        left = U[:, rows].double()
        for columns in _blocks(k):
            if columns.start < rows.start:  # symmetric
                continue
            product = left.mT @ U[:, columns].double()
            if columns == rows:
                product.diagonal().sub_(1)
            worst = torch.maximum(worst, product.abs().max())
    return worst.item()


def _residual(W: torch.Tensor, V: torch.Tensor, U: torch.Tensor, S: torch.Tensor) -> float:
    """The largest ‖W vᵢ − σᵢ uᵢ‖ over the columns of V."""
    squares = torch.zeros_like(S)
    for rows in _blocks(W.shape[0]):
        block = W[rows].double()
        for ks in _blocks(len(S)):
            difference = block @ V[:, ks].double() - U[rows, ks].double() * S[ks]
            squares[ks] += difference.square().sum(dim=0)
    return squares.max().sqrt().item()
