"""What may be said of hand-made numbers."""

import ast
import math
from types import SimpleNamespace

import pytest
import torch

from lowrank.compare import budget, summary
from lowrank.compare.comparison import MethodRuns, TaskRuns
from lowrank.compare.costs import Memory
from lowrank.compare.rates import grid, sweep
from lowrank.compare.settings import Embedded, Settings
from lowrank.compare.statistics import crossing, ends, leaders, separated
from lowrank.compare.train import Plan, Point, Run
from lowrank.compare.verdict import answer, chosen, details, paste

NOISE = torch.linspace(-0.5, 0.5, 32, dtype=torch.float64)  # an item's own difficulty, shared by the methods


def run(*reached: tuple[float, float], rate=1e-3, seed=0, learnt="loss", validation=None, memory=50) -> Run:
    """(learnt, general loss) at steps 0, 10, 20, ... and as many seconds; nats fall as what is learnt rises."""
    points = [
        Point(10 * i, 10.0 * i, {learnt: new + NOISE, "trained_nats": 5 - new + NOISE, "general": old + NOISE})
        for i, (new, old) in enumerate(reached)
    ]
    steps = 10 * (len(reached) - 1)
    end = reached[-1][0] if validation is None else validation
    made = Run(rate, seed, steps, end, [1.0] * steps, [1.0] * steps, points, trainable=10)
    made.memory = Memory(memory, 0, 0, 0, memory)
    made.changes = {"share_changed": 0.5, "stable_rank": {"median": 1.0}}
    return made


def recall(*reached, **options) -> Run:
    return run(*reached, learnt="trained_exact", **options)


def test_a_target_is_met_at_the_first_crossing():
    wavy = run((3.0, 1.0), (2.0, 1.4), (2.6, 1.5), (1.0, 2.0)).points
    at = crossing(wavy, "loss", 2.25)
    assert (at.step, at.seconds, at.forgot) == pytest.approx((7.5, 7.5, 0.3))
    assert crossing(wavy, "loss", 3.5).step == 0
    assert crossing(wavy, "loss", 0.5) is None
    rising = recall((0.0, 1.0), (0.4, 1.2), (1.0, 2.2)).points
    at = crossing(rising, "trained_exact", 0.7)
    assert (at.step, at.forgot) == pytest.approx((15, 0.7))
    assert crossing(rising, "trained_exact", 1.0).step == 20


def test_what_follows_a_divergence_does_not_count():
    broken = run((3.0, 1.0), (2.0, 1.4), (math.nan, math.nan), (0.5, 1.0)).points
    assert crossing(broken, "loss", 2.0).step == 10
    assert crossing(broken, "loss", 0.6) is None
    assert leaders({"broken": [broken[2].measures["loss"]], "fine": [2.0 + NOISE]}) == ["fine"]


def test_ends_are_in_the_order_of_rates_and_without_what_diverged():
    runs = [run((3, 1), (1, 2), rate=3e-3), run((3, 1), (2, 1.5), rate=1e-3), run((3, 1), rate=1, validation=math.inf)]
    assert [point.mean("loss") for point in ends(runs[0].points[0], runs)] == pytest.approx([3, 2, 1])


def test_one_seed_is_separated_by_the_noise_of_evaluation():
    low = [1.0 + NOISE]
    assert separated(low, [1.1 + NOISE])  # every item worse by the same: no noise in the difference
    assert not separated(low, [1.01 + NOISE.flip(0)])


def test_overlapping_seeds_are_not_separated():
    assert not separated([1.0 + NOISE, 1.2 + NOISE], [1.1 + NOISE, 1.3 + NOISE])
    assert separated([1.0 + NOISE, 1.2 + NOISE], [1.25 + NOISE, 1.3 + NOISE])


def test_leaders():
    losses = {"far": [2.0 + NOISE], "second": [1.01 + NOISE.flip(0)], "first": [1.0 + NOISE]}
    assert leaders(losses) == ["first", "second"]


