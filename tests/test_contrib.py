"""The drafts of contrib/ do what they say: Liger's op in Triton's interpreter, PEFT's test, TRL's patch."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from lowrank.testing import error

CONTRIB = Path(__file__).parent.parent / "contrib"
# what the draft takes from liger_kernel 0.8.5, where that is not installed
STUBS = {
    "utils.py": """
import torch
def infer_device():
    return "cuda" if torch.cuda.is_available() else "cpu"
""",
    "ops/utils.py": """
import contextlib, functools, torch
def device_context(device):
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
def ensure_contiguous(f):
    dense = lambda t: t.contiguous() if isinstance(t, torch.Tensor) else t
    return functools.wraps(f)(lambda ctx, *args: f(ctx, *map(dense, args)))
""",
    "ops/__init__.py": "from liger_kernel.ops.lora import LigerLoRAFunction",
    "transformers/__init__.py": "",
    "__init__.py": "",
}
# benchmark_lora.py between what Liger's scripts import and call, whose place these functions take
BENCHMARK = """
import runpy, sys, types
import torch

def test_benchmark(monkeypatch):
    calls, sweep = [], lambda setup_fn, **common: {k: common[k] for k in ("kernel_name", "overwrite")}
    keep = lambda setup_fn: setup_fn
    utils = dict(
        SingleBenchmarkRunInput=types.SimpleNamespace, build_memory_bench_fn=keep, build_speed_bench_fn=keep,
        parse_benchmark_script_args=lambda: types.SimpleNamespace(sweep_mode="token_length", model=None, overwrite=False),
        run_benchmarks=lambda **call: calls.append(call),
    )
    configs = dict(
        MODEL_REGISTRY={}, build_model_config_sweep=sweep, build_token_length_sweep=sweep,
        get_benchmark_model_config=lambda name: None,
    )
    for name, members in (("utils", utils), ("benchmark_model_configs", configs)):
        module = types.ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    runpy.run_path(SCRIPT, run_name="__main__")
    assert [(c["metric_name"], c["metric_unit"], c["kernel_name"]) for c in calls] == [
        ("speed", "ms", "lora"), ("memory", "MB", "lora")
    ]
    for call in calls:
        assert set(call["kernel_operation_modes"]) == {"forward", "backward", "full"}
        found = {}
        for provider in call["kernel_providers"]:
            torch.manual_seed(0)
            config = dict(hidden_size=48, dtype=torch.float16, bsz=2, r=4)
            run = types.SimpleNamespace(x=8, kernel_provider=provider, extra_benchmark_config=config)
            x, layer = call["bench_test_fn"](run)
            found[provider] = layer(x)
            found[provider].sum().backward()
            names = {n.split(".")[-2 if provider == "liger" else -3] for n, p in layer.named_parameters() if p.requires_grad}
            assert names == ({"lora_A", "lora_B"} if provider != "frozen" else set()) and x.grad is not None
        assert set(found) == {"huggingface", "liger", "frozen"}
        for y in found.values():  # B starts at 0
            torch.testing.assert_close(y, found["frozen"], rtol=2e-3, atol=2e-3)
