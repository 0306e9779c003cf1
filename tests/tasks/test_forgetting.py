"""What is lost: general text, items that were known, and the entropy of formats, on distributions that are known."""

import math
import random
import statistics

import pytest
import torch

from lowrank.tasks import forgetting
from lowrank.tasks.asking import continuations, question
from lowrank.tasks.forgetting import FORMATS, LEAST_KNOWN, Forgetting, entropy, format_of
from lowrank.tasks.material import ITEMS, OPEN

GENERAL = torch.arange(40).view(4, 10)


def item_rows(tokenizer, count: int) -> list[tuple[int, ...]]:
    """Rows of a model that has the first ``count`` items right and the others wrong."""
    rows = []
    for at, (prompt, *options) in enumerate(ITEMS):
        ids, ended = continuations(tokenizer, prompt, options)
        rows.append((*ids, *ended[0 if at < count else 1]))
    return rows


def test_items_are_sixty_and_no_option_begins_with_another():
    assert len({prompt for prompt, *_ in ITEMS}) == len(ITEMS) == 60
    for _, *options in ITEMS:
        assert len(options) == 4
        assert not any(a != b and b.startswith(a) for a in options for b in options)
        assert len(set(options)) == 4


def test_only_items_that_the_base_had_right_count(tokenizer, planted):
    lost = Forgetting(tokenizer, GENERAL, planted(item_rows(tokenizer, 50)), samples=0)
    assert lost.known == 50
    assert not lost.nothing_to_forget
    assert lost.measure(planted(item_rows(tokenizer, 60)))["items"].tolist() == [1.0] * 50
    kept = lost.measure(planted(item_rows(tokenizer, 30)))["items"]
    assert kept.dtype == torch.float64
    assert kept.tolist() == [1.0] * 30 + [0.0] * 20


@pytest.mark.parametrize("known", [LEAST_KNOWN - 1, LEAST_KNOWN])
def test_few_known_items_are_not_measured(tokenizer, planted, known):
    lost = Forgetting(tokenizer, GENERAL, planted(item_rows(tokenizer, known)), samples=0)
    assert lost.known == known
    assert lost.nothing_to_forget == (known < LEAST_KNOWN)
    assert ("items" in lost.measure(planted([]))) == (known >= LEAST_KNOWN)


def test_a_model_that_knows_nothing_has_nothing_to_forget(tokenizer, planted):
    assert Forgetting(tokenizer, GENERAL, planted([]), samples=0).nothing_to_forget


def test_general_loss_is_of_every_token_but_the_first(tokenizer, planted):
    lost = Forgetting(tokenizer, GENERAL, planted([]), samples=0)
    losses = lost.measure(planted([tuple(GENERAL[1].tolist())]))["general"]
    assert losses.dtype == torch.float64
    expected = [math.log(1000)] * 4
    expected[1] = 0.0
    assert losses.tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ('{"answer": "Paris"', "json"),
        ('```json\n{"a": 1', "json"),
        ("[1, 2", "json"),
        ("```python\nx = 1", "code"),
        ("Here it is:\n\n```python\nx = 1", "code"),
        ("def f(x):", "code"),
        ("- one\n- two", "list"),
        ("The planets are:\n\n1. Mercury", "list"),
        ("* one", "list"),
        ("# Trees\n", "heading"),
        ("**Trees**\n\nThey grow.", "heading"),
        ("What would you like to know?", "question"),
        ("  \n What else? I wonder.", "question"),
        ("Cats are small. Do you like them?", "plain"),
        ("I like 3 * 4 and a - b.", "plain"),
        ("A class of its own.", "plain"),
        ("", "plain"),
    ],
)
def test_formats(text, name):
    assert format_of(text) == name


def test_at_most_six_formats():
    assert len(FORMATS) <= 6


def drawn(chances, rounds: int, draw: random.Random) -> list[list[str]]:
    return [[draw.choices("abcd", weights)[0] for weights in chances] for _ in range(rounds)]


@pytest.mark.parametrize(
    ("chances", "most"),
    [
        ([(0.25, 0.25, 0.25, 0.25)] * 16, 2.0),  # at its largest the entropy is flat, and a jackknife's error too large
        ([(0.9, 0.06, 0.04, 0)] * 16, 1.2),
        ([(1, 0, 0, 0)] * 8 + [(0, 0.5, 0.5, 0)] * 4 + [(0, 0, 0.1, 0.9)] * 4, 1.2),
    ],
    ids=["even", "lopsided", "each prompt its own"],
)
def test_entropy_is_the_distributions_and_its_error_is_as_large_as_it_says(chances, most):
    draw, repeated = random.Random(0), 300
    true = [sum(own) / len(chances) for own in zip(*chances, strict=True)]
    nats = -sum(p * math.log(p) for p in true if p)
    estimates, errors = zip(*(entropy(drawn(chances, 16, draw)) for _ in range(repeated)), strict=True)
    spread = statistics.stdev(estimates)
    assert abs(statistics.mean(estimates) - nats) < 4 * spread / math.sqrt(repeated)
    assert 0.8 < math.sqrt(statistics.mean(error**2 for error in errors)) / spread < most


def test_one_format_alone_has_no_entropy_and_no_error():
    assert entropy([["a"] * 16] * 16) == (0.0, 0.0)
    nats, error = entropy([["a", "b"]] * 16)
    assert nats == pytest.approx(math.log(2))
    assert error == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize(("varied", "diverse"), [(0, False), (1, True)])
def test_variety_is_of_the_answers_to_all_prompts(tokenizer, planted, monkeypatch, varied, diverse):
    """Every third prompt is answered by a list, or none is."""
    monkeypatch.setattr(forgetting, "generate", sampled := Sampled(tokenizer, varied))
    lost = Forgetting(tokenizer, GENERAL, planted([]), samples=256)
    assert sampled.temperature == 1.0
    assert len(sampled.prompts) == 256
    assert {sampled.prompts.count(prompt) for prompt in sampled.prompts} == {256 // len(OPEN)}
    assert lost.diverse == diverse
    share = 6 / 16 * varied
    expected = -share * math.log(share) - (1 - share) * math.log(1 - share) if varied else 0.0
    assert lost.before == pytest.approx((expected, 0.0), abs=1e-9)
    assert lost.diversity(planted([]), 3) == lost.before
    assert sampled.seed == 3


class Sampled:
    def __init__(self, tokenizer, varied: int):
        self.answers = [tokenizer.encode(text) for text in ("It is so.", "- one" if varied else "It is not so.")]
        self.known = [question(tokenizer, text) for text in OPEN]

    def __call__(self, model, prompts, new_tokens, *, temperature, seed, **options):
        self.prompts, self.temperature, self.seed = prompts, temperature, seed
        return [self.answers[self.known.index(prompt) % 3 == 0] for prompt in prompts]


def test_a_seed_draws_the_same_answers_and_leaves_torchs_generator(tokenizer, llama):
    lost = Forgetting(tokenizer, GENERAL, llama, samples=32, new_tokens=4)
    state = torch.random.get_rng_state()
    assert lost.diversity(llama, 3) == lost.diversity(llama, 3)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert lost.before == lost.diversity(llama, 0)
    assert llama.training
