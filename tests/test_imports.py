"""What importing lowrank does, and does not: each in a fresh interpreter."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def python(code: str, cwd: Path = ROOT, *options: str) -> str:
    done = subprocess.run([sys.executable, *options, "-c", code], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_imports_nothing_heavy_and_touches_no_device():
    code = (
        "import os, sys, torch; before = dict(os.environ), torch.get_num_threads(); import lowrank;"
        "heavy = {'triton', 'transformers', 'peft', 'trl', 'rich', 'matplotlib', 'safetensors', 'bitsandbytes'};"
        "heavy &= set(sys.modules);"
        "assert not heavy, heavy; assert not torch.cuda.is_initialized();"
        "assert before == (dict(os.environ), torch.get_num_threads()); print('ok')"
    )
    assert python(code) == "ok"


@pytest.mark.parametrize("package", ["triton", "transformers", "peft", "rich", "matplotlib", "bitsandbytes"])
def test_works_without(package):
    code = (
        f"import sys; sys.modules[{package!r}] = None; import torch, lowrank;"
        "x = torch.ones(2, 4); print(lowrank.lora_linear(x, torch.ones(3, 4), torch.ones(1, 4), torch.ones(3, 1)).shape[1])"
    )
    assert python(code) == "3"


def test_a_missing_extra_gives_a_one_line_hint():
    code = (
        "import sys; sys.modules['peft'] = None; import lowrank, torch\n"
        "for call in (lambda: lowrank.adapt(torch.nn.Linear(2, 2), None), lambda: __import__('lowrank.integrations.peft')):\n"
        "    try: call()\n"
        "    except ImportError as error: print(error)"
    )
    lines = python(code).splitlines()
    assert len(lines) == 2
    assert all("pip install 'lowrank-kernels[peft]'" in line for line in lines)
    pytest.importorskip("peft")
    code = (
        "import sys; sys.modules['trl'] = None\n"
        "try: import lowrank.integrations.trl\n"
        "except ImportError as error: print(error)"
    )
    assert python(code) == "this needs TRL: pip install 'trl>=1.16'"


def test_every_name_in_all_is_there_and_documented():
    import lowrank

    for name in lowrank.__all__:
        value = getattr(lowrank, name)
        assert name == "__version__" or value.__doc__, name


def test_the_kernels_folder_is_reached_as_lowrank_kernels_only():
    assert (ROOT / "lowrank" / "kernels").is_symlink()
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert python("import lowrank.kernels as k; print(list(k.__path__)[0])") == str(ROOT / "lowrank" / "kernels")


def test_peft_and_transformers_import_from_the_repository_root():
    """With Hugging Face's `kernels` installed (the dev extra does), which a package kernels/ here would hide."""
    pytest.importorskip("peft")
    code = (
        "import importlib.metadata as m; m.version('kernels'); import peft, transformers;"
        "from transformers.models.llama import modeling_llama; import kernels; print(hasattr(kernels, 'get_kernel'))"
    )
    assert python(code) == "True"


def test_unknown_backend_is_refused(environment):
    import torch

    import lowrank
    from lowrank.ops._choice import backend

    environment.setenv("LOWRANK_BACKEND", "eager")
    assert backend(torch.device("cpu"))[0] == "eager"
    environment.setenv("LOWRANK_BACKEND", "cutlass")
    with pytest.raises(ValueError, match="LOWRANK_BACKEND='cutlass'"):
        backend(torch.device("cpu"))
    with pytest.raises(ValueError, match="LOWRANK_BACKEND='cutlass'"):
        lowrank.lora_linear(torch.ones(2, 4), torch.ones(3, 4), torch.ones(1, 4), torch.ones(3, 1))
