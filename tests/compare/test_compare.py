"""One toy comparison from the command's main to the files, and every bad input before it starts."""

import io
import json
import re
import sys

import pytest

from lowrank.cli import compare
from lowrank.compare.settings import METHODS, Embedded

pytest.importorskip("peft")
pytest.importorskip("matplotlib")

TINY = Embedded(hidden_size=32, intermediate_size=64, layers=2, heads=2, pretrain_steps=4, batch=4, length=32)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A new domain and an old one, just long enough."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "new.txt").write_text("def f(x):\n    return x + 1\n" * 200)
    (folder / "old.txt").write_text("It was a dark and stormy night; the rain fell in torrents.\n" * 100)
    return folder


@pytest.fixture(scope="module")
def reported(parse, texts, tmp_path_factory):
    out = tmp_path_factory.mktemp("reports") / "deep" / "er"
    files = ("--data", texts / "new.txt", "--general-data", texts / "old.txt", "--out", out)
    options = ("--methods", "all", "--dtype", "float32", "--device", "cpu", "--steps", 8, "--rank", 2, "--seeds", 2)
    for rates in ("full=0.001,0.003", *(f"{name}=0.01" for name in METHODS if name not in ("full", "svf"))):
        options += ("--rates", rates)
    assert compare.main(parse(*files, *options), TINY) == 0
    return out


@pytest.fixture(scope="module")
def result(reported):
    return json.loads((reported / "compare.json").read_text())


def test_writes_three_files_and_the_runs(reported):
    assert sorted(p.name for p in reported.iterdir()) == ["compare.json", "compare.md", "compare.png", "runs"]
    assert (reported / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert len(list((reported / "runs").glob("text-*.json"))) >= 2 * len(METHODS)


def test_the_figure_names_every_method_once_and_its_memory(result, tmp_path):
    from lowrank.compare.figure import draw

    draw(result, tmp_path / "compare.svg")
    written = re.findall(r"<text[^>]*>([^<]*)<", (tmp_path / "compare.svg").read_text())
    for name, method in result["methods"].items():
        assert written.count(name) == 2  # in the legend, at the bars
        assert any(text == f"{method['memory']['total'] / 1e6:.1f}" for text in written)


def test_json_holds_every_measurement(result):
    assert tuple(result["methods"]) == METHODS
    assert result["model"]["config"]["hidden_size"] == 32
    assert result["settings"] | {"batch": 4, "length": 32, "dtype": "float32", "seeds": 2} == result["settings"]
    for name, method in result["methods"].items():
        memory = method["memory"]
        parts = [memory[part] for part in ("weights", "gradients", "optimizer", "activations")]
        assert all(parts), name
        assert memory["total"] == sum(parts)
        assert method["checkpoint_bytes"] > 0
    (task,) = result["tasks"].values()
    assert tuple(task["methods"]) == METHODS
    for name, method in task["methods"].items():
        rates = [rate["learning_rate"] for rate in method["rates"]]
        assert rates == sorted(rates)
        assert {"full": rates == [0.001, 0.003], "svf": 3 <= len(rates) <= 5}.get(name, rates == [0.01])
        assert method["learning_rate"] == min(method["rates"], key=lambda rate: rate["validation"])["learning_rate"]
        assert method["seeds_done"] == 2
        for rate in method["rates"]:
            assert len(rate["training_losses"]) == 8
            steps = [point["step"] for point in rate["curve"]]
            assert (steps[0], steps[-1]) == (0, 8)
            assert rate["curve"][0]["loss"] == task["base"]["loss"]
            seconds = [point["seconds"] for point in rate["curve"]]
            assert seconds == sorted(seconds)


def test_methods_train_what_they_say(result):
    methods = result["methods"]
    changed = {
        name: method["rates"][0]["changes"]["share_changed"]
        for name, method in result["tasks"]["text"]["methods"].items()
    }
    rank = {
        name: method["rates"][0]["changes"]["stable_rank"]["most"]
        for name, method in result["tasks"]["text"]["methods"].items()
    }
    full, lora, attention = (methods[name] for name in ("full", "lora", "lora-attention"))
    assert full["trainable_parameters"] == 259 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 64 + 2 * 32) + 32
    masked = methods["full-masked"]
    assert masked["trainable_parameters"] == round(0.2 * full["trainable_parameters"])
    assert 0 < changed["full-masked"] < changed["full"]
    assert masked["memory"]["optimizer"] < 0.25 * full["memory"]["optimizer"] + 1000
    assert masked["checkpoint_bytes"] < 0.4 * full["checkpoint_bytes"]
    assert lora["trainable_parameters"] == methods["peft-lora"]["trainable_parameters"] == 2 * 2 * (4 * 64 + 3 * 96)
    assert attention["trainable_parameters"] == 2 * 2 * 4 * 64
    assert methods["lora-mlp"]["trainable_parameters"] == 2 * 2 * 3 * 96
    assert methods["svf"]["trainable_parameters"] == 2 * 7 * 8
    assert methods["svf-full"]["trainable_parameters"] == 2 * 7 * 32
    assert methods["svf"]["checkpoint_bytes"] < attention["checkpoint_bytes"]
    assert rank["svf"] <= 8.01
    assert changed["lora-attention"] < changed["lora"] < changed["full"]
    assert rank["lora"] <= 2.001
    assert lora["checkpoint_bytes"] < full["checkpoint_bytes"] < methods["full→lora"]["checkpoint_bytes"]


