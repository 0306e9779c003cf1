"""What layers keep of their weights, and what ``merge()`` says about the rounding of a merged one."""

import contextlib
import warnings
from collections.abc import Iterator

import torch

from .. import _stats
from ..ops.materialize import MergeReport

LEAST = 0.5


def report_merge(report: MergeReport, dtype: torch.dtype) -> None:
    """Warn if the rounding kept less than half of the update; ValueError under ``lowrank.strict()``."""
    if report.kept >= LEAST:
        return
    message = (
        f"merge: rounding to {dtype} keeps {report.kept:.0%} of the update ({report.changed} of {report.numel} weights"
        " change); unmerged, or in a wider weight, nothing is lost"
    )
    if _stats.is_strict():
        raise ValueError(message)
    warnings.warn(message, stacklevel=3)


@contextlib.contextmanager
def ordinary() -> Iterator[None]:
    """No grad, and what is made in here may be kept: under inference_mode, too, it is a tensor that backward can save."""
    with torch.inference_mode(False), torch.no_grad():
        yield
