import hashlib
import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from lowrank._linears import dense_weight, target_layers, weight_checksum
from lowrank.adapters import factor_files
from lowrank.adapters.factor_files import load_factors, save_factors
from lowrank.svd import SVDFactors, svd_factors


def model(dtype=torch.float32):
    torch.manual_seed(0)
    block = nn.ModuleDict({"up": nn.Linear(24, 40), "act": nn.GELU(), "down": nn.Linear(40, 24, bias=False)})
    layers = nn.ModuleList([block, nn.ModuleDict({"up": nn.Linear(24, 16)})])
    return nn.ModuleDict({"embed": nn.Embedding(9, 24), "layers": layers, "head": nn.Linear(24, 9)}).to(dtype)


NAMES = ["layers.0.up", "layers.0.down", "layers.1.up", "head"]


@pytest.fixture
def computed(monkeypatch):
    """How many layers were decomposed in this process."""
    calls = []
    monkeypatch.setattr(factor_files, "svd_factors", lambda W, *a, **k: calls.append(W) or svd_factors(W, *a, **k))
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_there_and_back(tmp_path, dtype):
    m = model(dtype)
    path = save_factors(m, tmp_path / "new" / "m.safetensors", k=20, progress=False)
    assert [file.name for file in path.parent.iterdir()] == ["m.safetensors"]
    file = load_factors(path, m)
    assert list(file) == NAMES
    assert len(file) == 4
    for name in NAMES:
        expected = svd_factors(m.get_submodule(name).weight, min(20, *m.get_submodule(name).weight.shape))
        assert isinstance(file[name], SVDFactors)
        assert all(map(torch.equal, file[name], expected))
    assert "layers.0" not in file
    with pytest.raises(KeyError, match=r"layers\.0"):
        file["layers.0"]


def test_the_header_says_what_it_is(tmp_path):
    from lowrank import __version__

    m = model(torch.bfloat16)
    path = save_factors(m, tmp_path / "f", k=3, dtype=torch.float64, method="svd", progress=False)
    with safe_open(path, "pt") as file:
        said = json.loads(file.metadata()["lowrank"])
        assert sorted(file.keys()) == sorted(f"{name}.{part}" for name in NAMES for part in ("U", "S", "Vh"))
        assert file.get_tensor("head.U").dtype is torch.float64
    assert said["format"] == "lowrank factors 1"
    assert said["lowrank"] == __version__
    assert said["order"] == "descending"
    assert "positive" in said["sign"]
    layer = said["layers"]["head"]
    assert (layer["k"], layer["shape"], layer["dtype"], layer["method"]) == (3, [9, 24], "bfloat16", "svd")
    assert layer["weight"] == weight_checksum(m["head"].weight)
    assert len(layer["errors"]) == 3


def test_a_changed_weight_is_refused_by_name(tmp_path):
    m = model()
    path = save_factors(m, tmp_path / "f", k=2, progress=False)
    load_factors(path, m)
    m.layers[1]["up"].weight.data[3, 4] += 1e-6
    with pytest.raises(ValueError, match=r"factors of another weight: layers\.1\.up was \[16, 24\] of float32"):
        load_factors(path, m)
    load_factors(path)


def test_another_model_and_another_dtype_are_refused(tmp_path):
    path = save_factors(model(torch.bfloat16), tmp_path / "f", k=2, progress=False)
    with pytest.raises(ValueError, match=r"another model: it has layers\.0\.up, which Linear lacks"):
        load_factors(path, nn.Linear(3, 3))
    other = model(torch.bfloat16)
    other.layers[0]["up"] = nn.Linear(24, 41, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"layers\.0\.up was \[40, 24\].*the model's is \[41, 24\]"):
        load_factors(path, other)
    with pytest.raises(ValueError, match=r"the model's layers\.0\.up is float32: load the model with dtype=torch\.bfl"):
        load_factors(path, model())