def swept(validation_at, rates, extend=True) -> MethodRuns:
    def run_at(rate):
        loss = validation_at(rate)
        return Run(rate, 0, 10, loss if math.isfinite(loss) else math.inf)

    return MethodRuns(list(sweep(run_at, rates, extend)))


def test_sweep_moves_out_of_a_winning_edge_and_flags_what_stays_there():
    rates = [3e-4, 1e-3, 3e-3]
    interior = swept(lambda rate: abs(math.log(rate / 1e-3)), rates)
    assert (interior.picked.rate, interior.edge, len(interior.sweep)) == (1e-3, False, 3)
    moved = swept(lambda rate: abs(math.log(rate / 9e-3)), rates)
    assert (moved.picked.rate, moved.edge, len(moved.sweep)) == (9e-3, False, 5)
    endless = swept(lambda rate: -rate, rates)
    assert (endless.edge, len(endless.sweep)) == (True, 5)
    given = swept(lambda rate: -rate, rates, extend=False)
    assert (given.edge, len(given.sweep)) == (True, 3)
    assert not swept(lambda rate: -rate, [1e-3]).edge


def test_diverged_rates_are_never_picked():
    assert swept(lambda rate: math.nan if rate > 1e-3 else 1 / rate, [3e-4, 1e-3, 3e-3]).picked.rate == 1e-3


def test_loras_grid_is_ten_times_full_fine_tunings_over_its_scale():
    from lowrank.compare.methods import METHODS
    from lowrank.compare.settings import Adapter

    unscaled, fourfold = Adapter(rank=8, alpha=8), Adapter(rank=8, alpha=32)
    full = grid(METHODS["full"], 128, unscaled)
    assert grid(METHODS["full"], 128, fourfold) == full
    for name in ("lora", "lora-attention", "lora-mlp", "peft-lora", "full→lora"):
        assert grid(METHODS[name], 128, unscaled) == pytest.approx([10 * rate for rate in full])
        assert grid(METHODS[name], 128, fourfold) == pytest.approx([2.5 * rate for rate in full])
    first, second = METHODS["full→lora"].phases  # every weight trains at a tenth of full's rate, whatever LoRA's scale
    for adapter in (unscaled, fourfold):
        middle = grid(METHODS["full→lora"], 128, adapter)[1]
        assert first.learning_rate(middle, adapter) == pytest.approx(full[1])
        assert second.learning_rate(middle, adapter) == middle


def result(task="knowledge", settings=None, embedded=True, **methods: list[Run]) -> dict:
    """Of a task's runs by method, the first of each method being the sweep's and the others' of its other seeds."""
    constant, learnt = task == "knowledge", "trained_exact" if task == "knowledge" else "loss"
    kind = SimpleNamespace(
        source="30 facts", digest="0", constant_rate=constant, learnt=learnt,
        targets=(0.5, 0.95) if constant else (), apart="trained_nats" if constant else "loss",
    )  # fmt: skip
    base = {run.seed: run.points[0] for runs in methods.values() for run in runs}
    done = {
        name: MethodRuns([r for r in runs if r.seed == 0], [r for r in runs if r.seed])
        for name, runs in methods.items()
    }
    runs = TaskRuns({0: kind}, Plan(20, 8, 2), base, alone=4.0, methods=done)
    settings = settings or Settings("float32", "cpu", {task: tuple(methods)}, seeds=1 + sum(s > 0 for s in base))
    model = torch.nn.ModuleDict({part: torch.nn.ModuleDict() for part in ("attn", "mlp")})
    model["attn"]["q_proj"], model["mlp"]["up_proj"] = (torch.nn.Linear(8, 8, bias=False) for _ in range(2))
    model.rest, model.config = torch.nn.Parameter(torch.zeros(840_000 - 128)), SimpleNamespace(to_dict=dict)
    general = SimpleNamespace(source="prose", digest="1", test=range(64))
    subject = SimpleNamespace(
        name="toy", embedded=embedded, invented=(), model=model, general=general, batch=8, length=128
    )
    comparison = SimpleNamespace(
        settings=settings, subject=subject, seconds=1.0, complete=True, not_done={}, environment={}, budget=None,
        pretraining={"steps": 800, "seconds": 55.0}, tasks={task: runs}, costs={}, agreement=None, probed={},
        forgetting=SimpleNamespace(known=3, nothing_to_forget=True, before=(0.1, 0.01), diverse=False),
    )  # fmt: skip
    return summary.summarize(comparison)