def test_lora_and_peft_agree(result):
    assert result["agreement"]["agrees"], result["agreement"]


def test_the_report_opens_with_the_answer_and_its_tables_fit_a_page(reported):
    text = (reported / "compare.md").read_text()
    assert "lowrank compare --dtype float32 --device cpu --task text --methods text=full,full-masked,lora," in text
    head, *tables = text.split("\n## ")
    assert head.count("\n- ") == 4  # taught, text, cost, what that says
    assert "This is a toy" in head
    assert "2 seeds ran" in text
    for table in tables:
        rows = [row for row in table.splitlines() if row.startswith("|") and "---" not in row]
        cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
        if cells:
            assert sum(max(map(len, column)) + 3 for column in zip(*cells, strict=True)) <= 100, table.splitlines()[0]
    assert "LoraConfig(" in text or "SFTConfig(" in text


def test_nothing_is_left_when_a_report_fails(parse, texts, tmp_path, monkeypatch):
    import lowrank.compare.figure

    def broken(result, path):
        path.write_bytes(b"half a figure")
        raise RuntimeError("no figure today")

    monkeypatch.setattr(lowrank.compare.figure, "draw", broken)
    with pytest.raises(RuntimeError, match="no figure today"):
        tiny_run(parse, texts, tmp_path / "out", "--methods", "full")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["runs"]


@pytest.fixture
def broken(monkeypatch):
    """broken(method, prepare): the method prepares its model like this."""
    from lowrank.compare.methods import METHODS, Method, Phase

    def put(name, prepare):
        monkeypatch.setitem(METHODS, name, Method("broken", 1.0, (Phase(1.0, prepare),)))

    return put


def tiny_run(parse, texts, out, *options):
    """Of a text, every method at one rate where no others are given."""
    files = ("--data", texts / "new.txt", "--general-data", texts / "old.txt", "--out", out)
    options = ("--device", "cpu", "--dtype", "float32", "--steps", 6, "--rank", 2, *options)
    methods = options[options.index("--methods") + 1]
    rates = [f"{name}=0.01" for name in methods.split(",") if "--rates" not in options]
    return compare.main(parse(*files, *options, *(x for rate in rates for x in ("--rates", rate))), TINY)


def test_a_method_that_cannot_prepare_the_model_is_found_before_anything_trains(
    parse, texts, tmp_path, broken, monkeypatch
):
    from lowrank.compare import train

    events, train_once = [], train.train

    def refuse(model, adapter):
        events.append("prepared" if all(p.is_meta for p in model.parameters()) else "prepared with weights")
        raise ValueError("no such layer\nhere.")

    monkeypatch.setattr(train, "train", lambda *a, **k: events.append("trained") or train_once(*a, **k))
    broken("lora", refuse)
    assert tiny_run(parse, texts, tmp_path, "--methods", "full,lora") == 0
    assert events == ["prepared", "trained"]
    result = json.loads((tmp_path / "compare.json").read_text())
    assert (list(result["methods"]), result["not_done"]) == (["full"], {"lora": "no such layer here."})
    assert "- lora was not done: no such layer here.\n" in (tmp_path / "compare.md").read_text()


