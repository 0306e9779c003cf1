"""bench/readme.py: everything that README shows is measured at toy sizes, rendered, drawn and put between its markers.

And what README and docs/benchmarks.md show is what the JSON in bench/results/readme says.
"""

import json
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("matplotlib")

import charts
import readme

ROOT = Path(__file__).parent.parent


def texts(svg: str) -> list[str]:
    return [" ".join(text.split()) for text in re.findall(r"<text[^>]*>([^<]*)</text>", svg)]


@pytest.mark.slow
def test_measured_rendered_and_drawn_at_toy_sizes(tmp_path):
    result = readme.measured(torch.device("cpu"), toy=True)
    tables = readme.rendered({"cpu": result})
    assert list(tables) == ["headline", "linear", "kept", "host", "step"]
    for name, table in tables.items():
        *rows, blank, small = table.splitlines()
        assert len({row.count("|") for row in rows}) == 1
        assert blank == ""
        assert all(result["environment"][key] in small for key in ("device", "torch", "peft", "python")), name
    assert "4.45× / 1.53× | **1.11×** / **1.02×** |" in tables["headline"]
    gpu = readme.rendered({"gpu": result})
    assert gpu["kept-gpu"] == tables["kept"]
    charts.step(result, tmp_path / "step.svg")
    charts.kept(result, tmp_path / "kept.svg")
    (step,) = (
        row for row in result["tables"]["step"]["rows"] if (row["method"], row["dropout"]) == ("frozen", charts.DROPOUT)
    )
    assert {f"{step['us'] / 1e6:.2f} s", "PEFT", "lowrank"} <= set(texts((tmp_path / "step.svg").read_text()))
    drawn = texts((tmp_path / "kept.svg").read_text())
    assert drawn[0] == "PEFT: 57.8 MiB, 4.45× the inputs"
    assert "7 dropout masks, 32 bits an element: 38.0 MiB" in drawn
    assert any(text.startswith("7 dropout masks, 1 bit an element: 1.2 MiB") for text in drawn)


def test_marked_tables_are_filled_and_nothing_else():
    x, y, end = "<!-- table: x (bench/readme.py) -->", "<!-- table: y (bench/readme.py) -->", "<!-- end -->"
    page = f"a\n{x}\nold\n\n{end}\nb\n{y}\n{end}\nc\n"
    filled = readme.filled(page, {"x": "| new |", "y": "| 2 |"})
    assert filled == f"a\n{x}\n| new |\n{end}\nb\n{y}\n| 2 |\n{end}\nc\n"
    assert readme.filled(filled, {"x": "| new |", "y": "| 2 |"}) == filled
    with pytest.raises(ValueError, match="no table named y: expected some of x"):
        readme.filled(page, {"x": "| new |"})
    for broken in (page.replace(f"{end}\nc", "c"), page.replace(x, "<!-- table: x -->")):
        with pytest.raises(ValueError, match="needs an '<!-- end -->'"):
            readme.filled(broken, {"x": "", "y": ""})


@pytest.mark.parametrize("page", readme.PAGES, ids=lambda page: page.name)
def test_pages_show_what_was_measured(page):
    text = page.read_text()
    assert readme.MARKED.search(text)
    assert readme.filled(text, readme.rendered(readme.results())) == text, "python bench/readme.py --write"


def test_no_table_of_readme_holds_a_figure_of_another_origin():
    outside = readme.MARKED.sub("", readme.PAGES[0].read_text())
    tables = re.findall(r"(?:^ *\|.*\n)+", outside, re.MULTILINE)
    figure = re.compile(r"\d\s?(?:×|[mµ]s\b|[KMG]i?B\b)")
    assert [row for table in tables for row in table.splitlines() if figure.search(row)] == []


def test_charts_say_what_was_measured(tmp_path):
    drawings = readme.drawings(readme.results())
    shown = {name for page in readme.PAGES for name in re.findall(r"images/(\S+\.svg)\)", page.read_text())}
    assert shown <= {path.name for path in drawings}
    for path, draw in drawings.items():
        draw(tmp_path / path.name)
        assert texts((tmp_path / path.name).read_text()) == texts(path.read_text()), path.name


def test_the_figures_of_experts_are_the_results():
    page = (ROOT / "docs" / "experts.md").read_text()
    rows = {
        "a block of 128 experts": "experts-fp32",
        "64 experts, bf16, adapters in bf16": "experts_64-bf16",
        "64 experts, bf16, adapters in fp32": "experts_64-bf16-fp32",
        "a model of 4 layers": "experts_model-fp32",
    }
    for start, name in rows.items():
        cells = next(line for line in page.splitlines() if line.startswith(f"| {start}")).split("|")[2:-1]
        found = json.loads((ROOT / "bench" / "results" / "cpu" / f"{name}.json").read_text())["rows"]
        of = {row["provider"]: row for row in found}
        shown = [f"{of[who]['over_baseline']:.2f}×" for who in ("frozen-eager", "peft", "lowrank")]
        assert [cell.strip() for cell in cells[1:]] == shown
        assert cells[0].strip() == f"{of['frozen']['us'] / 1e3:.3g} ms"
    first = {
        row["provider"]: row for row in json.loads((ROOT / "bench/results/cpu/experts-fp32.json").read_text())["rows"]
    }
    text = f"takes {first['lowrank']['over_baseline']:.2f}× a frozen one's time, PEFT's {first['peft']['over_baseline']:.2f}×"
    assert text in " ".join((ROOT / "README.md").read_text().split())