FULL = recall((0.0, 2.0), (0.6, 2.2), (1.0, 2.6), memory=200)
LORA = recall((0.0, 2.0), (0.3, 2.5), (0.8, 3.0))


def test_the_answer_names_who_got_there_when_and_at_what_forgetting():
    lines = answer(result(full=[FULL], lora=[LORA]))
    assert lines[0] == "Taught to toy, 0.84 million parameters: knowledge (30 facts)."
    assert lines[1] == (
        "Knowledge: 95% of the facts recalled in the trained wording reached by full in 19 steps (+0.55); not reached in 20 "
        "steps: lora (80%). In brackets: rise of the loss on general text."
    )
    assert lines[2].startswith("Cost: training memory from 0.1 kB (lora) to 0.2 kB (full)")
    assert lines[3].startswith("So, here: knowledge took full training (lora did not get there). This is a toy")
    assert "says nothing about larger models" in lines[3]
    enough = recall((0.0, 2.0), (0.9, 2.5), (1.0, 3.0))
    both = answer(result(full=[FULL], lora=[enough], embedded=False))
    assert "for knowledge an adapter was enough (lora), though full forgot less." in both[-1]
    assert "Another model, other data" in both[-1]
    nobody = answer(result(lora=[LORA]))
    assert "no method reached 95% of the facts recalled in the trained wording in 20 steps: lora (80%)." in nobody[1]
    assert "nothing was learnt well enough" in nobody[-1]


def test_a_target_that_one_seed_misses_is_not_reached():
    late = recall((0.0, 2.0), (0.3, 2.5), (0.8, 3.0), seed=1)
    made = result(lora=[recall((0.0, 2.0), (0.5, 2.1), (1.0, 2.2)), late])
    assert [at["reached"] for at in made["tasks"]["knowledge"]["methods"]["lora"]["at_targets"]] == [2, 1]
    assert "lora (90%, 1 of 2 seeds)" in answer(made)[1]


def test_targets_of_a_loss_are_shares_of_the_largest_gain_read_between_the_ends_of_runs():
    full = [run((3.0, 2.0), (1.0, 2.4), rate=1e-3), run((3.0, 2.0), (2.0, 2.1), rate=1e-4, validation=9)]
    made = result("text", full=full, lora=[run((3.0, 2.0), (1.5, 2.8))])
    task = made["tasks"]["text"]
    assert task["targets"] == pytest.approx([2.0, 1.2])
    met = {
        name: [at["forgot"] and at["forgot"]["mean"] for at in m["at_targets"]] for name, m in task["methods"].items()
    }
    assert met["full"] == pytest.approx([0.1, 0.1 + 0.8 * 0.3])
    assert met["lora"] == [pytest.approx(0.8 * 2 / 3), None]
    assert (
        "a loss of 1.200 (90% of the largest gain) reached by full (+0.34); not reached in 10 steps"
        not in answer(made)[1]
    )


def test_a_loss_that_misses_the_target_by_less_than_the_noise_took_no_full_training():
    full = [run((3.0, 2.0), (1.0, 2.4), memory=200)]
    for loss, said in (
        (1.25, "full training was better than lora by less than can be told"),
        (1.9, "took full training"),
    ):
        lora = run((3.0, 2.0), (loss, 2.4))
        lora.points[-1].measures["loss"] = loss + NOISE.flip(0)  # another order of difficulty: a noisy difference
        assert said in answer(result("text", full=full, lora=[lora]))[-1]


def test_what_training_gave_to_others_and_to_what_was_trained():
    full = recall((0.0, 2.0), (0.6, 2.2), (1.0, 2.6))
    full.shown = (1.0, 0.5)
    text = " ".join(details(result(full=[full])))
    assert (
        "full: after training, 3.00 nats per token in general and 0.50 on trained examples alone, a share of 0.86."
        in text
    )


