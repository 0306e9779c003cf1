import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_memory_and_fixed_seed():
    """torch.empty returns nan, so what leaves an element unwritten cannot pass."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items):
    for item in items:
        if torch.cuda.is_available() and item.path.parent.name == "kernels" and item.path.stem != "test_compile":
            item.add_marker("gpu")  # the interpreter's tests, on the device
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