def test_nothing_trains_where_no_method_can(parse, texts, tmp_path, broken, monkeypatch):
    from lowrank.compare import train

    def refuse(model, rank):
        raise AttributeError("no weight")

    broken("lora", refuse)
    broken("svf", lambda model, rank: model.requires_grad_(False))
    monkeypatch.setattr(train, "train", None)
    monkeypatch.setattr(train, "pretrain", None)
    with pytest.raises(ValueError, match=r"lora: AttributeError: no weight; svf: nothing of the model would train"):
        tiny_run(parse, texts, tmp_path / "out", "--methods", "lora,svf")


def test_what_fails_while_it_trains_is_a_line_and_what_was_done_stays(parse, texts, tmp_path, broken, monkeypatch):
    from lowrank.compare import train

    train_once = train.train

    def second_seed_fails(subject, task, method, rate, seed, plan, **options):
        if method.summary == "broken" and seed == 1:
            raise RuntimeError("out of memory")
        return train_once(subject, task, method, rate, seed, plan, **options)

    monkeypatch.setattr(train, "train", second_seed_fails)
    broken("full", lambda model, adapter: model.requires_grad_(True))
    assert tiny_run(parse, texts, tmp_path, "--methods", "full,svf", "--seeds", 2) == 0
    result = json.loads((tmp_path / "compare.json").read_text())
    assert {name: m["seeds_done"] for name, m in result["tasks"]["text"]["methods"].items()} == {"full": 1, "svf": 2}
    assert result["not_done"] == {"text: full": "RuntimeError: out of memory"}


def test_a_rate_at_which_a_method_diverges_is_a_line(parse, texts, tmp_path, capsys):
    assert tiny_run(parse, texts, tmp_path, "--methods", "full", "--rates", "full=0.01,1e30") == 0
    (task,) = json.loads((tmp_path / "compare.json").read_text())["tasks"].values()
    assert [rate["diverged"] for rate in task["methods"]["full"]["rates"]] == [False, True]
    assert "text: full at 1e+30: diverged" in capsys.readouterr().err
    assert "- text: full diverged at 1e+30.\n" in (tmp_path / "compare.md").read_text()
    assert (
        tiny_run(parse, texts, tmp_path / "2", "--methods", "full,svf", "--rates", "full=1e30", "--rates", "svf=0.1")
        == 0
    )
    assert "text: full was not done: diverged at every rate: 1e+30." in (tmp_path / "2" / "compare.md").read_text()


class Stop(KeyboardInterrupt):
    pass


def test_every_finished_run_is_on_disk_before_the_next_one_and_is_resumed(parse, texts, tmp_path, monkeypatch):
    from lowrank.compare import train

    seen, train_once = [], train.train

    def look_and_train(*args, **options):
        seen.append(sorted(p.stem for p in (tmp_path / "runs").glob("text-*")))
        if len(seen) == 4:
            raise Stop
        return train_once(*args, **options)

    monkeypatch.setattr(train, "train", look_and_train)
    options = ("--methods", "full,svf", "--seeds", 2)
    with pytest.raises(KeyboardInterrupt, match="--resume goes on from there"):
        tiny_run(parse, texts, tmp_path, *options)
    done = ["text-full-0.01-0", "text-full-0.01-1", "text-svf-0.01-0"]
    assert seen == [sorted(done[:n]) for n in range(4)]
    assert "Unfinished: " in (tmp_path / "compare.md").read_text()

    trained = []
    monkeypatch.setattr(train, "train", lambda *a, **k: trained.append(a) or train_once(*a, **k))
    assert tiny_run(parse, texts, tmp_path, *options, "--resume") == 0
    assert len(trained) == 1
    monkeypatch.setattr(train, "train", train_once)
    assert tiny_run(parse, texts, tmp_path / "whole", *options) == 0
    resumed, whole = (json.loads((folder / "compare.json").read_text()) for folder in (tmp_path, tmp_path / "whole"))
    assert without_times(resumed) == without_times(whole)


