"""The benchmark harness at toy sizes: peers, gate, runner, sweep, reports, and ``lowrank bench``.

The registry's entries are tested beside it, in bench/test_registry.py.
"""

import csv
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import gate
import llama_model
import peers
import pytest
import report
import run
import torch
import tune
from verdict import verdict

from lowrank import cli
from lowrank.cli import bench
from lowrank.cli.bench import summary
from lowrank.measure import timing
from lowrank.measure.environment import device_name
from lowrank.measure.layer import Problem, frozen, lowrank_method, passes, tensors
from lowrank.testing import error

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
CONFIG = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
}


def test_a_whole_model(tmp_path, capsys):
    """PEFT and PEFT patched train alike, over both bases, with and without checkpointing; Liger is absent on a CPU."""
    pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    assert llama_model.main(["--toy", "--device", "cpu", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "llama_model.json").read_text())
    rows = {(row["base"], row["checkpointed"], row["method"]): row for row in found["rows"]}
    for base in ("bf16", "4bit"):
        losses = [rows[base, on, method]["loss"] for on in (False, True) for method in ("peft", "lowrank")]
        assert losses == pytest.approx([losses[0]] * 4, rel=5e-3)
        plain = {method: rows[base, False, method]["peak_bytes"] for method in ("frozen", "lowrank", "peft")}
        assert 0 < plain["frozen"] < plain["lowrank"] < plain["peft"]
    assert all(0 < row["us_20"] <= row["us"] <= row["us_80"] for row in found["rows"])
    assert all("liger" in name for name in found["absent"])
    assert "NOT COMPARABLE" not in capsys.readouterr().out
    worse = [row | {"loss": 9.0} if row["method"] == "lowrank" else row for row in found["rows"]]
    assert llama_model.verdict(worse).count("NOT COMPARABLE") == 4
    with pytest.raises(SystemExit):
        llama_model.main(["--methods", "unsloth"])


