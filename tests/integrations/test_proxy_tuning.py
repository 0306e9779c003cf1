"""Proxy-tuning in generate() against its formula: three models, no cache, no padding, token by token."""

import warnings

import pytest
import torch

transformers = pytest.importorskip("transformers")
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    MistralConfig,
    MistralForCausalLM,
)

import lowrank
from lowrank.integrations.transformers import ProxyTuning

VOCABULARY, PAD, EOS = 60, 0, 1
STEPS = 10


def llama(seed, hidden, vocabulary=VOCABULARY, **options):
    torch.manual_seed(seed)
    sizes = dict(hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=2, num_attention_heads=2)
    tokens = dict(vocab_size=vocabulary, pad_token_id=PAD, eos_token_id=EOS, bos_token_id=2)
    return LlamaForCausalLM(LlamaConfig(**sizes, **tokens, initializer_range=0.3, **options)).eval()


def gpt2(seed, hidden):
    torch.manual_seed(seed)
    tokens = dict(vocab_size=VOCABULARY, pad_token_id=PAD, eos_token_id=EOS, bos_token_id=2)
    sizes = dict(n_embd=hidden, n_layer=2, n_head=2, n_positions=64)
    return GPT2LMHeadModel(GPT2Config(**sizes, **tokens, initializer_range=0.3)).eval()


@pytest.fixture(scope="module")
def models():
    return llama(1, 48), llama(2, 16), llama(3, 16)


@pytest.fixture(scope="module")
def prompts():
    """Of three lengths, left-padded, and their mask."""
    torch.manual_seed(4)
    lengths = (7, 3, 5)
    ids = torch.full((3, 7), PAD)
    mask = torch.zeros(3, 7, dtype=torch.long)
    for i, n in enumerate(lengths):
        ids[i, 7 - n :], mask[i, 7 - n :] = torch.randint(3, VOCABULARY, (n,)), 1
    return ids, mask


@torch.no_grad()
def formula(models, ids, alpha=1.0):
    """[V]: the steered logits after the tokens ids [L]."""
    base, expert, antiexpert = (m(input_ids=ids[None], use_cache=False).logits[0, -1].double() for m in models)
    V = len(base)
    return base + alpha * (expert[:V] - antiexpert[:V])


def by_hand(models, prompts, alphas=(1.0,) * 3, choose=torch.argmax, steps=STEPS):
    """int64 [B, steps]; each row alone; a finished row is padded."""
    ids, mask = prompts
    rows = [i[m.bool()] for i, m in zip(ids, mask, strict=True)]
    texts = [[] for _ in rows]
    for _ in range(steps):
        logits = torch.stack([formula(models, r, a) for r, a in zip(rows, alphas, strict=True)])
        tokens = logits.argmax(-1) if choose is torch.argmax else choose(logits)
        for i, token in enumerate(tokens):
            token = torch.tensor(PAD) if EOS in texts[i] else token
            texts[i].append(int(token))
            rows[i] = torch.cat([rows[i], token[None]])
        if all(EOS in row for row in texts):
            break
    return torch.tensor(texts)


def new_tokens(out, prompts):
    return out[:, prompts[0].shape[1] :]


def alone(prompts, i):
    ids, mask = prompts
    return ids[i : i + 1, mask[i].bool()], torch.ones(1, int(mask[i].sum()), dtype=torch.long)


def test_greedy_is_the_formula_and_steers(models, prompts):
    ids, mask = prompts
    base, expert, antiexpert = models
    options = dict(input_ids=ids, attention_mask=mask, max_new_tokens=STEPS, do_sample=False)
    out = base.generate(**options, logits_processor=[ProxyTuning(expert, antiexpert, attention_mask=mask)])
    assert torch.equal(new_tokens(out, prompts), by_hand(models, prompts))
    assert torch.equal(out, ProxyTuning(expert, antiexpert).generate(base, **options))
    assert not torch.equal(out, base.generate(**options))
    none = ProxyTuning(expert, antiexpert, 0.0).generate(base, **options)
    assert torch.equal(none, base.generate(**options))
    other = ProxyTuning(expert, antiexpert, -1.0).generate(base, **options)
    assert torch.equal(new_tokens(other, prompts), by_hand(models, prompts, (-1.0,) * 3))