def test_tables_of_several_seeds_fit_a_page():
    """With the measures, seeds and names of a real comparison."""
    from lowrank.compare.report import MEASURES, tables

    def wide(seed):
        made = recall(
            (0.0, 2.0), (0.6, 2.2 + seed), (1.0 - seed / 50, 12.6 + seed), rate=3.3e-4, seed=seed, memory=10**10
        )
        for point in made.points:
            point.measures.update(
                {key: 10.0 + seed + NOISE for key in MEASURES if key.startswith(("cloze", "question"))}
            )
            point.measures["items"] = 0.5 + seed / 50 + NOISE
        return made

    made = result(**{"lora-attention:64": [wide(0), wide(1), wide(2)], "full": [wide(0), wide(1), wide(2)]})
    made["forgetting"] |= {"diverse": True, "diversity": [0.75, 0.06]}
    shown = tables(made)
    assert [title.split(" after")[0] for title, *_ in shown[:3]] == [
        "knowledge: learnt", "knowledge: where it was learnt", "knowledge: forgotten",
    ]  # fmt: skip
    for title, columns, rows in shown:
        assert {len(row) for row in rows} == {len(columns)}, title
        assert sum(max(map(len, column)) + 3 for column in zip(columns, *rows, strict=True)) <= 100, title
    assert "0.980 [0.960…1.000]" in shown[0][2][1]


def test_no_winner_inside_the_spread_and_forgetting_over_every_rate():
    twin = recall((0.0, 2.0), (0.6, 2.2), (1.0, 2.6))
    hot = recall((0.0, 2.0), (0.9, 4.0), (0.9, 5.0), rate=3e-3, validation=9)
    text = " ".join(details(result(full=[FULL, hot], lora=[twin])))
    assert "no single method: full is lowest (4.000, from 5.000), none of the others separated from it" in text
    assert "One seed ran: the spread between runs is not known" in text
    assert (
        "forgetting at 50% of the facts recalled in the trained wording, over every rate tried: full +0.17 to +1.11"
        in text
    )
    assert "(2 of 2 rates); lora +0.17 (1 of 1 rates)" in text
    assert "full (4.000, from 5.000), apart from all the others" in " ".join(details(result(full=[FULL], lora=[LORA])))
    assert "had 3 right before training: nothing to forget here" in text


def test_lines_to_paste_are_of_the_least_memory_that_got_there():
    enough = recall((0.0, 2.0), (0.9, 2.5), (1.0, 3.0))
    made = result(full=[FULL], lora=[enough])
    assert chosen(made["tasks"]["knowledge"], made) == "lora"
    text = "\n".join(paste(made))
    assert 'LoraConfig(r=8, lora_alpha=32, target_modules="all-linear")' in text
    assert "    learning_rate=0.001,\n    max_steps=15,\n    per_device_train_batch_size=8,\n" in text
    assert paste(result(lora=[LORA])) == []


@pytest.mark.parametrize(
    "method", ["full", "full-masked", "lora", "lora-attention", "lora-mlp:4", "full→lora", "svf-full"]
)
def test_the_lines_to_paste_are_python(method):
    settings = Settings("bfloat16", "cpu", {"knowledge": (method,)}, loss="assistant")
    learnt = recall((0.0, 2.0), (0.6, 2.2), (1.0, 2.6))
    lines = "\n".join(paste(result(settings=settings, **{method: [learnt]})))
    ast.parse(lines)
    if method == "lora-attention":
        assert "target_modules=['q_proj']" in lines
    if method == "lora-mlp:4":
        assert "target_modules=['up_proj']" in lines
    if method == "full":
        assert "lowrank.optim.AdamW(model.parameters(), lr=0.001, weight_decay=0.0, master_weights=True)" in lines
    assert "assistant_only_loss=True" in lines