"""


def test_ligers_draft_passes_its_own_tests(tmp_path):
    """In a tree laid out as Liger-Kernel's, in a process of its own: the interpreter is chosen when triton is imported."""
    pytest.importorskip("triton")
    draft, package = CONTRIB / "liger", tmp_path / "liger_kernel"
    for folder in ("ops", "transformers"):
        shutil.copytree(draft / folder, package / folder)
    for name, text in STUBS.items():
        (package / name).write_text(text)
    script = draft / "benchmark" / "scripts" / "benchmark_lora.py"
    (tmp_path / "test_benchmark.py").write_text(f"SCRIPT = {str(script)!r}\n" + BENCHMARK)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        tmp_path,
        draft / "test",
        tmp_path,
    ]
    device = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    environment = os.environ | device | {"PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    passed, skipped = re.search(r"(\d+) passed(?:, (\d+) skipped)?", done.stdout).groups()
    assert int(passed) + int(skipped or 0) == 20
    assert int(skipped or 0) == (0 if torch.cuda.is_available() else 5)  # bf16, which the interpreter cannot multiply


def load(name: str, path: Path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pefts_draft_test_passes(tmp_path):
    pytest.importorskip("peft")
    code = re.search(r"```python\n(.*?)```", (CONTRIB / "peft" / "custom-modules.md").read_text(), re.S)[1]
    (tmp_path / "test_custom_modules.py").write_text(code)
    found = load("test_custom_modules", tmp_path / "test_custom_modules.py")
    tests = found.TestCustomModules()
    tests.test_keys_match_subclasses()
    for how in ("as it is", "deepcopy"):
        tests.test_a_function_may_decline(how)
    tests.test_checkpoints_do_not_know_it(tmp_path)


def test_pefts_second_draft_test_passes(tmp_path):
    pytest.importorskip("peft")
    code = re.search(r"```python\n(.*?)```", (CONTRIB / "peft" / "param-wrapper.md").read_text(), re.S)[1]
    (tmp_path / "test_param_wrapper.py").write_text(code)
    load("test_param_wrapper", tmp_path / "test_param_wrapper.py").test_each_parameter_is_merged_once()


TRL = "1.16.0"


@pytest.fixture(scope="module")
def patched_trl(tmp_path_factory):
    """trl.trainer.utils with the draft's patch, beside the installed one."""
    trl = pytest.importorskip("trl")
    if trl.__version__ != TRL:
        pytest.skip(f"the patch is for TRL {TRL}")
    out, source = tmp_path_factory.mktemp("trl"), Path(trl.__file__).parent
    diff = CONTRIB / "trl" / "lm-head-lora.diff"
    for name in re.findall(r"^\+\+\+ b/trl/(.*)$", diff.read_text(), re.M):
        (out / "trl" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / name, out / "trl" / name)
    subprocess.run(["git", "apply", "--whitespace=nowarn", diff], cwd=out, check=True)
    utils = load("trl.trainer.utils_with_lora", out / "trl" / "trainer" / "utils.py")
    kernel = load("trl.kernels.chunked_logprob_with_lora", out / "trl" / "kernels" / "chunked_logprob.py")
    utils._ChunkedLogProbFunction = kernel.ChunkedLogProbFunction
    for name in ("sft", "grpo"):
        compile((out / "trl" / "trainer" / f"{name}_trainer.py").read_text(), name, "exec")
    return utils


def head_lora(**config):
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=70)
    base = LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.2))
    config = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "lm_head"], "init_lora_weights": False} | config
    return get_peft_model(base, LoraConfig(**config))


def step(model, ids, labels, fused):
    """[log-probabilities, entropies, and every gradient of a sum of both]"""
    if fused:
        out = model(input_ids=ids, labels=labels, fused_lm_head=True)
        logp, entropy = out.log_probs[labels[:, 1:] != -100], out.entropy[labels[:, 1:] != -100]
    else:
        logits = model(input_ids=ids).logits[:, :-1][labels[:, 1:] != -100]
        every = (logits / 0.7).log_softmax(-1)
        logp = every.gather(-1, labels[:, 1:][labels[:, 1:] != -100][:, None])[:, 0]
        entropy = -(every.exp() * every).sum(-1)
    grads = torch.autograd.grad(logp.sum() + 0.3 * entropy.sum(), [p for p in model.parameters() if p.requires_grad])
    return [logp, entropy, *grads]


@pytest.mark.parametrize("adapters", ["one", "two", "disabled"])
def test_trls_patch_trains_a_lora_on_the_head_as_full_logits_do(patched_trl, monkeypatch, adapters):
    import copy

    from peft import LoraConfig

    monkeypatch.setattr(patched_trl, "_CHUNKED_LOGPROB_CHUNK_SIZE", 32)  # three tiles of the vocabulary
    model = head_lora()
    if adapters == "two":
        model.add_adapter("second", LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False))
        model.base_model.set_adapter(["default", "second"])
    ids = torch.arange(24).view(2, 12) * 7 % 70
    labels = ids.clone()
    labels[0, :4] = -100
    plain, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    patched_trl.add_fused_lm_head(model.get_base_model(), temperature=0.7, outputs=("log_probs", "entropy"))
    if adapters == "disabled":
        with model.disable_adapter():
            fused, full = (model(input_ids=ids, labels=labels, fused_lm_head=on) for on in (True, False))
        logp = (full.logits[:, :-1] / 0.7).log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        chosen = labels[:, 1:] != -100
        torch.testing.assert_close(fused.log_probs[chosen], logp[chosen])
        return
    names = ["log_probs", "entropy", *(name for name, p in model.named_parameters() if p.requires_grad)]
    assert sum("lm_head" in name for name in names) == (4 if adapters == "two" else 2)
    oracle, eager = step(exact, ids, labels, fused=False), step(plain, ids, labels, fused=False)
    for name, ours, theirs, truth in zip(names, step(model, ids, labels, fused=True), eager, oracle, strict=True):
        # in fp32 both: logits, to about 10, are rounded, and their error is a relative one of every probability
        assert max(error(ours, truth), error(theirs, truth)) <= 40 * 2**-24, name


def test_trls_patch_still_refuses_what_it_cannot_apply(patched_trl):
    for config, supported in (({}, True), ({"use_dora": True}, False), ({"lora_bias": True}, False)):
        head = head_lora(**config).get_output_embeddings()
        assert patched_trl.is_supported_lm_head(head) is supported
    assert patched_trl.is_supported_lm_head(nn.Linear(2, 2))
