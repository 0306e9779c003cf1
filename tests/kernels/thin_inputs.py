"""What the kernel tests share: where they run, shapes and inputs."""

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
MEAN = 33, 130, 66, (24,)  # where the kernels are compared with eager in the mean
DTYPES = [(BF16, BF16), (BF16, FP32), (FP16, FP16), (FP16, FP32), (FP32, FP32)]  # activations, thin products
SHAPES = [
    (1, 65, 33),
    (2, 8, 8),
    (3, 33, 129),
    (7, 64, 100),
    (16, 257, 65),
    (33, 130, 66),
    (64, 128, 128),
    (256, 96, 513),
]
RANKS = [1, 8, 3, 16, 24, 64, 100, 256]
# every shape and every rank once, not their product; then several adapters of unequal rank
CASES = [(*shape, (rank,)) for shape, rank in zip(SHAPES, RANKS, strict=True)]
CASES += [(133, 300, 77, ranks) for ranks in ((3, 16, 24), (16, 16), (64, 100))]
CASES += [(40, 150, 77, (512,))]

if DEVICE == "cuda":  # a case is a compilation there, about a second each: a third of them, the interpreter has run all
    CASES = [CASES[i] for i in (0, 5, 7, 8)]


def randn(*size, dtype):
    return torch.randn(*size).to(dtype).to(DEVICE)


def strided(t):
    """The same numbers with a row stride that is not the width."""
    wide = torch.zeros(t.shape[0], 2 * t.shape[1] + 3, dtype=t.dtype, device=t.device)
    wide[:, 1 : 1 + t.shape[1]] = t
    return wide[:, 1 : 1 + t.shape[1]]


def absolutes(*tensors):
    return [[t.abs() for t in argument] if isinstance(argument, list) else argument.abs() for argument in tensors]


def far_rows(rows, columns, dtype):
    """[rows, columns] over rows so far apart that an offset passes 2**31 elements; untouched memory costs nothing."""
    stride = (1 << 31) // (rows - 1) + 8
    return torch.zeros((rows - 1) * stride + columns, dtype=dtype, device=DEVICE).as_strided(
        (rows, columns), (stride, 1)
    )