def mistral(seed, hidden):
    torch.manual_seed(seed)
    tokens = dict(vocab_size=VOCABULARY, pad_token_id=PAD, eos_token_id=EOS, bos_token_id=2)
    sizes = dict(hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=2)
    heads = dict(num_attention_heads=2, num_key_value_heads=1, sliding_window=4)
    return MistralForCausalLM(MistralConfig(**sizes, **heads, **tokens, initializer_range=0.3)).eval()


@pytest.mark.parametrize("family", [gpt2, mistral])
def test_absolute_positions_and_sliding_windows_too(family, prompts):
    models = family(1, 32), family(2, 16), family(3, 16)
    out = ProxyTuning(*models[1:]).generate(
        models[0], input_ids=prompts[0], attention_mask=prompts[1], max_new_tokens=STEPS, do_sample=False
    )
    assert torch.equal(new_tokens(out, prompts), by_hand(models, prompts))


def test_a_batch_is_its_rows_alone(models, prompts):
    proxy = ProxyTuning(*models[1:])
    together = proxy.generate(models[0], input_ids=prompts[0], attention_mask=prompts[1], max_new_tokens=STEPS)
    for i in range(3):
        row = alone(prompts, i)
        actual = new_tokens(proxy.generate(models[0], input_ids=row[0], max_new_tokens=STEPS), row)[0]
        expected = new_tokens(together, prompts)[i]
        assert torch.equal(actual, expected[: len(actual)])
        assert (expected[len(actual) :] == PAD).all()


def test_sampling_is_the_formula(models, prompts):
    def sample(logits):
        return torch.multinomial((logits.float() / 1.3).softmax(-1), 1)[:, 0]

    options = dict(do_sample=True, temperature=1.3, top_k=0, max_new_tokens=STEPS)
    seen = set()
    for seed in range(4):
        torch.manual_seed(seed)
        out = ProxyTuning(*models[1:]).generate(models[0], input_ids=prompts[0], attention_mask=prompts[1], **options)
        torch.manual_seed(seed)
        assert torch.equal(new_tokens(out, prompts), by_hand(models, prompts, choose=sample))
        seen.add(tuple(out.flatten().tolist()))
    assert len(seen) == 4


def test_scores_are_log_probabilities_of_the_formula(models, prompts):
    row = alone(prompts, 0)
    out = models[0].generate(
        row[0],
        max_new_tokens=3,
        do_sample=False,
        logits_processor=[ProxyTuning(*models[1:], 0.7)],
        output_scores=True,
        return_dict_in_generate=True,
    )
    for step, scores in enumerate(out.scores):
        expected = formula(models, out.sequences[0, : 7 + step], 0.7).log_softmax(-1)
        torch.testing.assert_close(scores[0].double(), expected, rtol=0, atol=1e-4)


def test_alpha_per_prompt_and_changed_on_the_way(models, prompts):
    proxy = ProxyTuning(*models[1:], torch.tensor([0.0, 0.5, 2.0]))
    options = dict(input_ids=prompts[0], attention_mask=prompts[1], max_new_tokens=STEPS, do_sample=False)
    out = proxy.generate(models[0], **options)
    assert torch.equal(new_tokens(out, prompts), by_hand(models, prompts, (0.0, 0.5, 2.0)))
    proxy.alpha = 0.5
    assert torch.equal(new_tokens(proxy.generate(models[0], **options), prompts), by_hand(models, prompts, (0.5,) * 3))