def without_times(result):
    """Everything of a report but what another run takes longer for."""
    timed = ("seconds", "estimated_seconds", "seconds_per_step", "latency", "command", "answer")
    if isinstance(result, dict):
        return {key: without_times(value) for key, value in result.items() if key not in timed}
    return [without_times(value) for value in result] if isinstance(result, list) else result


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (("--seed", 1), "another seed: 0 there, 1 now"),
        (("--general-data", "new.txt"), "another "),
        (("--rank", 3), "another rank: 2 there, 3 now"),
        (("--data", "old.txt"), "another data: "),
        (("--in-place", "--dtype", "bfloat16"), "(and "),
    ],
)
def test_runs_of_something_else_are_not_resumed(parse, texts, tmp_path, options, what, monkeypatch):
    from lowrank.compare import train

    options = [texts / value if value in ("new.txt", "old.txt") else value for value in options]
    monkeypatch.setattr(train, "train", lambda *a, **k: (_ for _ in ()).throw(Stop))
    with pytest.raises(KeyboardInterrupt):
        tiny_run(parse, texts, tmp_path, "--methods", "full")
    with pytest.raises(ValueError, match=re.escape(what)):
        tiny_run(parse, texts, tmp_path, "--methods", "full", "--resume", *options)


def test_another_general_text_is_another_comparison(parse, texts, tmp_path, monkeypatch):
    """Of a model that does not depend on it: the embedded one is pretrained on it."""
    from lowrank.compare import records

    monkeypatch.setattr(records, "model_digest", lambda model: "one model")
    assert tiny_run(parse, texts, tmp_path, "--methods", "full") == 0
    with pytest.raises(ValueError, match="holds runs of another data: "):
        tiny_run(parse, texts, tmp_path, "--methods", "full", "--resume", "--general-data", texts / "new.txt")