def test_what_is_no_such_file_is_refused(tmp_path):
    from safetensors.torch import save_file

    whole = save_factors(model(), tmp_path / "f", k=2, progress=False)
    for size in (0, 5, 100, whole.stat().st_size - 1):
        (tmp_path / "cut").write_bytes(whole.read_bytes()[:size])
        with pytest.raises(ValueError, match=rf"cut: not a whole safetensors file \({size} bytes\)"):
            load_factors(tmp_path / "cut")
    save_file({"a": torch.ones(2)}, tmp_path / "other")
    with pytest.raises(ValueError, match="other: expected a file of 'lowrank factors 1', got None"):
        load_factors(tmp_path / "other")
    with pytest.raises(FileNotFoundError, match=r"missing: no such file"):
        load_factors(tmp_path / "missing")


KILLED = """
import os, signal, sys, torch
sys.path[:0] = {path!r}
from test_factor_files import model
from lowrank import checkpoints
from lowrank.adapters import factor_files
real, calls = getattr(factor_files, {where!r}), []

def until_killed(*args, **kwargs):
    calls.append(args)
    if len(calls) == {call}:
        if {where!r} == "publish":
            with open(args[0], "rb+") as file:
                file.truncate(file.seek(0, 2) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **kwargs)

for module in (factor_files, checkpoints):
    setattr(module, {where!r}, until_killed)
factor_files.save_factors(model(), {out!r}, k=5, progress=False)
"""


def kill(out, where, call):
    code = KILLED.format(path=[str(Path(__file__).parent)], where=where, call=call, out=str(out))
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9


@pytest.mark.parametrize(
    ("where", "call", "left"),
    [("svd_factors", 3, 2), ("publish", 2, 3), ("publish", 5, 0), ("_assemble", 1, 0)],
    ids=["while computing", "while writing a layer", "while writing the file", "before the file"],
)
def test_killed_and_resumed(tmp_path, computed, where, call, left):
    out = tmp_path / "m.safetensors"
    kill(out, where, call)
    assert [file.name for file in tmp_path.iterdir()] == [".m.safetensors.partial"]
    save_factors(model(), out, k=5, progress=False)
    assert len(computed) == left
    assert [file.name for file in tmp_path.iterdir()] == ["m.safetensors"]
    clean = save_factors(model(), tmp_path / "clean", k=5, progress=False)
    assert out.read_bytes() == clean.read_bytes()


def test_what_was_finished_for_something_else_is_not_used(tmp_path, computed):
    kill(tmp_path / "m", "_assemble", 1)
    changed = model()
    changed["head"].weight.data[0] *= 2
    double, svd = {"k": 5, "dtype": torch.float64}, {"k": 5, "method": "svd"}
    for i, (arguments, count) in enumerate((({"k": 4}, 4), (svd, 4), (double, 4), ({"k": 5}, 1))):
        shutil.copytree(tmp_path / ".m.partial", tmp_path / f".{i}.partial")
        computed.clear()
        load_factors(save_factors(changed, tmp_path / f"{i}", progress=False, **arguments), changed)
        assert len(computed) == count


def test_an_older_file_stays_until_the_new_one_is_whole(tmp_path):
    out = save_factors(model(), tmp_path / "m.safetensors", k=2, progress=False)
    before = out.read_bytes()
    mapped = load_factors(out)
    kill(out, "publish", 5)
    assert out.read_bytes() == before
    save_factors(model(), out, k=5, progress=False)
    assert load_factors(out)["head"].S.shape == (5,)
    assert mapped["head"].S.shape == (2,)  # an open file keeps what it had


def test_layers_that_are_not_finite_are_named(tmp_path):
    m = model()
    m.layers[0]["down"].weight.data[1, 1] = torch.nan
    with pytest.raises(ValueError, match=r"layers\.0\.down: weight: expected finite values"):
        save_factors(m, tmp_path / "f", progress=False)


