"""Rows of experts, for the kernels' tests: how many each has, and where they come from."""

import torch
from thin_inputs import DEVICE

COUNTS = [[3, 0, 5, 1], [0, 40, 0], [17, 1, 0, 70, 2], [1], [0, 0, 6]]


def routing(counts, choices=1, behind=0):
    """(order, ends) on the device: the choices of as many tokens in some order, each expert's rows behind the other's."""
    rows = sum(counts) + behind
    assert rows % choices == 0
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(rows, generator=generator)
    return order.to(DEVICE), torch.tensor(counts).cumsum(0).int().to(DEVICE)


def expert_of(counts):
    return torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)).to(DEVICE)


def spread(stack, counts):
    """[rows, ...]: each row's expert's."""
    return stack[expert_of(counts)]