class Reads:
    """Tokens per row that each call of a model was fed."""

    def __init__(self, *models):
        self.lengths = [[] for _ in models]
        self.hooks = [
            m.register_forward_pre_hook(
                lambda _, __, inputs, fed=fed: fed.append(inputs["input_ids"].shape[1]), with_kwargs=True
            )
            for m, fed in zip(models, self.lengths, strict=True)
        ]

    def __enter__(self):
        return self.lengths

    def __exit__(self, *exc):
        for hook in self.hooks:
            hook.remove()


def test_the_prompt_is_read_once_then_one_token_a_step(models, prompts):
    proxy = ProxyTuning(*models[1:])
    options = dict(attention_mask=prompts[1], max_new_tokens=6, min_new_tokens=6)
    with Reads(*models[1:]) as fed:
        for num_beams in (1, 3):
            proxy.generate(models[0], input_ids=prompts[0], num_beams=num_beams, **options)
    assert fed == [2 * [7, 1, 1, 1, 1, 1]] * 2


class Uncached(LogitsProcessor):
    """The formula as a processor of log-probabilities that keeps nothing; padding is recognised by its token."""

    def __init__(self, models, alpha=1.0):
        self.models, self.alpha = models, alpha

    def __call__(self, input_ids, scores):
        rows = [row[row.ne(PAD).int().argmax() :] for row in input_ids]
        logits = torch.stack([formula(self.models, row, self.alpha) for row in rows])
        return logits.log_softmax(-1).float().masked_fill(scores == -float("inf"), -float("inf"))


@pytest.mark.parametrize("do_sample", [False, True])
def test_beams(models, prompts, do_sample, monkeypatch):
    reordered = []
    reorder = transformers.DynamicCache.reorder_cache
    monkeypatch.setattr(
        transformers.DynamicCache, "reorder_cache", lambda cache, rows: (reordered.append(rows), reorder(cache, rows))
    )
    options = dict(input_ids=prompts[0], attention_mask=prompts[1], num_beams=4, max_new_tokens=STEPS)
    options |= dict(do_sample=do_sample, return_dict_in_generate=True, output_scores=True, num_return_sequences=2)
    torch.manual_seed(0)
    expected = models[0].generate(**options, logits_processor=[Uncached(models)])
    in_base = len(reordered)
    torch.manual_seed(0)
    actual = ProxyTuning(*models[1:]).generate(models[0], **options)
    assert len(reordered) > 2 * in_base  # the small models' caches too
    assert torch.equal(actual.sequences, expected.sequences)
    torch.testing.assert_close(actual.sequences_scores, expected.sequences_scores, rtol=0, atol=1e-4)


def test_beams_score_whole_sequences(models, prompts):
    """Log-probabilities of the steered distribution, over which beam search adds up."""
    row = alone(prompts, 0)
    options = dict(num_beams=3, max_new_tokens=5, return_dict_in_generate=True, output_scores=True, length_penalty=0.0)
    out = models[0].generate(row[0], logits_processor=[ProxyTuning(*models[1:])], **options)
    ids, total = out.sequences[0], 0
    for at in range(7, len(ids)):
        total += formula(models, ids[:at]).log_softmax(-1)[ids[at]]
    torch.testing.assert_close(out.sequences_scores[0].double(), total, rtol=0, atol=1e-4)


def test_several_samples_of_each_prompt(models, prompts):
    proxy = ProxyTuning(*models[1:], torch.tensor([0.0, 1.0, 2.0]))
    options = dict(input_ids=prompts[0], attention_mask=prompts[1], max_new_tokens=STEPS, num_return_sequences=2)
    out = proxy.generate(models[0], do_sample=True, top_k=1, **options)
    expected = by_hand(models, prompts, (0.0, 1.0, 2.0)).repeat_interleave(2, 0)
    assert torch.equal(new_tokens(out, prompts), expected)