def test_a_seed_that_diverged_counts_as_not_reached():
    lost = recall((0.0, 2.0), (0.3, 2.5), (0.8, 3.0), seed=1)
    lost.validation = math.inf
    made = result(lora=[LORA, lost], full=[FULL, recall((0.0, 2.0), (0.6, 2.2), (1.0, 2.6), seed=1, memory=200)])
    lora = made["tasks"]["knowledge"]["methods"]["lora"]
    assert lora["seeds_diverged"] == [1]
    assert (lora["at_targets"][0]["reached"], lora["at_targets"][0]["of"]) == (1, 2)
    assert any("lora diverged at the picked rate with seed 1" in line for line in details(made))
    assert made["tasks"]["knowledge"]["leaders"]["learnt"][0] == "full"


def test_forgetting_less_is_said_only_beyond_the_noise():
    near = recall((0.0, 2.0), (0.6, 2.2), (1.0, 2.6001), memory=100)
    assert "forgot less" in " ".join(answer(result(full=[FULL], lora=[near])))
    wobble = torch.linspace(-1, 1, len(NOISE)).double()
    near.points[-1].measures["general"] = near.points[-1].measures["general"] + wobble
    assert "forgot less" not in " ".join(answer(result(full=[FULL], lora=[near])))


COSTS = {
    ("text", "full"): budget.Cost(2.0, 4.0, 8.0),
    ("text", "lora"): budget.Cost(1.0, 4.0, 8.0),
    ("knowledge", "full"): budget.Cost(1.0, 2.0, 8.0),
}


SETTINGS = Settings("float32", "cpu", model="a")
LENGTHS = [256, 128, 64]


def fitted(minutes, lengths=LENGTHS, **options):
    return budget.fitted(
        COSTS, {"text": 1, "knowledge": 5}, Settings("float32", "cpu", model="a", **options), lengths, minutes
    )


def test_a_budget_takes_the_best_that_fits():
    whole = fitted(1e6)
    assert (whole.length, whole.share, whole.rates) == (256, 1.0, 3)
    runs = 3 + budget.EXTENDED
    assert whole.seconds == pytest.approx(runs * (200 * 2 + 4 + 8 + 200 + 4 + 8 + 120 + 5 * 2 + 8))
    assert fitted(whole.seconds / 60) == whole
    for minutes in (40, 30, 20, 10, 5, 3):
        less = fitted(minutes)
        assert less.seconds <= 60 * minutes
        assert (less.length, less.share, less.rates) < (whole.length, whole.share, whole.rates)
    assert fitted(20, [256]).length == 256
    assert fitted(5).rates == 1


def test_what_is_ahead_counts():
    whole = fitted(1e6)
    late = budget.fitted(COSTS, {"text": 1, "knowledge": 5}, SETTINGS, LENGTHS, whole.seconds / 60, ahead=60.0)
    assert late.seconds <= whole.seconds
    assert late.share < 1
    with pytest.raises(ValueError, match="no method alone would fit"):
        budget.fitted(COSTS, {"text": 1, "knowledge": 5}, SETTINGS, LENGTHS, 10, ahead=600.0)


def test_a_budget_that_nothing_fits_names_what_would():
    with pytest.raises(
        ValueError, match=r"--minutes 0\.3: 6 steps of each method, .* minutes; --methods lora would fit"
    ):
        fitted(0.3)
    with pytest.raises(ValueError, match="no method alone would fit"):
        fitted(0.01)


def test_evaluations_take_a_quarter_of_the_work_at_most():
    for steps, step, evaluation in ((200, 2048, 8192), (40, 400, 9000), (6, 100, 10**6), (500, 512, 100)):
        points = budget.points(steps, step, evaluation)
        assert 1 <= points <= min(budget.MOST_POINTS, steps)
        assert points == 1 or points * evaluation <= (3 * steps * step + points * evaluation) / 4


def test_the_embedded_models_length_is_its_own():
    settings = Settings("float32", "cpu", embedded=Embedded())
    costs = {("text", "full"): budget.Cost(1.0, 1.0, 1.0)}
    assert budget.fitted(costs, {"text": 1}, settings, [128], 1).length == 128
