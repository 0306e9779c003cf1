"""The generated kernel repository, loaded by Hugging Face's ``kernels`` beside the installed lowrank."""

import copy
import functools
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
pytest.importorskip("kernels.layer")  # Hugging Face's, not the folder of that name
import kernels
from kernels import LocalLayerRepository, Mode, kernelize, replace_kernel_forward_from_hub, use_kernel_mapping
from peft import LoraConfig
from peft.tuners.lora.layer import Linear as PeftLinear
from test_peft import IDS, agree, as_right_as_peft, llama, peft_llama, step

import lowrank
from lowrank.integrations.peft import is_patched, patch, unpatch

ROOT = Path(__file__).parent.parent.parent
NAME = "PeftLoraLinear"
TRAINING = Mode.TRAINING | Mode.TORCH_COMPILE


def load(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


hub = load(ROOT / "contrib" / "hub.py")


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    out = tmp_path_factory.mktemp("hub")
    subprocess.run([sys.executable, ROOT / "contrib" / "hub.py", out, "--repo-id", "someone/lowrank"], check=True)
    return out


@pytest.fixture(scope="module")
def kernel(repository):
    return kernels.get_local_kernel(repository)


@pytest.fixture(autouse=True)
def clean(kernel):
    replace_kernel_forward_from_hub(PeftLinear, NAME)
    for package in (lowrank._stats, kernel._stats):
        package.reset()
    yield
    unpatch()
    kernel.strict(False)
    del PeftLinear.kernel_layer_name, PeftLinear.kernel_condition


@pytest.fixture
def run(repository):
    """Kernelize, from the local repository; nothing may be left as it was."""

    def kernelized(model, mode=TRAINING):
        layer = LocalLayerRepository(repository, layer_name=NAME)
        with use_kernel_mapping({NAME: {"cpu": layer}}):
            return kernelize(model, mode=mode, use_fallback=False)

    return kernelized


def lora_layers(model):
    return [m for m in model.modules() if isinstance(m, PeftLinear)]


def test_every_layer_runs_on_the_kernel_as_it_does_patched(kernel, run):
    model = peft_llama(lora_alpha=3)
    unpatched, keys = step(model), list(model.state_dict())
    assert run(model) is model
    assert len(lora_layers(model)) == 14
    assert all(m.forward.__func__ is kernel.layers.PeftLoraLinear.forward for m in lora_layers(model))
    with kernel.strict():
        ours = step(model)
    assert kernel.stats(model) == {"fused": 14, "shared": 0, "fallback": {}, "untouched": {}}
    assert list(model.state_dict()) == keys
    agree(ours, unpatched)
    patched = step(patch(peft_llama(lora_alpha=3), siblings=False))
    assert all(torch.equal(ours[name], patched[name]) for name in patched)


def test_kernelized_back_it_is_pefts_again(kernel, run):
    model = peft_llama()
    unpatched = step(model)
    kernelize_back(run(model))
    ours = step(model)
    assert all(torch.equal(ours[name], unpatched[name]) for name in unpatched)
    none = {"fused": 0, "shared": 0, "fallback": {}, "untouched": {"lora.Linear": 14}}
    assert lowrank.stats(model) == kernel.stats(model) == none
    patch(model)  # too late: kernels has bound PEFT's forward to each layer, and the class is not asked any more
    assert sum(lowrank.stats(model)["untouched"].values()) == 14


def kernelize_back(model):
    with use_kernel_mapping({NAME: {"cuda": LocalLayerRepository(ROOT, layer_name=NAME)}}, inherit_mapping=False):
        kernelize(model, mode=TRAINING)


def test_it_is_not_the_installed_package(kernel, run):
    """Another module, other ops, other counts, in one process."""
    assert kernel.layers is not lowrank.integrations.peft_layer
    names = {str(ops).partition("::")[0] for ops in torch._C._dispatch_get_all_op_names() if "::lora_linears" in ops}
    assert names == {"lowrank", kernel._ops.ops.name}
    model = run(peft_llama(target_modules=["q_proj"]))
    step(model)
    assert kernel.stats(model)["fused"] == kernel.stats()["fused"] == 2
    assert lowrank.stats()["fused"] == 0
    assert lowrank.stats(model)["untouched"] == {}
    assert all(is_patched(m) for m in lora_layers(model))


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_is_as_right_as_peft(kernel, run, autocast):
    with kernel.strict():
        as_right_as_peft(
            functools.partial(peft_llama, torch.bfloat16, target_modules=["q_proj"]),
            run,
            lambda: torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        )


def test_compile_fullgraph(kernel, run):
    model = peft_llama(lora_alpha=3, lora_dropout=0.1).eval()
    unpatched = step(model)
    run(model)
    torch._dynamo.reset()
    with kernel.strict():
        ours = step(torch.compile(model, fullgraph=True, backend="aot_eager"))
    agree({name.removeprefix("_orig_mod."): t for name, t in ours.items()}, unpatched)


def test_dropout_and_the_modes(kernel, run):
    model = run(peft_llama(lora_dropout=0.5), Mode.INFERENCE)
    with kernel.strict(), torch.no_grad():
        model.train()
        torch.manual_seed(3)
        first = model(IDS).logits
        torch.manual_seed(3)
        assert torch.equal(model(IDS).logits, first)
        assert not torch.equal(model(IDS).logits, first)
        model.eval()
        quiet = model(IDS).logits
        kernelize_back(model)
        torch.testing.assert_close(quiet, model(IDS).logits)


def test_a_fallback_is_counted_once_by_whoever_took_the_call(kernel, run):
    model = peft_llama(init_lora_weights="mica", target_modules=["q_proj"])
    unpatched = step(model)
    run(model)
    with pytest.warns(UserWarning, match="lowrank falls back to PEFT.*MiCALinearVariant"):
        ours = step(model)
    assert all(torch.equal(ours[name], unpatched[name]) for name in unpatched)
    assert list(kernel.stats(model)["fallback"].values()) == [2]
    with kernel.strict(), pytest.raises(kernel.FallbackError, match="MiCALinearVariant"):
        step(model)
    with model.disable_adapter():  # PEFT's own forward, and no fallback
        torch.testing.assert_close(model(IDS).logits, llama()(IDS).logits)
    assert list(kernel.stats(model)["fallback"].values()) == [2]


@pytest.mark.parametrize("variant", [False, True])
@pytest.mark.parametrize("how", [lambda model: patch(), patch], ids=["process", "model"])
def test_with_the_classes_patched_too(kernel, run, how, variant):
    """The kernel's layer takes the call and its fallback ends at PEFT: no recursion."""
    for order in ((how, run), (run, how)):
        start = "mica" if variant else False
        model = peft_llama(lora_alpha=3, init_lora_weights=start, target_modules=["q_proj", "v_proj"])
        unpatched = step(model)
        for take in order:
            take(model)
        agree(step(model), unpatched)
        counts = kernel.stats(model)
        assert (counts["fused"], sum(counts["fallback"].values())) == ((0, 4) if variant else (4, 0))
        unpatch()


def test_copies_adapters_and_merging(kernel, run):
    model = run(peft_llama(target_modules=["q_proj"], lora_alpha=3))
    twin = copy.deepcopy(model)
    assert all(m.forward.__self__ is m for m in lora_layers(twin))
    with torch.no_grad():
        before = twin(IDS).logits
        lora_layers(model)[0].lora_B["default"].weight.zero_()
        assert torch.equal(twin(IDS).logits, before)
        assert not torch.equal(model(IDS).logits, before)
        torch.testing.assert_close(twin.merge_and_unload()(IDS).logits, before)
    model.add_adapter("second", LoraConfig(r=3, target_modules=["q_proj", "up_proj"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    calls = kernel.stats(model)["fused"]
    ours = step(model)
    assert kernel.stats(model)["fused"] == calls + 2  # up_proj's are new layers, which nobody kernelized
    kernelize_back(model)
    agree(ours, step(model))


def test_build_toml_and_metadata_are_what_kernels_expects(repository):
    from kernels._rust import Build, Digest, DigestAlgorithm, Metadata

    config = Build.open(repository)
    variants = sorted(path.name for path in (repository / "build").iterdir())
    assert variants == sorted(f"torch-{str(backend).lower()}" for backend in config.general.backends)
    ids = set()
    for variant in (repository / "build").iterdir():
        metadata = Metadata.read_from_file(variant / "metadata.json")
        assert (metadata.name.python_name, metadata.version, metadata.license) == ("lowrank", 0, "apache-2.0")
        assert metadata.id.isidentifier()
        assert f'"{metadata.id}"' in (variant / "_ops.py").read_text()
        manifest = Digest.hash_variant(DigestAlgorithm.SHA256, variant)
        listed = json.loads((variant / "metadata.json").read_text())["digest"]["files"]
        assert {path: digest for path, digest in manifest.files.items() if "__pycache__" not in path} == listed
        ids.add(metadata.id)
    assert len(ids) == 2
    assert 'repo-id = "someone/lowrank"' in (repository / "build.toml").read_text()
    assert not [path for path in hub.files_of(repository) if "ACCOUNT" in path.read_text()]
    assert not (repository / "torch-ext" / "lowrank" / "_ops.py").exists()  # kernel-builder writes its own


def test_it_holds_what_it_imports_and_the_code_is_ours(repository, kernel):
    """Nothing but the lines that name the ops' namespace differs from the package's."""
    package = repository / "torch-ext" / "lowrank"
    modules = [path.relative_to(package).with_suffix("") for path in hub.files_of(package) if path.stem != "__init__"]
    for module in modules:
        importlib.import_module(".".join([kernel.__name__, *module.parts]))
    names = {"/".join(module.parts) for module in modules}
    assert {"integrations/peft_layer", "kernels/thin", "kernels/dora"} <= names  # two are imported in functions
    assert {"optim", "delta", "ops/svf", "ops/svf_impl", "ops/logprob", "integrations/peft"}.isdisjoint(names)
    changed = []
    for module in modules:
        ours, source = ((root / module).with_suffix(".py").read_text() for root in (package, ROOT / "lowrank"))
        if ours != source:
            changed.append(module.name)
            lines = set(ours.splitlines()) - set(source.splitlines())
            assert all("ops." in line or "add_op_namespace_prefix" in line for line in lines)
    assert changed == ["_host", "dora", "dropout", "linear", "lora"]


BROKEN = {
    "import peft": "imports peft",
    "def f():\n    from transformers import AutoModel": "imports transformers",
    "import lowrank.bits": "imports lowrank.bits",
    "y = torch.ops.lowrank.lora_linears": "installed package's",
    "import torch\ntorch.library.Library('mine', 'FRAGMENT')": "registers 'mine'",
    "import torch\n@torch.library.register_fake('lowrank::f')\ndef _(x): ...": "registers 'lowrank::f'",
    "match 1:\n    case _: pass": "Pattern matching|3.10",
}


@pytest.mark.parametrize("code", BROKEN, ids=range(len(BROKEN)))
def test_refuses_what_the_hub_would(tmp_path, code):
    (tmp_path / "a.py").write_text(code)
    with pytest.raises((ValueError, SyntaxError), match=BROKEN[code]):
        hub.check(tmp_path / "a.py", tmp_path)


def test_refuses_to_write_over_something_else(tmp_path):
    (tmp_path / "mine.txt").touch()
    with pytest.raises(ValueError, match="out: expected a new folder"):
        hub.write(tmp_path, "someone/lowrank")
    assert (tmp_path / "mine.txt").exists()


def test_its_own_tests_and_benchmark_run(repository, kernel, monkeypatch):
    monkeypatch.setenv("LOCAL_KERNELS", f"someone/lowrank={repository}")
    tests = load(repository / "tests" / "test_lowrank.py")
    tests.test_value_and_gradients(False)
    tests.test_the_layer_is_pure()
    assert tests.lowrank is kernel
    benchmark = load(repository / "benchmarks" / "benchmark.py").LoraLinear()
    benchmark.kernel = kernel
    benchmark.setup()
    for name in ("forward", "forward_and_backward"):
        getattr(benchmark, f"benchmark_{name}")()
        expected = getattr(benchmark, f"verify_{name}")()
        assert torch.allclose(benchmark.out, expected, atol=1e-2)  # what `kernels benchmark` asks for
        assert float(expected.abs().max()) > 0.5


def test_the_kernels_rules_are_checked_by_kernels_itself(kernel):
    """So that this file would notice if the layer stopped being pure."""
    from kernels.layer.layer import _validate_layer

    check = functools.partial(_validate_layer, check_cls=PeftLinear, repo=None)
    check(cls=kernel.layers.PeftLoraLinear)

    class Impure(kernel.layers.PeftLoraLinear):
        state = 1

    for cls, what in ((Impure, "additional members"), (nn.Linear, "constructor")):
        with pytest.raises(TypeError, match=what):
            check(cls=cls)