def test_another_prompt_starts_anew(models, prompts):
    ids = prompts[0][:, 4:]
    ids = torch.where(ids == PAD, 9, ids)
    proxy = ProxyTuning(*models[1:])
    options = dict(max_new_tokens=STEPS, do_sample=False)
    # the same length, one longer by a token than what was read last, the same again, another number of rows
    first = models[0].generate(ids, logits_processor=[proxy], **options)
    one_longer = torch.cat([first.roll(1, 0), torch.full((3, 1), 5)], 1)[:, : first.shape[1]]
    for prompt in (ids.flip(0), one_longer, ids, ids, ids[:1], ids[1:, 1:]):
        out = models[0].generate(prompt, logits_processor=[proxy], **options)
        assert torch.equal(
            new_tokens(out, (prompt,)), by_hand(models, (prompt, torch.ones_like(prompt)), (1.0,) * len(prompt))
        )


def test_going_on_after_the_last_output(models, prompts):
    row = alone(prompts, 0)[0]
    proxy = ProxyTuning(*models[1:])
    short = models[0].generate(row, logits_processor=[proxy], max_new_tokens=4, min_new_tokens=4)
    with Reads(*models[1:]) as fed:
        out = models[0].generate(short, logits_processor=[proxy], max_new_tokens=4, min_new_tokens=4)
    assert fed == [[1] * 4] * 2
    whole = ProxyTuning(*models[1:]).generate(models[0], input_ids=row, max_new_tokens=8, min_new_tokens=8)
    assert torch.equal(out, whole)


def test_a_mask_is_for_one_prompt(models, prompts):
    ids, mask = prompts
    proxy = ProxyTuning(*models[1:], attention_mask=mask)
    options = dict(attention_mask=mask, max_new_tokens=3, logits_processor=[proxy])
    first = models[0].generate(ids, **options)
    assert torch.equal(first, models[0].generate(ids, **options))  # the same prompt again
    with pytest.raises(ValueError, match="attention_mask: is an earlier prompt's; call prepare"):
        models[0].generate(ids.flip(0), **{**options, "attention_mask": mask.flip(0)})
    longer = torch.cat([first, ids[:, -3:]], 1)
    with pytest.raises(ValueError, match="attention_mask: is an earlier prompt's"):
        models[0].generate(longer, **{**options, "attention_mask": extended(mask, longer)})
    proxy.prepare(mask.flip(0))
    out = models[0].generate(ids.flip(0), **{**options, "attention_mask": mask.flip(0)})
    assert torch.equal(out, first.flip(0))


def test_padding_without_a_mask_is_refused(models, prompts):
    ids, mask = prompts
    for fed in (ids, torch.where(ids == PAD, EOS, ids)):
        with pytest.raises(ValueError, match="attention_mask: the prompt seems to be padded"):
            models[0].generate(fed, attention_mask=mask, max_new_tokens=3, logits_processor=[ProxyTuning(*models[1:])])
    whole = torch.cat([torch.full((3, 1), EOS), ids[:, -3:]], 1)  # ones say that nothing is padding
    out = ProxyTuning(*models[1:]).generate(
        models[0], input_ids=whole, attention_mask=torch.ones_like(whole), max_new_tokens=STEPS, do_sample=False
    )
    assert torch.equal(new_tokens(out, (whole,)), by_hand(models, (whole, torch.ones_like(whole))))


def test_assisted_generation_is_right_and_warns(models):
    torch.manual_seed(5)
    prompt = torch.randint(3, 9, (1, 4)).repeat(1, 3)  # repeats itself, so that lookup proposes
    expected = by_hand(models, (prompt, torch.ones_like(prompt)), (1.0,))
    options = dict(max_new_tokens=STEPS, do_sample=False)
    for assisted in (dict(prompt_lookup_num_tokens=3), dict(assistant_model=llama(6, 16))):
        proxy = ProxyTuning(*models[1:])
        with pytest.warns(UserWarning, match="went back to earlier tokens") as caught:
            out = proxy.generate(models[0], input_ids=prompt, **assisted, **options)
        assert torch.equal(new_tokens(out, (prompt,)), expected)
        assert sum("went back" in str(w.message) for w in caught) == 1


