"""One toy comparison from the command's main to the files, and every bad input before it starts."""

import io
import itertools
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
    options = ("--data", texts / "new.txt", "--general-data", texts / "old.txt", "--out", out, "--device", "cpu")
    assert compare.main(parse(*options, "--steps", 8, "--rank", 2, "--seeds", 2), TINY) == 0
    return out


def test_writes_three_files_and_nothing_else(reported):
    assert sorted(p.name for p in reported.iterdir()) == ["compare.json", "compare.md", "compare.png"]
    assert (reported / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_the_figure_names_every_curve_at_its_end_without_overlaps(reported, tmp_path):
    from lowrank.compare.figure import draw

    result = json.loads((reported / "compare.json").read_text())
    draw(result, tmp_path / "compare.svg")
    written = re.findall(
        r'<text style="([^"]*)" x="([^"]*)" y="([^"]*)"[^>]*>([^<]*)<', (tmp_path / "compare.svg").read_text()
    )
    for name, method in result["methods"].items():
        assert [text for *_, text in written].count(name) == 2  # at the curve, at the bars
        assert any(text == f"{method['memory']['total'] / 1e6:.1f}" for *_, text in written)
    ends = [
        (float(x), float(y), style) for style, x, y, text in written if text in METHODS and "anchor: start" in style
    ]
    assert len({x for x, _, _ in ends}) == 1
    heights = sorted(y for _, y, _ in ends)
    size = float(re.search(r"font-size: ([0-9.]+)px", ends[0][2])[1])
    assert all(b - a > size for a, b in itertools.pairwise(heights))


def test_json_holds_every_measurement(reported):
    result = json.loads((reported / "compare.json").read_text())
    assert tuple(result["methods"]) == METHODS
    assert result["model"]["config"]["hidden_size"] == 32
    assert result["settings"] | {"batch": 4, "length": 32, "dtype": "float32", "seeds": 2} == result["settings"]
    for name, method in result["methods"].items():
        memory = method["memory"]
        parts = [memory[part] for part in ("weights", "gradients", "optimizer", "activations")]
        assert all(parts), name
        assert memory["total"] == sum(parts)
        assert len(method["sweep"]) >= 3
        assert len(method["training_losses"]) == 8
        assert method["checkpoint_bytes"] > 0
        assert [p["seconds"] for p in method["points"]] == sorted(p["seconds"] for p in method["points"])
        assert method["points"][0]["step"] == 0
        assert method["points"][-1]["step"] == 8


def test_methods_train_what_they_say(reported):
    methods = json.loads((reported / "compare.json").read_text())["methods"]
    full, lora, attention = (methods[name] for name in ("full", "lora", "lora-attention"))
    assert full["trainable_parameters"] == 259 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 64 + 2 * 32) + 32
    masked = methods["full-masked"]
    assert masked["trainable_parameters"] == round(0.2 * full["trainable_parameters"])
    assert 0 < masked["share_changed"] < full["share_changed"]
    assert masked["share_beyond_tolerance"] <= masked["share_changed"]
    assert masked["memory"]["optimizer"] < 0.25 * full["memory"]["optimizer"] + 1000
    assert masked["checkpoint_bytes"] < 0.4 * full["checkpoint_bytes"]
    assert lora["trainable_parameters"] == methods["peft-lora"]["trainable_parameters"] == 2 * 2 * (4 * 64 + 3 * 96)
    assert attention["trainable_parameters"] == 2 * 2 * 4 * 64
    assert methods["svf"]["trainable_parameters"] == 2 * 7 * 8
    assert methods["svf-full"]["trainable_parameters"] == 2 * 7 * 32
    assert methods["svf"]["checkpoint_bytes"] < attention["checkpoint_bytes"]
    assert methods["svf"]["stable_rank"]["most"] <= 8.01
    assert attention["share_changed"] < lora["share_changed"] < full["share_changed"]
    assert lora["stable_rank"]["most"] <= 2.001
    assert lora["checkpoint_bytes"] < full["checkpoint_bytes"] < methods["full→lora"]["checkpoint_bytes"]


def test_lora_and_peft_agree(reported):
    agreement = json.loads((reported / "compare.json").read_text())["agreement"]
    assert agreement["within_rounding"], agreement
    assert agreement["all_steps"] in (8, 2)  # of a full run, or of the sweep's where the picks differ
    assert agreement["largest_difference_of_all"] <= max(10 * agreement["rounding_alone_of_all"], agreement["allowed"])


def test_markdown_repeats_the_command_and_the_scale(reported):
    text = (reported / "compare.md").read_text()
    assert "lowrank compare --methods full,full-masked,lora" in text
    assert "- This is a model of 0.03 million parameters" in text
    assert "2 seeds ran" in text


