import contextlib
import importlib.util
import os
from pathlib import Path

with contextlib.suppress(
    ImportError
):  # before what loads Python's own distutils: Inductor imports it late, and then it fails
    import setuptools  # noqa: F401

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def _fixed_order_dots():
    """Triton's interpreter multiplies with NumPy, whose BLAS gives a row other bits beside other rows and on other CPUs.

    Here every element of ``tl.dot`` is a sum of its own: fp32 products, added one after the other over k in fp32, then to the
    accumulator.  Nothing is wider than on a GPU, so nothing that a sum loses is hidden.
    """
    from triton.runtime import interpreter

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        a_data, b_data = (t.data.astype(d.data.dtype, copy=False) for t in (a, b))
        total = np.zeros_like(d.data)
        product = np.empty_like(d.data)
        for k in range(a_data.shape[-1]):
            np.multiply(a_data[..., k, None], b_data[..., k, None, :], out=product)
            np.add(total, product, out=total)
        return interpreter.TensorHandle(total + d.data, d.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = create_dot


if INTERPRETED:
    _fixed_order_dots()

# Tests with a number or a bit in an assertion that another CPU could break: tests/other_cpus.sh runs the small ones as several.
NUMERIC = {
    *("kernels", "ops", "nn"),  # folders
    *("analysis", "contrib", "costs", "factor_files", "optim", "registry", "statistics", "svd", "svf_model"),  # files
    *("expert_files", "experts"),
    *("bnb", "compiled", "dora", "dropout_stream", "hub", "peft", "proxy_tuning", "siblings", "trainer", "trl"),
}


class _Environment:
    """monkeypatch, of which the choice of backends hears."""

    def __init__(self, monkeypatch):
        self.setattr = monkeypatch.setattr
        self.setenv, self.delenv = (self._then_read(f) for f in (monkeypatch.setenv, monkeypatch.delenv))

    @staticmethod
    def _then_read(change):
        from lowrank.ops._choice import read_environment

        def run(*args, **kwargs):
            change(*args, **kwargs)
            read_environment()

        return run


@pytest.fixture
def environment(monkeypatch):
    from lowrank.ops._choice import read_environment

    with monkeypatch.context() as changes:
        yield _Environment(changes)
    read_environment()


@pytest.fixture(scope="session")
def setup():
    """setup.py."""
    if not (ROOT / "setup.py").exists():
        pytest.skip("needs the repository")
    spec = importlib.util.spec_from_file_location("lowrank_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def poisoned_memory_and_fixed_seed():
    """torch.empty returns nan, so what leaves an element unwritten cannot pass."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def _largest(value) -> int:
    """The largest int among a test's parameters."""
    if hasattr(value, "params"):
        value = tuple(value.params.values())
    if isinstance(value, (tuple, list)):
        return max(map(_largest, value), default=0)
    return value if type(value) is int else 0


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(config, items):
    """What cannot run here is left out by its marker, not skipped: a skip that is printed is one to look at."""
    cuda = torch.cuda.is_available()
    here = []
    for item in items:
        folder, stem = item.path.parent.name, item.path.stem.removeprefix("test_")
        if stem != "compile":
            if folder == "kernels":
                item.add_marker("kernel")
                if cuda and not INTERPRETED:
                    item.add_marker("gpu")
            if (folder in NUMERIC or stem in NUMERIC) and _largest(getattr(item, "callspec", None)) <= 200:
                item.add_marker("numeric")
        runs = cuda or "gpu" not in item.keywords
        runs &= cuda or INTERPRETED or "kernel" not in item.keywords
        if runs:
            here.append(item)
    config.hook.pytest_deselected(items=[item for item in items if item not in set(here)])
    items[:] = here