MEMORY = """
import sys, threading, time
import torch
from torch import nn
from lowrank.adapters import factor_files

def anonymous():  # MiB that are not pages of a mapped file
    with open("/proc/self/status") as status:
        return int(dict(line.split(":", 1) for line in status)["RssAnon"].split()[0]) >> 10

def watch():
    while True:
        memory.append(anonymous())
        time.sleep(0.002)

def ones(W, k, **_):
    return factor_files.SVDFactors(torch.ones(len(W), k), torch.ones(k), torch.ones(k, W.shape[1]))

model = nn.Sequential(*(nn.Linear(4096, 1024, bias=False, dtype=torch.float16) for _ in range(20)))
factor_files.svd_factors, factor_files.SVDFactors.errors = ones, lambda *_: (0.0, 0.0, 0.0)
factor_files.save_factors(model[:2], sys.argv[1], k=512, progress=False)  # what libraries keep for themselves
memory = [anonymous()]
threading.Thread(target=watch, daemon=True).start()
factor_files.save_factors(model, sys.argv[1], k=512, progress=False)
print(max(memory) - memory[0])
memory[:] = [anonymous()]
held = dict(factor_files.load_factors(sys.argv[1], model))
assert sum(t.sum() for layer in held.values() for t in layer) == 20 * 512 * (1024 + 1 + 4096)
print(max(memory) - memory[0])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_reading_and_writing_take_a_layer_of_memory(tmp_path):
    out = tmp_path / "f"
    result = subprocess.run([sys.executable, "-c", MEMORY, out], capture_output=True, text=True, check=True)
    assert out.stat().st_size > 200 << 20
    writing, reading = map(int, result.stdout.split())
    assert writing < 60  # MiB; one layer's factors are 10
    assert reading < 30


class Headed(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.lm_head = nn.ModuleDict({"proj": nn.Linear(8, 8), "my_proj": nn.Linear(8, 8)}), nn.Linear(8, 20)

    def get_output_embeddings(self):
        return self.lm_head


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        ("all-linear", ["body.proj", "body.my_proj"]),
        ("All-Linear", ["body.proj", "body.my_proj"]),
        (["proj"], ["body.proj"]),
        (("lm_head", "body.proj"), ["body.proj", "lm_head"]),
        ([".*"], None),
        (r"body\..*", ["body.proj", "body.my_proj"]),
        (r"lm_head|.*my_proj", ["body.my_proj", "lm_head"]),
        ("proj", None),
        ([], None),
    ],
)
def test_targets_as_peft_matches_them(targets, names):
    if names is None:
        with pytest.raises(ValueError, match="target_modules: "):
            target_layers(Headed(), targets)
        return
    layers = target_layers(Headed(), targets)
    assert list(layers) == names
    assert all(type(layer) is nn.Linear for layer in layers.values())
    if targets not in ("all-linear", "All-Linear"):  # these PEFT takes from transformers' models only
        peft = pytest.importorskip("peft")
        by_peft = peft.get_peft_model(Headed(), peft.LoraConfig(target_modules=targets))
        assert set(by_peft.base_model.targeted_module_names) == set(names)


def test_bad_targets_are_named():
    with pytest.raises(ValueError, match="no module of Headed is called 'q_proj'"):
        target_layers(Headed(), ["proj", "q_proj"])
    with pytest.raises(ValueError, match=r"expected linear layers.*matches the ModuleDict body"):
        target_layers(Headed(), ["body"])
    with pytest.raises(ValueError, match=r"'\(' is not a regular expression"):
        target_layers(Headed(), "(")
    with pytest.raises(TypeError, match="target_modules: expected names, got 3"):
        target_layers(Headed(), [3])
    with pytest.raises(ValueError, match="model: GELU has no linear layers"):
        target_layers(nn.GELU())
    with pytest.raises(TypeError, match=r"model: expected an nn\.Module, got dict"):
        target_layers({})


def test_layers_inside_adapters_are_left_alone():
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(Headed(), peft.LoraConfig(target_modules=["proj"]))
    assert list(target_layers(adapted.base_model.model)) == ["body.my_proj"]


def test_conv1d(tmp_path):
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    m = nn.Sequential(Conv1D(6, 4))
    assert dense_weight(m[0]).shape == (6, 4)
    path = save_factors(m, tmp_path / "f", progress=False)
    U, S, Vh = load_factors(path, m)["0"]
    torch.testing.assert_close((U * S) @ Vh, m[0].weight.data.mT)


@pytest.mark.parametrize("kind", ["Linear4bit", "Linear8bitLt"])
def test_quantised_bases(tmp_path, kind):
    bnb = pytest.importorskip("bitsandbytes")
    pytest.importorskip("peft")
    torch.manual_seed(0)
    plain = nn.Linear(128, 64, bias=False)
    if kind == "Linear4bit":
        quantised = bnb.nn.Linear4bit(128, 64, bias=False, quant_type="nf4")
    else:
        quantised = bnb.nn.Linear8bitLt(128, 64, bias=False, has_fp16_weights=False)
    quantised.load_state_dict(plain.state_dict())
    m = nn.Sequential(quantised.to("cpu"))
    weight = dense_weight(m[0])
    assert weight.shape == (64, 128)
    assert 0 < (weight - plain.weight).norm() / plain.weight.norm() < 0.2
    path = save_factors(m, tmp_path / "f", k=8, progress=False)
    factors = load_factors(path, m)["0"]
    assert all(map(torch.equal, factors, svd_factors(weight, 8)))


def test_dense_weight_refuses():
    with pytest.raises(ValueError, match="GELU: has no weight tensor"):
        dense_weight(nn.GELU())
    with pytest.raises(ValueError, match=r"Conv2d: expected a float weight of two dimensions.*\[4, 3, 2, 2\]"):
        dense_weight(nn.Conv2d(3, 4, 2))


def test_weight_checksum():
    weight = torch.randn(6, 8)
    bits = struct.pack("<2H", 0x3F80, 0xC000)
    expected = hashlib.sha256(b"torch.bfloat16 [1, 2] " + bits).hexdigest()
    assert weight_checksum(torch.tensor([[1.0, -2.0]], dtype=torch.bfloat16)) == expected
    same = [weight.clone(), weight.mT.contiguous().mT, nn.Parameter(weight), torch.cat([weight, weight])[:6]]
    assert {weight_checksum(t) for t in same} == {weight_checksum(weight)}
    other = [weight.view(8, 6), weight.view(torch.int32), weight.to(torch.bfloat16), weight.double(), weight + 1e-6]
    assert len({weight_checksum(t) for t in [weight, *other]}) == 6
    with pytest.raises(ValueError, match="meta device"):
        weight_checksum(torch.empty(2, 2, device="meta"))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k": 0}, ValueError, "k: expected an integer from 1"),
        ({"k": 25}, ValueError, r"min\(N, K\) = 24, or None, got 25"),
        ({"method": "qr"}, ValueError, "method: expected one of"),
        ({"dtype": torch.float16}, TypeError, "dtype: expected"),
        ({"target_modules": ["nope"]}, ValueError, "is called 'nope'"),
        ({"model": 3}, TypeError, "model: expected an nn.Module, got int"),
        ({"path": "."}, IsADirectoryError, "expected a file name"),
    ],
)
def test_bad_input_leaves_nothing_behind(tmp_path, monkeypatch, change, error, message):
    monkeypatch.chdir(tmp_path)
    arguments = {"model": model(), "path": "f", "progress": False} | change
    with pytest.raises(error, match=message):
        save_factors(arguments.pop("model"), arguments.pop("path"), **arguments)
    assert list(tmp_path.iterdir()) == []


def test_the_report(tmp_path, capsys):
    save_factors(model(), tmp_path / "f", k=3)
    out, err = capsys.readouterr()
    assert out == ""
    err = " ".join(err.split())  # rich wraps long paths
    assert "4 layers; worst orthogonality" in err
    assert "reconstruction" in err