def test_nothing_is_left_when_a_report_fails(parse, texts, tmp_path, monkeypatch):
    import lowrank.compare.figure

    def broken(result, path):
        path.write_bytes(b"half a figure")
        raise RuntimeError("no figure today")

    monkeypatch.setattr(lowrank.compare.figure, "draw", broken)
    options = ("--data", texts / "new.txt", "--general-data", texts / "old.txt", "--device", "cpu", "--steps", 6)
    with pytest.raises(RuntimeError, match="no figure today"):
        compare.main(parse(*options, "--methods", "full", "--out", tmp_path / "out"), TINY)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.fixture
def broken(monkeypatch):
    """broken(method, prepare): the method prepares its model like this."""
    from lowrank.compare.methods import METHODS, Method, Phase

    def put(name, prepare):
        monkeypatch.setitem(METHODS, name, Method("broken", 1.0, (Phase(1.0, prepare),)))

    return put


def tiny_run(parse, texts, out, *options):
    files = ("--data", texts / "new.txt", "--general-data", texts / "old.txt", "--out", out)
    return compare.main(parse(*files, "--device", "cpu", "--steps", 6, "--rank", 2, *options), TINY)


def test_a_method_that_cannot_prepare_the_model_is_found_before_anything_trains(
    parse, texts, tmp_path, broken, monkeypatch
):
    from lowrank.compare import train

    events, train_once = [], train.train

    def refuse(model, rank):
        events.append("prepared" if all(p.is_meta for p in model.parameters()) else "prepared with weights")
        raise ValueError("no such layer\nhere.")

    monkeypatch.setattr(train, "train", lambda *a, **k: events.append("trained") or train_once(*a, **k))
    broken("lora", refuse)
    assert tiny_run(parse, texts, tmp_path, "--methods", "full,lora") == 0
    assert events[:2] == ["prepared", "trained"]
    assert events.count("prepared") == 1
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

    def second_seed_fails(subject, method, rate, steps, seed, **options):
        if method.summary == "broken" and seed == 1:
            raise RuntimeError("out of memory")
        return train_once(subject, method, rate, steps, seed, **options)

    monkeypatch.setattr(train, "train", second_seed_fails)
    broken("full", lambda model, rank: model.requires_grad_(True))
    assert tiny_run(parse, texts, tmp_path, "--methods", "full,svf", "--seeds", 2) == 0
    result = json.loads((tmp_path / "compare.json").read_text())
    assert {name: m["seeds_done"] for name, m in result["methods"].items()} == {"full": 1, "svf": 2}
    assert result["not_done"] == {"full": "after 1 of 2 seeds, RuntimeError: out of memory"}


def test_every_finished_run_is_on_disk_before_the_next_one(parse, texts, tmp_path, monkeypatch):
    from lowrank.compare import train

    seen, train_once = [], train.train

    def look_and_train(subject, method, rate, steps, seed, **options):
        if options.get("points"):
            file = tmp_path / "compare.json"
            result = json.loads(file.read_text()) if file.exists() else {"methods": {}, "complete": None}
            seen.append(({name: m["seeds_done"] for name, m in result["methods"].items()}, result["complete"]))
            if len(seen) == 4:
                raise KeyboardInterrupt
        return train_once(subject, method, rate, steps, seed, **options)

    monkeypatch.setattr(train, "train", look_and_train)
    with pytest.raises(KeyboardInterrupt):
        tiny_run(parse, texts, tmp_path, "--methods", "full,svf", "--seeds", 2)
    assert seen == [({}, None), ({"full": 1}, False), ({"full": 2}, False), ({"full": 2, "svf": 1}, False)]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["compare.json", "compare.md", "compare.png"]
    assert "Unfinished: " in (tmp_path / "compare.md").read_text()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (["--methods", "lora,dora"], ValueError, "unknown method 'dora'; expected some of full,full-masked,lora,"),
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
    assert "Lowest loss on the new domain" in shown.out
    assert "not written yet: [Errno 28] No space left" in shown.err


def test_the_command_that_repeats_the_run_survives_a_shell(parse, texts, tmp_path):
    import shlex

    from lowrank.compare.settings import from_arguments

    odd = tmp_path / 'it\'s a "new" $domain; rm.txt'
    odd.write_text("text")
    options = ("--data", odd, "--out", tmp_path / "o ut", "--methods", "full,full-lora", "--device", "cpu")
    options += ("--alpha", "r", "--in-place")
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
        if options.get("points"):
            runs.append(1)
            if len(runs) == 2:
                raise KeyboardInterrupt
        return train_once(*args, **options)

    monkeypatch.setattr(train, "train", interrupt)
    monkeypatch.setattr(compare, "Embedded", lambda: TINY)
    files = ["--data", texts / "new.txt", "--general-data", texts / "old.txt", "--out", tmp_path]
    options = ["--device", "cpu", "--steps", 6, "--rank", 2, "--methods", "full,svf"]
    assert cli.main(["compare", *map(str, files + options)]) == 130
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"lowrank compare: interrupted: {tmp_path} holds what was finished, 1 run"


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