def test_nothing_to_resume(parse, texts, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no runs; expected the --out of an earlier run"):
        tiny_run(parse, texts, tmp_path, "--methods", "full", "--resume")


def test_the_picked_runs_are_saved(parse, texts, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from lowrank.compare.data import embedded_config

    options = ("--methods", "full,lora", "--rates", "full=1e-9,0.01,1e-8", "--rates", "lora=0.01")
    assert tiny_run(parse, texts, tmp_path, *options, "--save") == 0
    assert sorted(p.name for p in (tmp_path / "saved" / "text").iterdir()) == ["full", "lora"]
    (task,) = json.loads((tmp_path / "compare.json").read_text())["tasks"].values()
    assert task["methods"]["full"]["learning_rate"] == 0.01
    full = AutoModelForCausalLM.from_pretrained(tmp_path / "saved" / "text" / "full")
    norm = full.model.norm.weight  # ones, but for four steps of pretraining at 0.004 and six of these
    assert (norm - 1).abs().max() > 0.02
    base = AutoModelForCausalLM.from_config(embedded_config(TINY))
    model = PeftModel.from_pretrained(base, tmp_path / "saved" / "text" / "lora")
    assert all(p.abs().max() > 1e-4 for name, p in model.named_parameters() if "lora_B" in name)


def test_what_is_saved_is_the_picked_run_whatever_was_resumed(parse, texts, tmp_path, monkeypatch):
    """Runs of other seeds leave nothing behind that a later run could be taken for."""
    options = ("--methods", "full,lora", "--rates", "full=0.01", "--rates", "lora=0.01", "--seeds", 2, "--save")
    assert tiny_run(parse, texts, tmp_path, *options) == 0
    saved = tmp_path / "saved" / "text"
    before = sorted(p.name for p in (saved / "full").iterdir())
    assert "model.safetensors" in before
    assert not (tmp_path / "saved" / ".last").exists()
    assert tiny_run(parse, texts, tmp_path, *options, "--resume") == 0
    assert sorted(p.name for p in (saved / "full").iterdir()) == before
    assert "adapter_model.safetensors" in {p.name for p in (saved / "lora").iterdir()}


def test_resuming_with_save_what_was_not_saved_says_so(parse, texts, tmp_path):
    options = ("--methods", "full", "--rates", "full=0.01")
    assert tiny_run(parse, texts, tmp_path, *options) == 0
    assert tiny_run(parse, texts, tmp_path, *options, "--resume", "--save") == 0
    assert "saving text: full was not done: its run is an earlier one's" in (tmp_path / "compare.md").read_text()


def test_earlier_runs_are_kept_aside_and_foreign_files_left_alone(parse, texts, tmp_path):
    options = ("--methods", "full", "--rates", "full=0.01")
    assert tiny_run(parse, texts, tmp_path, *options) == 0
    (tmp_path / "runs" / "my.json").write_text("{}")
    assert tiny_run(parse, texts, tmp_path, *options) == 0
    assert (tmp_path / "runs.before" / "my.json").exists()
    assert len(list((tmp_path / "runs.before").glob("text-full-*.json"))) == 1
    (tmp_path / "elsewhere" / "runs").mkdir(parents=True)
    (tmp_path / "elsewhere" / "runs" / "my.json").write_text("{}")
    with pytest.raises(ValueError, match="holds files that are no runs"):
        tiny_run(parse, texts, tmp_path / "elsewhere", *options)
    assert (tmp_path / "elsewhere" / "runs" / "my.json").exists()


@pytest.mark.parametrize("text", ["[]", "{"])
def test_a_damaged_key_is_named(parse, texts, tmp_path, text):
    assert tiny_run(parse, texts, tmp_path, "--methods", "full", "--rates", "full=0.01") == 0
    (tmp_path / "runs" / "key.json").write_text(text)
    with pytest.raises(ValueError, match=r"key\.json is damaged"):
        tiny_run(parse, texts, tmp_path, "--methods", "full", "--rates", "full=0.01", "--resume")


def test_damaged_records_run_again(parse, texts, tmp_path):
    options = ("--methods", "full", "--rates", "full=0.01")
    assert tiny_run(parse, texts, tmp_path, *options) == 0
    (record,) = (tmp_path / "runs").glob("text-full-*.json")
    whole = json.loads(record.read_text())
    for text in ("[]", "{}", '{"rate": 0.01, "steps": 6, "points": 3}'):
        record.write_text(text)
        assert tiny_run(parse, texts, tmp_path, *options, "--resume") == 0
        assert json.loads(record.read_text())["losses"] == whole["losses"]


def test_every_rate_of_every_method_diverges(parse, texts, tmp_path):
    with pytest.raises(ValueError, match="none can be done"):
        tiny_run(parse, texts, tmp_path, "--methods", "full", "--rates", "full=1e30")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (["--replay", "0.2", "--batch", "1"], ValueError, "expected a batch of at least 2"),
        (["--task", "format", "--methods", "knowledge=lora"], ValueError, "knowledge is not among the tasks (format)"),
        (["--methods", "lora:²"], ValueError, "expected a method alone, or a LoRA method and its rank"),
        (["--people", "0"], ValueError, "--people 0: expected at least 1"),
        (["--pairs", "61"], ValueError, "--pairs 61: expected at most 60"),
        (
            ["--methods", "lora,dora"],
            ValueError,
            "unknown method 'dora'; expected all or some of full,full-masked,lora,",
        ),
        (["--methods", "full:8"], ValueError, "'full:8': expected a method alone, or a LoRA method and its rank"),
        (["--methods", "lora:0"], ValueError, "expected a method alone, or a LoRA method and its rank, as in lora:64"),
        (["--methods", "facts=full"], ValueError, "unknown task 'facts'; expected some of text,knowledge,format"),
        (["--task", "facts"], ValueError, "unknown task 'facts'; expected all or some of text,knowledge,format"),
        (
            ["--rates", "svf-full=1"],
            ValueError,
            "expected METHOD=RATE,RATE with one of full, lora, lora-attention, svf",
        ),
        (["--rates", "full=0.1,-1"], ValueError, "expected positive numbers, as in full=1e-4,3e-4"),
        (["--rates", "full=nan"], ValueError, "expected positive numbers"),
        (["--minutes", "0"], ValueError, "--minutes 0.0: expected a positive number"),
        (["--replay", "1"], ValueError, "--replay 1.0: expected the share of old text in every batch"),
        (["--seq", "2"], ValueError, "--seq 2: expected at least 8"),
        (["--valid", "json"], ValueError, "--valid is about examples: expected --data FILE.jsonl with it"),
        (["--loss", "some"], ValueError, "--loss 'some': expected one of assistant, last, all"),
        (["--methods", ","], ValueError, "no method"),
        (["--rank", "0"], ValueError, "--rank 0: expected at least 1"),
        (["--alpha", "many"], ValueError, "--alpha 'many': expected a positive number, or r for the rank"),
        (["--alpha", "0"], ValueError, "--alpha '0': expected a positive number, or r for the rank"),
        (["--steps", "2"], ValueError, "--steps 2: expected at least 6"),
        (["--seeds", "0"], ValueError, "--seeds 0: expected at least 1"),
        (["--seed", "-1"], ValueError, "--seed -1: expected at least 0"),
        (["--seed", str(2**64)], ValueError, f"--seed {2**64}: expected at most 2**64 - 1"),
        (["--seed", str(2**64 - 2), "--seeds", "3"], ValueError, "expected at most 2**64 - 3"),
        (["--dtype", "float8"], ValueError, "--dtype 'float8': expected one of float32, bfloat16"),
        (["--device", "gpu"], ValueError, "--device 'gpu': expected cpu, cuda or cuda:N"),
        (["--device", "cuda:99"], ValueError, "--device 'cuda:99': expected a device that exists"),
        (["--data", "/no/such.txt"], FileNotFoundError, "--data /no/such.txt: no such file"),
        (["--data", "/"], FileNotFoundError, "--data /: is no file; expected a text file"),
        (["--general-data", "/no/such.txt"], FileNotFoundError, "--general-data /no/such.txt: no such file"),
        (["--model", "./no/model"], FileNotFoundError, "--model ./no/model: no such directory"),
    ],
)
def test_bad_option(parse, options, error, message):
    with pytest.raises(error) as caught:
        compare.main(parse(*options), TINY)
    assert message in str(caught.value)


