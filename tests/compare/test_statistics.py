"""What may be said of hand-made numbers."""

import math

import pytest
import torch

from lowrank.compare.run import grid, sweep
from lowrank.compare.statistics import agreement, at_loss, leaders, separated, target_loss
from lowrank.compare.train import Point, Run
from lowrank.compare.verdict import verdict

NOISE = torch.linspace(-0.5, 0.5, 32, dtype=torch.float64)  # a sequence's own difficulty, shared by the methods


def run(*losses: tuple[float, float]) -> Run:
    """(new, old) at steps 0, 10, 20, ... and as many seconds."""
    points = [Point(10 * i, 10.0 * i, new + NOISE, old + NOISE) for i, (new, old) in enumerate(losses)]
    return Run(points=points)


def test_equal_loss_is_interpolated_at_the_first_crossing():
    wavy = run((3.0, 1.0), (2.0, 1.4), (2.6, 1.5), (1.0, 2.0))
    at = at_loss(wavy.points, 2.25)
    assert at.step == 8
    assert at.seconds == pytest.approx(7.5)
    assert float(at.old.mean()) == pytest.approx(1.3)
    assert at_loss(wavy.points, 3.5) is wavy.points[0]
    with pytest.raises(ValueError, match="its lowest loss is"):
        at_loss(wavy.points, 0.5)


def test_target_is_the_worst_of_the_best():
    assert target_loss([run((3, 1), (1.5, 1), (1.8, 1)), run((3, 1), (2, 1))]) == pytest.approx(2)


def test_one_seed_is_separated_by_the_noise_of_evaluation():
    low = [1.0 + NOISE]
    assert separated(low, [1.1 + NOISE])  # every sequence worse by the same: no noise in the difference
    assert not separated(low, [1.01 + NOISE.flip(0)])


def test_overlapping_seeds_are_not_separated():
    assert not separated([1.0 + NOISE, 1.2 + NOISE], [1.1 + NOISE, 1.3 + NOISE])
    assert separated([1.0 + NOISE, 1.2 + NOISE], [1.25 + NOISE, 1.3 + NOISE])


def test_leaders():
    losses = {"far": [2.0 + NOISE], "second": [1.01 + NOISE.flip(0)], "first": [1.0 + NOISE]}
    assert leaders(losses) == ["first", "second"]


def test_a_run_that_diverged_leads_nothing_and_keeps_what_it_reached():
    broken = run((3.0, 1.0), (2.0, 1.4), (math.nan, math.nan))
    assert target_loss([broken, run((3, 1), (1, 1))]) == pytest.approx(2)
    assert at_loss(broken.points, 2.0).step == 10
    assert leaders({"broken": [broken.points[-1].new], "fine": [2.0 + NOISE]}) == ["fine"]


def test_agreement_catches_a_real_difference():
    peft = [2.0, 1.8, 1.6]
    rounding = [x + 1e-6 for x in peft]
    assert agreement([x + 5e-6 for x in peft], peft, rounding, 1.2e-7)["within_rounding"]
    assert not agreement([x + 1e-4 for x in peft], peft, rounding, 1.2e-7)["within_rounding"]


def test_agreement_stops_where_rounding_alone_parts_the_curves():
    result = agreement([2.0, 1.8, 1.2], [2.0, 1.8, 1.6], [2.000001, 1.800001, 1.7], 1.2e-7)
    assert (result["steps"], result["within_rounding"]) == (2, True)
    assert result["allowed"] == pytest.approx(1e-5, rel=1e-3)


def test_sweep_moves_out_of_a_winning_edge_and_flags_what_stays_there():
    interior = sweep(lambda rate: (abs(math.log(rate / 1e-3)), [0.0]), [3e-4, 1e-3, 3e-3])
    assert (interior.picked, interior.edge, len(interior.validation)) == (1e-3, False, 3)
    moved = sweep(lambda rate: (abs(math.log(rate / 9e-3)), [0.0]), [3e-4, 1e-3, 3e-3])
    assert (moved.picked, moved.edge, len(moved.validation)) == (9e-3, False, 5)
    endless = sweep(lambda rate: (-rate, [0.0]), [3e-4, 1e-3, 3e-3])
    assert endless.edge
    assert len(endless.validation) == 5


def test_diverged_rates_are_never_picked():
    swept = sweep(lambda rate: (math.nan if rate > 1e-3 else 1 / rate, [0.0]), [3e-4, 1e-3, 3e-3])
    assert swept.picked == 1e-3


def test_loras_grid_is_ten_times_full_fine_tunings_over_its_scale():
    from lowrank.compare.methods import METHODS
    from lowrank.compare.settings import Adapter

    unscaled, fourfold = Adapter(rank=8, alpha=8), Adapter(rank=8, alpha=32)
    full = grid(METHODS["full"], 128, unscaled)
    assert grid(METHODS["full"], 128, fourfold) == full
    for name in ("lora", "lora-attention", "peft-lora", "full→lora"):
        assert grid(METHODS[name], 128, unscaled) == pytest.approx([10 * rate for rate in full])
        assert grid(METHODS[name], 128, fourfold) == pytest.approx([2.5 * rate for rate in full])
    first, second = METHODS["full→lora"].phases  # every weight trains at a tenth of full's rate, whatever LoRA's scale
    for adapter in (unscaled, fourfold):
        swept = grid(METHODS["full→lora"], 128, adapter)[1]
        assert first.learning_rate(swept, adapter) == pytest.approx(full[1])
        assert second.learning_rate(swept, adapter) == swept


def result(**leading) -> dict:
    def method(loss, memory, edge=False):
        spread = {"mean": loss, "least": loss, "most": loss}
        at = {"step": {"mean": 50}, "seconds": {"mean": 4.2}, "old_loss": {"mean": 1.9}}
        return {
            "new_loss": {"before": 2.5, "after": spread},
            "old_loss": {"before": 1.8, "after": spread},
            "at_target": at,
            "memory": {"activations": memory // 2, "total": memory},
            "edge_of_grid": edge,
        }

    return {
        "model": {
            "name": "toy",
            "embedded": True,
            "parameters": 840_000,
            "pretraining": {"steps": 800, "seconds": 55.0},
        },
        "data": {"new": {"source": "code", "sequences": {"test": 64}}, "general": {"source": "prose"}},
        "settings": {"steps": 200, "seeds": 1},
        "memory_measure": "counted bytes",
        "target_loss": 2.1,
        "methods": {"full": method(2.0, 60_000_000), "lora": method(2.01, 50_000_000, edge=True)},
        "leaders": {"new": ["full"], "old": ["full"], "old_at_target": ["full"]} | leading,
        "agreement": None,
    }


def test_verdict_begins_with_how_small_the_model_is():
    first = verdict(result())[0]
    assert first.startswith("This is a model of 0.84 million parameters, pretrained here for 800 steps (55 s) on prose")
    assert first.endswith("it says nothing about larger models.")


def test_no_winner_inside_the_spread():
    text = " ".join(verdict(result(new=["full", "lora"])))
    assert "new domain after 200 steps: no single method: full is lowest (2.000, from 2.500)" in text
    assert "One seed ran: the spread between runs is not known" in text
    assert "full (2.000, from 2.500), apart from all the others" in " ".join(verdict(result()))


def test_edge_of_the_grid_is_flagged():
    assert verdict(result())[-1].startswith("The rate picked for lora is the edge of the grid")


def test_target_names_cost_and_forgetting():
    text = " ".join(verdict(result()))
    assert "full at step 50, after 4.2 s and with 60.0 MB, old-domain loss +0.100" in text