def test_no_warning_in_ordinary_use(models, prompts):
    options = dict(input_ids=prompts[0], attention_mask=prompts[1], max_new_tokens=STEPS)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="proxy-tuning")
        proxy = ProxyTuning(*models[1:])
        for num_beams in (1, 2, 1):
            proxy.generate(models[0], num_beams=num_beams, **options)
        for _ in range(2):
            models[0].generate(**options, logits_processor=[proxy])


def test_other_processors_come_before_and_after(models, prompts):
    ids, mask = prompts
    banned = by_hand(models, prompts)[:, 0].tolist()
    proxy = ProxyTuning(*models[1:])
    options = dict(input_ids=ids, attention_mask=mask, max_new_tokens=STEPS, do_sample=False)
    out = proxy.generate(models[0], **options, bad_words_ids=[[token] for token in banned], min_new_tokens=STEPS)
    assert out.shape[1] == 7 + STEPS
    assert not torch.isin(new_tokens(out, prompts), torch.tensor([*banned, EOS])).any()


def test_vocabularies_padded_differently(prompts):
    models = llama(1, 48, 60), llama(2, 16, 64), llama(3, 16, 72)
    options = dict(input_ids=prompts[0], attention_mask=prompts[1], max_new_tokens=STEPS, do_sample=False)
    out = ProxyTuning(*models[1:]).generate(models[0], **options)
    assert torch.equal(new_tokens(out, prompts), by_hand(models, prompts))


def test_tokens_that_the_small_models_lack_keep_their_place():
    """A constant in one model's logits changes nothing, not even beside tokens that only the large one has."""
    base, expert, antiexpert = llama(1, 48, 64), llama(2, 16, 60), llama(3, 16, 60)
    ids = torch.randint(3, 60, (2, 5))

    def scores(offset):
        hook = expert.lm_head.register_forward_hook(lambda _, __, out: out + offset)
        with torch.no_grad():
            steered = ProxyTuning(expert, antiexpert)(ids, base(input_ids=ids).logits[:, -1])
        hook.remove()
        return steered

    torch.testing.assert_close(scores(0.0), scores(5.0), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["peft", "svf"])
def test_from_adapter_is_two_models_for_one(models, prompts, kind):
    plain, small = llama(3, 16), llama(3, 16)
    if kind == "peft":
        peft = pytest.importorskip("peft")
        small = peft.get_peft_model(small, peft.LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1)).eval()
    else:
        small = lowrank.adapt(small, lowrank.SVFConfig(k=4)).eval()
    torch.manual_seed(6)
    with torch.no_grad():
        for parameter in small.parameters():
            if parameter.requires_grad:
                parameter += 0.5 * torch.randn_like(parameter)
    options = dict(input_ids=prompts[0], attention_mask=prompts[1], max_new_tokens=STEPS, do_sample=False)
    actual = ProxyTuning.from_adapter(small).generate(models[0], **options)
    assert torch.equal(actual, ProxyTuning(small, plain).generate(models[0], **options))
    assert torch.equal(new_tokens(actual, prompts), by_hand((models[0], small, plain), prompts))
    assert not torch.equal(actual, models[0].generate(**options))
    beams = ProxyTuning.from_adapter(small).generate(models[0], num_beams=3, **options)
    assert torch.equal(
        beams, models[0].generate(num_beams=3, logits_processor=[Uncached((models[0], small, plain))], **options)
    )


def extended(mask, ids):
    return torch.cat([mask, mask.new_ones(len(mask), ids.shape[1] - mask.shape[1])], 1)