def test_out_is_a_file(parse, tmp_path):
    (tmp_path / "taken").touch()
    with pytest.raises(NotADirectoryError, match="is a file; expected a directory"):
        compare.main(parse("--out", tmp_path / "taken"), TINY)


def test_out_is_tried_before_anything_is_loaded(parse, tmp_path, monkeypatch):
    import os

    from lowrank.compare import data

    monkeypatch.setattr(data, "load", None)
    (tmp_path / "taken").touch()
    (tmp_path / "reports" / "compare.json").mkdir(parents=True)
    with pytest.raises(OSError, match=r"--out .*: .*taken.* is not writable: Not a directory"):
        compare.main(parse("--device", "cpu", "--out", tmp_path / "taken" / "deeper"), TINY)
    with pytest.raises(IsADirectoryError, match=r"compare\.json is a directory; expected a file or nothing"):
        compare.main(parse("--device", "cpu", "--out", tmp_path / "reports"), TINY)

    def full(*_, **__):
        raise OSError(28, os.strerror(28), None)

    from lowrank.compare import settings

    monkeypatch.setattr(settings.tempfile, "TemporaryFile", full)
    with pytest.raises(OSError, match=r"--out .*is not writable: No space left"):
        compare.main(parse("--device", "cpu", "--out", tmp_path / "new" / "er"), TINY)
    assert not (tmp_path / "new").exists()


class Terminal(io.TextIOWrapper):
    """Of an encoding; with ``lines``, its reader leaves after so many."""

    def __init__(self, encoding, lines=None):
        super().__init__(io.BytesIO(), encoding=encoding)
        self.lines = lines

    def write(self, text):
        if self.lines is not None:
            self.lines -= text.count("\n")
            if self.lines < 0:
                raise BrokenPipeError(32, "Broken pipe")
        return super().write(text)


