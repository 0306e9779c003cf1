"""docs/accelerate/*.yaml: DDP launched on two CPU processes; the FSDP files as far as accelerate takes them without a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("accelerate")
from accelerate import Accelerator
from accelerate.commands import launch
from accelerate.utils import FullyShardedDataParallelPlugin
from test_peft import llama

from lowrank import bits
from lowrank.optim import AdamW

DOCS = Path(__file__).parents[2] / "docs" / "accelerate"
SCRIPT = """
import torch
from accelerate import Accelerator
from test_peft import IDS, peft_llama
import lowrank
from lowrank.integrations.peft import patch

torch.set_num_threads(1)
accelerator = Accelerator(mixed_precision="no")
model = patch(peft_llama())
optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
model, optimizer = accelerator.prepare(model, optimizer)
mine = IDS[accelerator.process_index :][:1]
accelerator.backward(model(input_ids=mine, labels=mine).loss)
grads = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

alone = peft_llama()
alone(input_ids=IDS, labels=IDS).loss.backward()
whole = torch.cat([p.grad.flatten() for p in alone.parameters() if p.grad is not None])
torch.testing.assert_close(grads, whole, rtol=1e-4, atol=1e-6)
found = lowrank.stats(accelerator.unwrap_model(model))
assert (found["fused"], found["fallback"]) == (14, {}), found
print(f"process {accelerator.process_index} of {accelerator.num_processes}: {type(model).__name__}\\n", flush=True, end="")
"""


def test_ddp(tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT)
    paths = [*map(str, Path(__file__).parents[:3]), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(DOCS / "ddp.yaml")]
    command += ["--main_process_port", "0", str(tmp_path / "train.py")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    said = sorted(line for line in done.stdout.splitlines() if line.startswith("process"))
    assert said == [f"process {rank} of 2: DistributedDataParallel" for rank in (0, 1)]


def test_prepare_changes_nothing(tmp_path):
    """Maps and masks survive ``prepare`` and a state that is saved and loaded; the wrapped optimizer steps as the bare one."""
    runs = []
    for prepared in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 4)).bfloat16()
        masks = {"0.weight": bits.pack(torch.arange(128) < 20)}
        optimizer = AdamW(model.named_parameters(), lr=0.1, masks=masks, track_changes=True, master_weights=True)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10)
        x = torch.randn(5, 8).bfloat16()
        inner, accelerator = optimizer, Accelerator(cpu=True)
        if prepared:
            model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
            assert not any(words.any() for words in inner.changes().values())
            assert optimizer.optimizer is inner
        for step in range(4):
            if prepared and step == 2:
                inner.zero_changes()
                accelerator.save_state(tmp_path)
                optimizer.load_state_dict(torch.load(tmp_path / "optimizer.bin", weights_only=True))
                assert not any(words.any() for words in inner.changes().values())
                accelerator.load_state(tmp_path)  # which writes all weights
                assert all(words.any() for words in inner.changes().values())
                inner.zero_changes()
            optimizer.zero_grad()
            accelerator.backward(model(x).square().sum())
            optimizer.step()
            scheduler.step()
        assert not bits.unpack(inner.changes()[inner.param_groups[0]["params"][0]], (128,))[20:].any()
        runs.append([p.detach().float() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("version", [1, 2])
def test_fsdp_shards_decoder_layers(version, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    file = DOCS / f"fsdp{version}.yaml"
    args = launch.launch_command_parser().parse_args(["--config_file", str(file), "train.py"])
    args, *_ = launch._validate_launch_command(args)
    assert args.use_fsdp
    assert args.num_processes == 2
    for name, value in launch.prepare_multi_gpu_env(args).items():
        monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == version
    model = llama()
    plugin.set_auto_wrap_policy(model)
    units = {
        type(m).__name__
        for m in model.modules()
        if plugin.auto_wrap_policy(module=m, recurse=False, nonwrapped_numel=0)
    }
    assert units == {"LlamaDecoderLayer"}
