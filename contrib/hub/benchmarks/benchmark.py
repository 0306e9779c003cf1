import torch
from kernels.benchmark import Benchmark


class LoraLinear(Benchmark):
    """One linear of Llama-3-8B with a rank-16 LoRA, bf16; ``base`` is the frozen linear alone."""

    seed = 0

    def setup(self):
        rows, K, N, r = (4096, 4096, 4096, 16) if self.device == "cuda" else (256, 512, 512, 16)
        options = dict(device=self.device, dtype=torch.bfloat16)
        # sizes at which a rounding of bf16 is below the runner's tolerance, 0.01
        self.x, self.weight = torch.randn(rows, K, **options), torch.randn(N, K, **options) / K**0.5 / 10
        self.A, self.B = torch.randn(r, K, **options) / K**0.5, torch.randn(N, r, **options) / r**0.5 / 10
        self.dy = torch.randn(rows, N, **options) / (rows * N) ** 0.5 * 6
        self.factors = [t.requires_grad_() for t in (self.x, self.A, self.B)]

    def benchmark_base(self):
        self.out = torch.nn.functional.linear(self.x, self.weight)

    def benchmark_forward(self):
        self.out = self.kernel.lora_linear(self.x, self.weight, self.A, self.B, 2.0)

    def verify_forward(self) -> torch.Tensor:
        return torch.nn.functional.linear(self.x, self.weight) + 2 * (self.x @ self.A.T @ self.B.T)

    def benchmark_forward_and_backward(self):
        y = self.kernel.lora_linear(self.x, self.weight, self.A, self.B, 2.0)
        self.out = torch.autograd.grad(y, self.factors, self.dy)[1]

    def verify_forward_and_backward(self) -> torch.Tensor:
        return torch.autograd.grad(self.verify_forward(), self.factors, self.dy)[1]