@pytest.mark.parametrize("terminal", [("latin-1", None), ("ascii", None), ("utf-8", 0), ("utf-8", 1)])
def test_the_report_is_on_disk_whatever_the_terminal_does(parse, texts, tmp_path, monkeypatch, terminal):
    monkeypatch.setattr(sys, "stdout", Terminal(*terminal))
    monkeypatch.setattr(sys, "stderr", Terminal(*terminal))
    assert tiny_run(parse, texts, tmp_path, "--methods", "full,full-lora") == 0
    result = json.loads((tmp_path / "compare.json").read_text(encoding="utf-8"))
    assert list(result["methods"]) == ["full", "full→lora"]
    sys.stdout.seek(0)
    if terminal[1] is None:
        assert "full?lora" in sys.stdout.read()


def test_the_reports_are_utf8_in_every_locale(parse, texts, tmp_path, monkeypatch):
    from pathlib import Path

    import lowrank.compare.report

    write = Path.write_text

    def as_latin1(self, text, encoding=None, **options):
        return write(self, text, encoding=encoding or "latin-1", **options)

    monkeypatch.setattr(lowrank.compare.report.Path, "write_text", as_latin1)
    assert tiny_run(parse, texts, tmp_path, "--methods", "full,full-lora") == 0
    assert "full→lora" in (tmp_path / "compare.md").read_text(encoding="utf-8")


def test_a_report_that_cannot_be_written_is_shown(parse, texts, tmp_path, monkeypatch, capsys):
    from lowrank.compare import report

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report, "write", full)
    with pytest.raises(OSError, match="No space left"):
        tiny_run(parse, texts, tmp_path, "--methods", "full")
    shown = capsys.readouterr()
    assert "Taught to embedded byte-level Llama" in shown.out
    assert "not written yet: [Errno 28] No space left" in shown.err


def test_the_command_that_repeats_the_run_survives_a_shell(parse, texts, tmp_path):
    import shlex

    from lowrank.compare.settings import from_arguments

    odd = tmp_path / 'it\'s a "new" $domain; rm.txt'
    odd.write_text("text")
    options = ("--data", odd, "--out", tmp_path / "o ut", "--methods", "full,full-lora", "--device", "cpu")
    options += ("--alpha", "r", "--in-place", "--rates", "full-lora=1e-4,3e-5", "--minutes", 3, "--task", "text")
    settings = from_arguments(parse(*options), TINY)
    words = shlex.split(settings.command)
    assert words[:2] == ["lowrank", "compare"]
    assert from_arguments(parse(*words[2:]), TINY) == settings
    settings = from_arguments(parse("--out=-reports", "--device", "cpu"), TINY)
    assert from_arguments(parse(*shlex.split(settings.command)[2:]), TINY) == settings


def test_interrupted(parse, texts, tmp_path, monkeypatch, capsys):
    from lowrank import cli
    from lowrank.compare import train

    runs, train_once = [], train.train

    def interrupt(*args, **options):
        runs.append(1)
        if len(runs) == 2:
            raise KeyboardInterrupt
        return train_once(*args, **options)

    monkeypatch.setattr(train, "train", interrupt)
    monkeypatch.setattr(compare, "Embedded", lambda: TINY)
    files = ["--data", texts / "new.txt", "--general-data", texts / "old.txt", "--out", tmp_path]
    options = ["--device", "cpu", "--steps", 6, "--rank", 2, "--methods", "full,svf", "--rates", "full=0.01"]
    assert cli.main(["compare", *map(str, files + options)]) == 130
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == (
        f"lowrank compare: interrupted: {tmp_path} holds what was finished, 1 method; --resume goes on from there"
    )


def test_text_too_short(parse, tmp_path):
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(ValueError, match="9 tokens are too few to train and test on; expected at least 2560"):
        compare.main(parse("--data", tmp_path / "short.txt", "--device", "cpu"), TINY)


def test_directory_without_a_model(parse, tmp_path):
    with pytest.raises(OSError, match="transformers cannot load a causal model and tokenizer"):
        compare.main(parse("--model", tmp_path, "--device", "cpu"), TINY)


def test_import_is_cheap():
    import subprocess

    code = "import sys, lowrank.compare; print([m for m in ('transformers', 'peft', 'matplotlib') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