def test_beams_of_one_text_under_two_masks(models):
    """A row takes the cache of a row with its text and its mask."""
    ids, mask = torch.tensor([[5, 6, 7]] * 4), torch.tensor([[0, 1, 1], [1, 1, 1]])
    proxy, scores = ProxyTuning(*models[1:], attention_mask=mask), torch.zeros(4, VOCABULARY)
    proxy(ids, scores)
    ids = torch.cat([ids, torch.tensor([[8], [9], [8], [9]])], 1)
    proxy(ids, scores)
    ids = torch.cat([ids[[1, 0, 3, 2]], torch.tensor([[10], [11], [12], [13]])], 1)
    with Reads(*models[1:]) as fed:
        actual = proxy(ids, scores)
    assert fed == [[1], [1]]
    mask = extended(mask.repeat_interleave(2, 0), ids)
    expected = ProxyTuning(*models[1:], attention_mask=mask)(ids, scores)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("steps", [0, 1])
def test_a_failed_call_leaves_no_half_read_cache(models, prompts, steps):
    ids, mask = prompts
    scores, proxy = torch.zeros(3, VOCABULARY), ProxyTuning(*models[1:], attention_mask=mask)
    for token in range(5, 5 + steps):
        proxy(ids, scores)
        ids = torch.cat([ids, torch.full((3, 1), token)], 1)
    hook = models[2].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        proxy(ids, scores)
    hook.remove()
    expected = ProxyTuning(*models[1:], attention_mask=extended(mask, ids))(ids, scores)
    torch.testing.assert_close(proxy(ids, scores), expected, rtol=0, atol=1e-4)


def test_refuses(models, prompts):
    base, expert, antiexpert = models
    ids, mask = prompts
    with pytest.raises(TypeError, match="expert: expected a causal language model of transformers, got str"):
        ProxyTuning("expert", antiexpert)
    with pytest.raises(TypeError, match=r"antiexpert: .*got Linear"):
        ProxyTuning(expert, torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="alpha: expected a finite number, got nan"):
        ProxyTuning(expert, antiexpert, float("nan"))
    with pytest.raises(TypeError, match="model: expected a model with an adapter to disable, got LlamaForCausalLM"):
        ProxyTuning.from_adapter(expert)
    with pytest.raises(ValueError, match=r"attention_mask: expected a tensor \[B, L\], got list"):
        ProxyTuning(expert, antiexpert, attention_mask=[[1]])
    for wrong in (mask.flip(1), torch.zeros_like(mask)):
        with pytest.raises(ValueError, match="attention_mask: expected padding on the left alone"):
            ProxyTuning(expert, antiexpert, attention_mask=wrong)
    for wrong, message in (
        (mask[:, 1:], "expected the prompt's"),
        (mask[:2], "expected a row per prompt, got 2 for 3"),
    ):
        with pytest.raises(ValueError, match=f"attention_mask: {message}"):
            ProxyTuning(expert, antiexpert, attention_mask=wrong)(ids, torch.zeros(3, VOCABULARY))
    with pytest.raises(ValueError, match="alpha: expected a row per prompt, got 2 for 3"):
        ProxyTuning(expert, antiexpert, torch.ones(2), mask)(ids, torch.zeros(3, VOCABULARY))
    embeds = base.get_input_embeddings()(ids)
    with pytest.raises(ValueError, match=r"input_ids: .*inputs_embeds"):
        base.generate(inputs_embeds=embeds, logits_processor=[ProxyTuning(expert, antiexpert)], max_new_tokens=2)
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    )
    with pytest.raises(ValueError, match="expert: expected a decoder, got the encoder-decoder model T5"):
        ProxyTuning(t5, antiexpert)
    no_cache = llama(2, 16)
    no_cache.forward = lambda input_ids, **_: transformers.modeling_outputs.CausalLMOutputWithPast(
        logits=torch.zeros(*input_ids.shape, VOCABULARY)
    )
    with pytest.raises(ValueError, match="expert: LlamaForCausalLM gave back no cache"):
        ProxyTuning(no_cache, antiexpert, attention_mask=mask)(ids, torch.zeros(3, VOCABULARY))


def test_refuses_virtual_tokens():
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(ValueError, match=r"expert: 'default' \(PromptTuningConfig\) adds virtual tokens"):
        ProxyTuning.from_adapter(peft.get_peft_model(llama(1, 16), config))