def test_what_is_kept_for_backward_is_told_apart(monkeypatch, tmp_path):
    """Seven linears over four inputs: of whose tensors PEFT keeps one each, lowrank one per input; bytes from the shapes."""
    pytest.importorskip("peft")
    import saved_for_backward

    T, H, F, R = 48, 64, 128, 4
    groups = {"attention": (H, (H, 16, 16)), "o": (H, (H,)), "mlp": (H, (F, F)), "down": (F, (H,))}
    for name, value in dict(T=T, R=R, GROUPS=groups).items():
        monkeypatch.setattr(saved_for_backward, name, value)
    saved_for_backward.main(["--json", str(tmp_path / "kept.json")])
    rows = json.loads((tmp_path / "kept.json").read_text())["rows"]
    of = {(row["method"], row["dropout"]): row["tensors"] for row in rows}
    widths, columns = [H] * 6 + [F], [H, 16, 16, H, F, F, H]
    S, cast = [T * R * 2] * 7, sorted(2 * R * K for K in widths + columns)
    copies, inputs = [2 * T * K for K in widths], [2 * T * K for K in (H, H, H, F)]
    for p, copy in ((0.0, "x, cast"), (0.05, "x, dropped and cast")):
        peft = of["PEFT", p]
        assert (peft[copy], peft["S"], sorted(peft["A and B, cast"])) == (copies, S, cast)
    assert of["PEFT", 0.05]["dropout's mask"] == [4 * T * K for K in widths]
    assert of["PEFT, patched", 0.0] == {"x": inputs, "S": S}
    assert of["PEFT, patched", 0.05] == {"x": inputs, "S": S, "dropout's mask": [T * K // 8 for K in widths]}
    row = rows[1]
    assert row["over_inputs"] == row["bytes"] / sum(inputs)


def test_runner_and_reports(tmp_path, capsys):
    pytest.importorskip("peft")
    pytest.importorskip("matplotlib")
    names = ["addmm", "shrink", "lora_linear"]
    assert run.main([*names, "--toy", "--no-gate", "--out", str(tmp_path), "--dtype", "float32"]) == 0
    printed = capsys.readouterr().out
    assert all(f"VERDICT {name}: " in printed for name in names)
    results = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in names}
    for name, result in results.items():
        assert result["environment"]["gate"] == "left out"
        assert result["verdict"].endswith("[cpu: says nothing about a GPU]")
        assert all(0 < row["us_20"] <= row["us"] <= row["us_80"] for row in result["rows"])
        baseline = [row["over_baseline"] for row in result["rows"] if row["provider"] == result["baseline"]]
        assert set(baseline) == {1.0}, name
    assert {row["mode"] for row in results["lora_linear"]["rows"]} == {"forward", "backward", "both"}
    assert {row["dropout"] for row in results["lora_linear"]["rows"]} == {0.0, 0.1}
    assert "unsloth" in results["lora_linear"]["absent"]
    assert "lorafusion" in results["lora_linear"]["absent"]

    assert report.main([str(tmp_path)]) == 0
    with (tmp_path / "report.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == report.LIGER + report.OURS
    assert len(rows) == 2 * sum(len(result["rows"]) for result in results.values())  # a time and a peak each
    first = results["addmm"]["rows"][0]
    assert float(rows[0]["y_value_50"]) == first["us"] / 1e3
    assert json.loads(rows[0]["extra_benchmark_config_str"])["K"] == first["K"]
    text = (tmp_path / "report.md").read_text()
    assert all(result["verdict"] in text for result in results.values())
    assert (tmp_path / "report.png").read_bytes()[:4] == b"\x89PNG"
    assert report.main([str(tmp_path / "report.png")]) == 2


def test_runner_refuses(tmp_path):
    for wrong in (
        ["nothing"],
        ["shrink", "--shapes", "8x8"],
        ["shrink", "--ranks", "0"],
        ["shrink", "--dropouts", "x"],
    ):
        with pytest.raises(SystemExit) as stopped:
            run.main([*wrong, "--no-gate"])
        assert stopped.value.code == 2


def test_no_speed_on_red(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gate, "red", lambda tests: {"tests/kernels/test_shrink.py"})
    assert run.main(["shrink", "--toy", "--out", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert "no speed is shown" in printed
    assert " us " not in printed
    assert not list(tmp_path.iterdir())


def test_gate_tells_red_files_from_green_ones(tmp_path):
    red, green = tmp_path / "test_red.py", tmp_path / "test_green.py"
    red.write_text("def test_red():\n    assert 1 == 2\n")
    green.write_text("def test_green():\n    assert 1 == 1\n")
    assert gate.red((str(green), str(red))) == {str(red)}
    assert gate.red((str(green),)) == set()
    assert gate.red((str(green), str(tmp_path / "test_missing.py"))) == {str(green), str(tmp_path / "test_missing.py")}
    assert gate.red((str(green),), seconds=0.01) == {str(green)}  # not finished is not green


def test_gate_by_an_earlier_run(tmp_path):
    path = tmp_path / "gate.json"
    assert not gate.recorded(path, ("a.py",))
    path.write_text(json.dumps({"green": ["a.py"], "red": ["b.py"], "sources": gate.sources()}))
    assert gate.recorded(path, ("a.py",))
    assert not gate.recorded(path, ("a.py", "b.py"))
    path.write_text(json.dumps({"green": ["a.py"], "red": [], "sources": "of another day"}))
    assert not gate.recorded(path, ("a.py",))


def row(provider, us, name="lora_linear", mode="both", M=8, device="cuda"):
    problem = dict(M=M, K=4, N=4, r=2, dropout=0.0, dtype="bfloat16", thin_dtype="bfloat16", device=device)
    return {"name": name, "mode": mode, "provider": provider, "us": us, **problem}


def test_verdicts():
    assert ": accepted; worst 1.020" in verdict("addmm", [row("mm", 100), row("addmm_", 102)])
    assert ": NOT accepted; worst 1.030" in verdict("addmm", [row("mm", 100), row("addmm_", 103)])
    assert "triton 90% of a copy's bytes/s, target 85% reached" in verdict(
        "shrink", [row("triton", 100), row("copy", 90)]
    )
    assert "target 85% missed" in verdict("shrink", [row("triton", 100), row("copy", 80)])
    said = verdict(
        "lora_linear", [row("frozen", 100), row("lowrank-16bit", 110), row("peft-16bit", 120), row("unsloth", 105)]
    )
    assert "both 1.10× (fastest peer 1.05×); slower than the fastest peer in 1 of 1 cases" in said
    sizes = {1: (9, 5), 8: (5, 5), 32: (7, 5), 128: (4, 5), 512: (3, 5)}
    rows = [r for M, (a, b) in sizes.items() for r in (row("lowrank-triton", a, M=M), row("lowrank-eager", b, M=M))]
    assert "triton from M = 128" in verdict("small", rows)
    head = [row("gemms", 100), row("lowrank", 114), row("plain", 180), row("trl", 150), row("torch-ce", 90)]
    assert "1.14× of its GEMMs, limit 1.15 reached, fastest peer trl 1.50×" in verdict("linear_logprob", head)
    assert "limit 1.15 missed" in verdict("linear_logprob", [row("gemms", 100), row("lowrank", 116)])
    assert verdict("addmm", [row("mm", 1, device="cpu")]).endswith("says nothing about a GPU]")


def test_verdict_of_the_svf_forms():
    """The cost rule for N = K = k = 4, forward and backward: "activation" up to M = 8, then "merged"."""
    names = ("frozen", "reference", "lowrank-delta", "lowrank-delta-full", "lowrank-activation", "lowrank-merged-layer")

    def said(M, *times, mode="both"):
        rows = [{**row(name, us, mode=mode, M=M), "peak": 10 * us} for name, us in zip(names, times, strict=True)]
        return verdict("svf_linear", rows)

    text = said(8, 100, 400, 110, 300, 200, 250)
    assert "lowrank-delta 1.10× of frozen's time, 1.10× of its peak memory" in text
    assert "lowrank-activation 0.50× of reference's time" in text
    assert "both 8x4x4: the cost rule says activation, the fastest" in text
    assert "both 9x4x4: the cost rule says merged-layer, 1.25× of activation" in said(9, 100, 400, 110, 300, 200, 250)
    assert verdict("svf_linear", [row("frozen", 1)]) == "nothing to compare"
    assert "cost rule" not in said(8, 100, 400, 110, 300, 200, 250, mode="backward")


def test_dropouts_are_those_asked_for():
    shapes, settings = [(4, 4, 4)], dict(dtype="float32", thin_dtype="float32")
    todo = {name: run.problems(benchmark, shapes, [2], [0.05], **settings) for name, benchmark in run.REGISTRY.items()}
    of = {name: [p.dropout for p in found] for name, found in todo.items()}
    assert of["lora_linear"] == of["shrink"] == [0.05]
    assert of["expand"] == [0.0]  # has no dropout
    default = run.problems(run.REGISTRY["lora_linear"], shapes, [2], [], **settings)
    assert [p.dropout for p in default] == [0.0, 0.1]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_peers_that_are_not_installed_are_absent_and_those_that_are_get_the_same_tensors(monkeypatch, dropout):
    """Stand-ins in PyTorch with the signatures of Unsloth's and LoRAFusion's functions."""
    p = Problem(6, 8, 10, 4, "float32", "float32", dropout=dropout, sets=2)
    data = tensors(p)
    assert set(peers.methods(p, data, ("unsloth", "lorafusion"))[1]) == {"unsloth", "lorafusion"}
    with pytest.raises(ValueError, match="peer 'axolotl'"):
        peers.methods(p, data, ("axolotl",))

    class LoRA_W(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, W, W_quant, A, B, s):
            assert x.dim() == 3
            assert W_quant is None
            ctx.save_for_backward(x, W, A, B)
            ctx.s = s
            return x @ W.T + s * (x @ A.T) @ B.T

        @staticmethod
        def backward(ctx, dY):
            x, W, A, B = (t.flatten(0, 1) if t.dim() == 3 else t for t in ctx.saved_tensors)
            dY = dY.flatten(0, 1)
            dS = ctx.s * dY @ B
            return (dY @ W + dS @ A)[None], None, None, dS.T @ x, ctx.s * dY.T @ (x @ A.T), None

    keep = torch.rand(p.M, p.K) >= dropout
    kernels = "lorafusion.ops.triton_ops."
    modules = {
        "unsloth.kernels.fast_lora": {"LoRA_W": LoRA_W},
        kernels + "dropout": {"seeded_dropout": lambda x, p, seed, store_mask: (x * keep / (1 - p), keep)},
        kernels + "fused_lora_xw_sb": {
            "fused_lora_xw_sb": lambda x, w, s, b, alpha, bias, config: x @ w.T + alpha * s @ b.T
        },
        kernels + "fused_lora_dys_dyb": {
            "fused_lora_dys_dyb": lambda dy, b, s, alpha: (alpha * dy.T @ s, alpha * dy @ b)
        },
        kernels + "fused_lora_dyw_dsa": {
            "fused_lora_dyw_dsa": lambda dy, w, ds, a, dropout_p, dropout_mask: (
                dy @ w + (ds @ a) * dropout_mask / (1 - dropout_p)
            )
        },
        kernels + "config": {"H100_CONFIG": types.SimpleNamespace(fused_lora_xw_sb="theirs")},
    }
    for name, contents in modules.items():
        for parent in (".".join(name.split(".")[:n]) for n in range(1, name.count(".") + 1)):
            monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(**contents))
    found, absent = peers.methods(p, data, ("unsloth", "lorafusion"))
    name = "lorafusion" if dropout else "unsloth"
    assert set(found) == {name}
    assert len(absent) == 1
    y, *grads = passes(found[name], [one.dY for one in data])["both"](1)
    one = data[1]
    x, A, B = (t.detach().double().requires_grad_() for t in (one.x, one.A, one.B))
    dropped = x * keep / (1 - dropout) if dropout else x
    oracle = x @ one.W.double().T + 2 * (dropped @ A.T) @ B.T
    expected = torch.autograd.grad(oracle, (x, A, B), one.dY.double())
    for ours, truth in zip((y, *grads), (oracle, *expected), strict=True):
        assert error(ours, truth) < 1e-5


def test_backward_alone_is_backward():
    p = Problem(6, 8, 10, 4, "float32", "float32", sets=2)
    data = tensors(p)
    calls = passes(lowrank_method(p, data, "fp32"), [one.dY for one in data])
    for i in (1, 3):  # twice over the same kept graph
        for alone, together in zip(calls["backward"](i), calls["both"](i)[1:], strict=True):
            assert torch.equal(alone, together)
    assert torch.equal(passes(frozen(p, data), [one.dY for one in data])["backward"](0)[0], data[0].dY @ data[0].W)


def test_timing_on_a_cpu():
    calls = []
    times = timing.paired({"a": calls.append, "b": lambda i: None}, CPU, rounds=5, warm=2, sets=3, graphs=True)
    assert calls == [0, 1, 0, 1, 2, 3, 4]
    assert times["a"].how == "wall clock"
    assert times["a"].q20 <= times["a"].median <= times["a"].q80
    assert timing.peak_memory(calls.append, CPU) is None
    assert 1e6 < timing.copy_rate(CPU, 1 << 16) < 1e15
    assert 1e3 < timing.matmul_rate(CPU, torch.float32, 32) < 1e15
    assert device_name(CPU)


def test_sweep_checks_before_it_times(tmp_path):
    """In the interpreter, which has to be asked for before triton is imported."""
    code = (
        "import sys; sys.path[:0] = ['bench']; import tune, torch\n"
        f"out = {str(tmp_path / 'tune.json')!r}\n"
        "assert tune.main(['shrink', '--toy', '--rounds', '1', '--out', out]) == 0\n"
        "from lowrank.kernels import shrink; right = shrink.execute\n"
        "def wrong(p, x, As, S, *rest): right(p, x, As, S, *rest); S.mul_(1.05)\n"
        "shrink.execute = wrong\n"
        "assert tune.main(['shrink', '--toy', '--rounds', '1']) == 1\n"
    )
    env = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "refused" in done.stdout
    rows = json.loads((tmp_path / "tune.json").read_text())["rows"]
    assert sum(row["config"] is None for row in rows) == 1
    assert all(row["us"] > 0 for row in rows)


def test_sweep_needs_kernels(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(SystemExit) as stopped:
        tune.main(["shrink", "--device", "cpu"])
    assert stopped.value.code == 2


@pytest.fixture
def model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return str(tmp_path)


@pytest.fixture
def uncompiled(monkeypatch):
    """torch.compile takes minutes of CI; a compiler that fails is a case of its own."""

    def fail(*args, **options):
        def call(*args):
            raise RuntimeError("no compiler here")

        return call

    monkeypatch.setattr(torch, "compile", fail)


def test_lowrank_bench(model, uncompiled, tmp_path, capsys):
    pytest.importorskip("peft")
    out = tmp_path / "result" / "bench.json"
    options = [
        "--model",
        model,
        "--tokens",
        "16",
        "--rank",
        "4",
        "--seconds",
        "4",
        "--device",
        "cpu",
        "--out",
        str(out),
    ]
    assert cli.main(["bench", *options]) == 0
    printed = capsys.readouterr().out
    result = json.loads(out.read_text())
    shapes = {(s["K"], s["N"]): (s["layers"], s["count"]) for s in result["shapes"]}
    assert shapes == {
        (32, 32): (["q_proj", "o_proj"], 4),
        (32, 16): (["k_proj", "v_proj"], 4),
        (32, 48): (["gate_proj", "up_proj"], 4),
        (48, 32): (["down_proj"], 2),
    }
    kinds = ("16bit", "fp32", "fp32-autocast")
    for shape in result["shapes"]:
        assert set(shape["us"]) == {"frozen", *(f"{who} {kind}" for who in ("lowrank", "peft") for kind in kinds)}
        assert shape["rounds"] >= 3
        assert all(t["median"] > 0 for t in shape["us"].values())
    assert "RuntimeError: no compiler here" in result["absent"]["peft 16bit, compiled"]
    assert printed.strip().splitlines()[-1] == result["summary"]
    assert result["summary"].startswith("All 14 linears")


def test_lowrank_bench_without_peft(model, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "peft", None)
    assert (
        cli.main(
            ["bench", "--model", model, "--tokens", "8", "--seconds", "1", "--device", "cpu", "--dtype", "float32"]
        )
        == 0
    )
    assert "not installed" in capsys.readouterr().out.splitlines()[-1]


def test_lowrank_bench_refuses(model, capsys):
    for wrong, why in (
        (["--rank", "0"], "--rank must be a positive integer, got 0"),
        (["--tokens", "-1"], "--tokens must be a positive integer, got -1"),
        (["--dropout", "1"], "dropout must be in [0, 1)"),
        (["--seconds", "0"], "--seconds must be positive"),
        (["--device", "meta"], "--device meta"),
        (["--model", model + "/nothing"], "no config for"),
    ):
        assert cli.main(["bench", "--device", "cpu", "--model", model, *wrong]) == 2
        assert why in capsys.readouterr().err


def test_summary_says_where_lowrank_is_slower():
    def shape(name, frozen, peft, ours):
        us = {"frozen": frozen, "peft 16bit": peft, "lowrank 16bit": ours}
        us = {who: {"median": t, "q20": 0.99 * t, "q80": 1.01 * t} for who, t in us.items()}
        return {"layers": [name], "count": 2, "us": us}

    shapes = [shape("q", 100, 120, 130), shape("k", 100, 120, 110), shape("v", 100, 120, 120.5)]
    said = summary({"shapes": shapes, "absent": {}})
    assert said == (
        "All 6 linears, forward + backward, over the frozen ones' time: lowrank 1.20×, PEFT at its fastest 1.20×; "
        "against PEFT, lowrank is slower on q (1.08×); level within the spread on v (1.00×); faster on k (0.92×)."
    )


@pytest.mark.parametrize(
    ("name", "shape", "layers"),
    [
        ("Gemma2", {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48}, 14),
        ("GptOss", {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 4}, 8),
        ("Mamba", {"state_size": 4}, 8),
    ],
)
def test_layers_of_models_without_fused_attention(name, shape, layers):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{name}Config")(vocab_size=128, hidden_size=32, num_hidden_layers=2, **shape)
    assert sum(count for *_, count in bench.layer_shapes(config, "float32")) == layers


def test_lowrank_bench_writes_before_it_prints(model, tmp_path, monkeypatch, capsys):
    out = tmp_path / "result" / "bench.json"
    options = ["bench", "--model", model, "--tokens", "8", "--seconds", "1", "--device", "cpu", "--dtype", "float32"]
    monkeypatch.setitem(sys.modules, "peft", None)

    def closed(result):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(bench, "_print", closed)
    assert cli.main([*options, "--out", str(out)]) == 1
    assert json.loads(out.read_text())["shapes"]
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(bench, "layer_shapes", None)
    assert cli.main([*options, "--out", str(out / "deeper.json")]) == 2
    assert "is not writable" in capsys.readouterr().err
