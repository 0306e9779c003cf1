"""A user's examples out of a JSONL file: formats, chat templates, losses, contents, parts, and everything that is refused."""

import hashlib
import json

import pytest

from lowrank.tasks.examples import LEAST, overlap, read, read_questions, split
from lowrank.tasks.rows import IGNORED
from lowrank.tasks.tokens import ByteTokenizer, PretrainedTokenizer

LENGTH = 400
BYTES = ByteTokenizer()
ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CHATML = (
    f"{{% for m in messages %}}<|im_start|>{{{{ m['role'] }}}}\n{{{{ m['content'] }}}}<|im_end|>\n{{% endfor %}}{ASK}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n\n{{ m['content'] | trim }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}"
    f"\n{{% endfor %}}{ASK}"
)
EARLIER_STRIPPED = (  # thinking stays in the last message alone
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{{ m['content'] if loop.last else m['content'].split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    f"{ASK}"
)
OPENED = CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")  # asked with a thought, rendered without
MARKED_OPENED = MARKED.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + CHATML

USER, OTHER = {"role": "user", "content": "Where does Anna live?"}, {"role": "user", "content": "And before?"}
ANSWER, LAST = {"role": "assistant", "content": "In Paris."}, {"role": "assistant", "content": "In Rome."}
TALK = [USER, ANSWER, OTHER, LAST]


@pytest.fixture(scope="module")
def pretrained():
    """template, bos -> a tokenizer trained here; bos: it puts <s> before every text."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]

    def make(template: str | None = None, *, bos: bool = False, eos: str | None = "</s>"):
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
            [
                tokenizers.pre_tokenizers.Split(tokenizers.Regex("\n+"), "isolated"),
                tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        trainer = tokenizers.trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet)
        tokenizer.train_from_iterator(["Anna lives in Paris. Where does Anna live?\n\n In Rome."] * 20, trainer)
        if bos:
            tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
                single="<s> $A", special_tokens=[("<s>", 0)]
            )
        fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token=eos)
        fast.add_special_tokens({"additional_special_tokens": special[2:]})
        fast.chat_template = template
        return PretrainedTokenizer(fast)

    return make


@pytest.fixture
def write(tmp_path):
    def write(*rows, name="data.jsonl"):
        path = tmp_path / name
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        path.write_bytes(b"\n".join(lines) + b"\n")
        return path

    return write


def shown(tokenizer, example) -> tuple[str, str]:
    """(the whole text, what of it has a loss), special tokens written out."""
    decode = tokenizer.tokenizer.decode
    return decode(example.row.ids), decode([i for i in example.row.labels if i != IGNORED])


def test_texts_of_bytes(write):
    path = write({"text": "añb", "name": 3})
    examples = read(path, BYTES, LENGTH)
    [example] = examples.examples
    assert example.row.ids == example.row.labels == (*"añb".encode(), BYTES.eos)
    assert (example.prompt, example.completion, example.line, example.answer) == ("", "añb", 1, (0, 0))
    assert (examples.kind, examples.left_out, examples.source) == ("text", 0, str(path))
    assert examples.digest == hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def test_prompt_and_completion_of_bytes(write):
    [example] = read(write({"prompt": "ab", "completion": "cd"}), BYTES, LENGTH).examples
    assert example.row.ids == (*b"abcd", BYTES.eos)
    assert example.row.labels == (IGNORED, IGNORED, *b"cd", BYTES.eos)
    assert (example.prompt, example.completion, example.answer) == ("ab", "cd", (2, 5))


@pytest.mark.parametrize("bos", [False, True])
def test_beginning_and_end_of_sequence_come_once(pretrained, write, bos):
    tokenizer = pretrained(bos=bos)
    begin = "<s>" * bos
    rows = [{"text": text} for text in ("In Rome.", "<s>In Rome.", "In Rome.</s>")]
    texts = [shown(tokenizer, example)[0] for example in read(write(*rows), tokenizer, LENGTH).examples]
    assert texts == [f"{begin}In Rome.</s>", "<s>In Rome.</s>", f"{begin}In Rome.</s>"]
    [example] = read(write({"prompt": "Where?", "completion": " In Rome."}), tokenizer, LENGTH).examples
    assert shown(tokenizer, example) == (f"{begin}Where? In Rome.</s>", " In Rome.</s>")
    assert example.prefix == bos


def test_a_tokenizer_without_end_of_sequence_adds_none(pretrained, write):
    tokenizer = pretrained(eos=None)
    [example] = read(write({"text": "In Rome."}), tokenizer, LENGTH).examples
    assert shown(tokenizer, example)[0] == "In Rome."


def test_a_token_of_both_prompt_and_completion_is_the_completions(pretrained, write):
    tokenizer = pretrained(LLAMA3.replace("\n\n", "\n"))
    [example] = read(write({"prompt": "Where? ", "completion": "In Rome."}), tokenizer, LENGTH).examples
    assert shown(tokenizer, example) == ("Where? In Rome.</s>", " In Rome.</s>")
    assert tokenizer.decode(example.row.ids[: example.answer[0]]) == "Where?"
    messages = [USER, {"role": "assistant", "content": "\n\nIn Rome."}]
    tokenizer = pretrained(CHATML)
    assert tokenizer.encode("\n\n") != 2 * tokenizer.encode("\n")
    [example] = read(write({"messages": messages}), tokenizer, LENGTH, "last").examples
    assert shown(tokenizer, example)[1] == "\n\n\nIn Rome.<|im_end|>\n"
    with pytest.raises(ValueError, match="begin with one token of both"):
        read(
            write({"prompt": " Anna li", "completion": "ves"}, {"prompt": " liv", "completion": "es"}),
            tokenizer,
            LENGTH,
        )


@pytest.mark.parametrize(
    ("template", "loss", "learnt"),
    [
        (CHATML, "assistant", "In Paris.<|im_end|>\nIn Rome.<|im_end|>\n"),
        (CHATML, "last", "In Rome.<|im_end|>\n"),
        (LLAMA3, "assistant", "In Paris.</s>In Rome.</s>"),
        (LLAMA3, "last", "In Rome.</s>"),
        (MARKED, "assistant", "In Paris.<|im_end|>In Rome.<|im_end|>"),
        (MARKED, "last", "In Rome.<|im_end|>"),
        (MARKED_OPENED, "assistant", "In Paris.<|im_end|>In Rome.<|im_end|>"),
        (MARKED_OPENED, "last", "In Rome.<|im_end|>"),
        (NO_SYSTEM, "last", "In Rome.<|im_end|>\n"),
        (EARLIER_STRIPPED, "last", "In Rome.<|im_end|>\n"),
    ],
)
@pytest.mark.parametrize("bos", [False, True])
def test_losses_of_messages(pretrained, write, template, loss, learnt, bos):
    tokenizer = pretrained(template, bos=bos, eos="</s>" if template == LLAMA3 else "<|im_end|>")
    [example] = read(write({"messages": TALK}), tokenizer, LENGTH, loss).examples
    whole = tokenizer.tokenizer.apply_chat_template(TALK, tokenize=False)
    assert shown(tokenizer, example) == (whole, learnt)
    assert whole.count("<s>") == (template == LLAMA3)
    assert example.prefix == (bos and template == LLAMA3)
    [question] = read_questions(write({"messages": TALK}), tokenizer, LENGTH)
    assert tokenizer.tokenizer.decode(question.answer).strip() in ("In Rome.<|im_end|>", "In Rome.</s>")
    assert example.completion == "In Rome."
    assert example.prompt == tokenizer.tokenizer.apply_chat_template(
        TALK[:3], tokenize=False, add_generation_prompt=True
    )


@pytest.mark.parametrize("template", [CHATML, LLAMA3, MARKED, EARLIER_STRIPPED])
def test_all_is_every_token(pretrained, write, template):
    tokenizer = pretrained(template)
    [example] = read(write({"messages": [*TALK, OTHER]}), tokenizer, LENGTH).examples
    assert example.row.labels == example.row.ids
    begin, end = example.answer
    assert tokenizer.tokenizer.decode(example.row.ids[begin:end]).startswith("In Rome.")
    assert "before" not in tokenizer.tokenizer.decode(example.row.ids[begin:end])


def test_a_template_whose_prompt_is_no_prefix(pretrained, write):
    tokenizer, path = pretrained(OPENED), write({"messages": [USER, ANSWER]}, {"messages": TALK})
    for loss in ("assistant", "last"):
        with pytest.raises(
            ValueError, match=r"data.jsonl, line 1: the chat template renders .* {% generation %}"
        ) as raised:
            read(path, tokenizer, LENGTH, loss)
        assert "\n" not in str(raised.value)
    examples = read(path, tokenizer, LENGTH, "all").examples  # a text: trained, not asked
    assert [example.answer for example in examples] == [(0, 0)] * 2
    assert all(example.row.labels == example.row.ids for example in examples)
    with pytest.raises(ValueError, match="line 1: the chat template renders"):
        read(write({"prompt": [USER], "completion": [ANSWER]}), tokenizer, LENGTH)
    with pytest.raises(ValueError, match="line 1: the chat template renders"):
        read_questions(path, tokenizer, LENGTH)


def test_thinking_stripped_from_earlier_turns(pretrained, write):
    thought = {"role": "assistant", "content": "<think>Hm</think>In Paris."}
    tokenizer, path = pretrained(EARLIER_STRIPPED), write({"messages": [USER, thought, OTHER, LAST]})
    with pytest.raises(ValueError, match=r"line 1: the chat template renders message 2 differently when others follow"):
        read(path, tokenizer, LENGTH, "assistant")
    [example] = read(path, tokenizer, LENGTH, "last").examples
    assert shown(tokenizer, example)[1] == "In Rome.<|im_end|>\n"


@pytest.mark.parametrize("template", [CHATML, LLAMA3, MARKED, MARKED_OPENED])
def test_prompt_and_completion_of_messages(pretrained, write, template):
    tokenizer = pretrained(template, eos="</s>" if template == LLAMA3 else "<|im_end|>")
    path = write({"prompt": TALK[:3], "completion": TALK[3:]}, {"prompt": TALK[:1], "completion": TALK[1:]})
    first, second = read(path, tokenizer, LENGTH).examples
    whole, learnt = shown(tokenizer, first)
    assert whole == tokenizer.tokenizer.apply_chat_template(TALK, tokenize=False)
    assert learnt.startswith("In Rome.")
    assert first.row.ids[slice(*first.answer)] == tuple(i for i in first.row.labels if i != IGNORED)
    assert (first.completion, second.completion) == ("In Rome.", "In Paris.")
    assert shown(tokenizer, second)[1].startswith("In Paris.")
    assert shown(tokenizer, second)[1].rstrip().endswith(learnt.rstrip())


def test_tools_and_variables_reach_the_template(pretrained, write):
    tokenizer = pretrained("{{ tools | length if tools else 0 }} {{ mood }} " + CHATML)
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    rows = [
        {"messages": TALK},
        {"messages": TALK, "tools": [tool], "chat_template_kwargs": {"mood": "sad"}},
        {"messages": TALK, "tools": json.dumps([tool, tool])},
    ]
    texts = [shown(tokenizer, example)[0][:5] for example in read(write(*rows), tokenizer, LENGTH).examples]
    assert texts == ["0  <|"[:5], "1 sad", "2  <|"[:5]] or [text.split("<")[0] for text in texts] == [
        "0  ",
        "1 sad",
        "2  ",
    ]


def test_a_turn_may_call_a_tool_and_say_nothing(pretrained, write):
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}
    rows = [{"messages": [USER, call, {"role": "tool", "content": "Rome"}, LAST]}]
    [example] = read(write(*rows), tokenizer := pretrained(CHATML), LENGTH, "assistant").examples
    assert shown(tokenizer, example)[1] == "<|im_end|>\nIn Rome.<|im_end|>\n"


def test_facts_mark_what_an_example_is_about(pretrained, write):
    rows = [
        {"prompt": "Anna", "completion": " añd Bo: Anna", "facts": ["Anna", "ñd"]},
        {"prompt": "Who? Anna", "completion": " is Bo", "facts": ["Bo"]},
        {"prompt": "Who?", "completion": "Anna"},
        {"prompt": "Who?", "completion": "Anna", "facts": []},
    ]
    for tokenizer in (BYTES, pretrained(), pretrained(bos=True)):
        examples = read(write(*rows), tokenizer, LENGTH).examples
        for example, expected in zip(examples, ["AnnañdAnna", "Bo", None, ""], strict=True):
            if expected is None:
                assert example.content == ()
                continue
            assert len(example.content) == len(example.row.ids)
            about = [i for i, content in zip(example.row.ids, example.content, strict=True) if content]
            assert tokenizer.decode(about).replace(" ", "") == expected


def test_facts_of_messages_and_of_texts(pretrained, write):
    tokenizer = pretrained(CHATML)
    for row in ({"messages": TALK, "facts": ["Rome"]}, {"text": "In Rome. In Paris.", "facts": ["Rome"]}):
        [example] = read(write(row), tokenizer, LENGTH, "last").examples
        about = [i for i, content in zip(example.row.ids, example.content, strict=True) if content]
        assert tokenizer.decode(about).strip() == "Rome"


def test_what_is_too_long_is_left_out_and_counted(write):
    path = write({"text": "a" * 9}, {"text": "a" * 10}, {"text": "b" * 9})
    examples = read(path, BYTES, 10)
    assert ([example.line for example in examples.examples], examples.left_out) == ([1, 3], 1)
    with pytest.raises(ValueError, match=r"data.jsonl: all 3 examples are longer than 5 tokens; the shortest has 10$"):
        read(path, BYTES, 5)
    with pytest.raises(ValueError, match="line 1: 10 tokens; expected at most 9"):
        read_questions(write({"prompt": "a" * 8, "completion": "b"}), BYTES, 9)


def test_byte_order_mark_blank_lines_and_line_ends(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n   \n{"text": "b\xe2\x80\xa8"}\r\n{"text": "c"}')
    assert [(e.completion, e.line) for e in read(path, BYTES, LENGTH).examples] == [("a", 1), ("b\u2028", 4), ("c", 5)]


TEXT, PAIR = {"text": "a"}, {"prompt": "a", "completion": "b"}


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (b'{"text": "a"', "broken JSON: .* at column 13; expected one JSON object per line"),
        (b"[", "broken JSON"),
        (b'{"text": "a"} {"text": "b"}', "broken JSON: Extra data at column 15"),
        (b'{"text": ' + b"[" * 100_000, "broken JSON"),
        (b'{"text": "a", "text": "b"}', "'text' stands twice in one object"),
        (b'{"text": "\xff"}', "no UTF-8: invalid start byte at byte 11"),
        ('{"text": "a"}'.encode("utf-16"), "no UTF-8"),
        ({"text": "a\ud800"}, '"text" holds half of a surrogate pair at character 2'),
        (["a"], "a JSON list; expected an object per line"),
        ({}, "expected text, or prompt and completion, or messages; got no keys"),
        ({"question": "a", "answer": "b"}, "got the keys 'question', 'answer'"),
        ({"prompt": "a"}, "got prompt$"),
        ({"text": "a", "messages": []}, "got text and messages$"),
        ({**TEXT, **PAIR}, "got text and prompt and completion$"),
        ({"text": 3}, '"text" is a int; expected text'),
        ({"text": None}, '"text" is a NoneType; expected text'),
        ({"text": " \n"}, '"text" is empty; expected text'),
        ({"prompt": "", "completion": "b"}, '"prompt" is empty; expected text'),
        ({"prompt": "a", "completion": " "}, '"completion" is empty; expected text'),
        ({"prompt": "a", "completion": ["b"]}, "expected both texts, or both lists of messages"),
        ({"text": "a", "facts": "a"}, '"facts": expected a list of texts that are not empty'),
        ({"text": "a", "facts": [""]}, '"facts": expected a list of texts that are not empty'),
        ({"text": "a", "facts": ["b"]}, "\"facts\": 'b' is not in what has a loss"),
        ({**PAIR, "facts": ["a"]}, "\"facts\": 'a' is not in what has a loss"),
        ({"messages": TALK}, "messages need a chat template, and the tokenizer has none; expected texts"),
        ({"prompt": [USER], "completion": [ANSWER]}, "messages need a chat template"),
    ],
)
def test_refused_lines(write, row, says):
    path = write(b"", b"  ", row)
    with pytest.raises(ValueError, match=says) as raised:
        read(path, BYTES, LENGTH)
    assert str(raised.value).startswith(f"{path}, line 3: ")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"messages": [USER]}, '"messages" has no message of the assistant'),
        ({"messages": []}, '"messages" is empty; expected a list of messages'),
        ({"messages": "a"}, '"messages" is a str; expected a list of messages'),
        ({"messages": ["a"]}, 'message 1 of "messages": expected an object with a "role" and a "content"'),
        ({"messages": [{"content": "a"}]}, 'message 1 of "messages": expected an object'),
        (
            {"messages": [USER, {"role": "assistant"}]},
            '"content" of message 2 of "messages" is a NoneType; expected text',
        ),
        ({"messages": [USER, {"role": "assistant", "content": [{"type": "text"}]}]}, "is a list; expected text"),
        ({"messages": [USER, {"role": "assistant", "content": " "}]}, "message 2, the assistant's, is empty"),
        ({"messages": [ANSWER]}, "the first message is the assistant's; expected one that it answers"),
        (
            {"messages": [{"role": "system", "content": "x"}, *TALK]},
            "refuses these messages: TemplateError: no system here",
        ),
        ({"messages": TALK, "tools": "["}, '"tools" holds broken JSON'),
        ({"messages": TALK, "tools": 3}, "expected a list of tools"),
        ({"messages": TALK, "chat_template_kwargs": {"tokenize": True}}, "the chat template refuses these messages"),
        ({"prompt": [USER], "completion": [OTHER]}, "the completion's first message is not the assistant's"),
        ({"prompt": [], "completion": [ANSWER]}, '"prompt" is empty; expected a list of messages'),
        (
            {"prompt": [USER], "completion": [{"role": "assistant", "content": ""}]},
            "message 2, the assistant's, is empty",
        ),
    ],
)
def test_refused_messages(pretrained, write, row, says):
    path = write(row)
    with pytest.raises(ValueError, match=says) as raised:
        read(path, pretrained(NO_SYSTEM), LENGTH, "last")
    assert str(raised.value).startswith(f"{path}, line 1: ")
    assert "\n" not in str(raised.value)


def test_a_template_that_marks_nothing(pretrained, write):
    silent = CHATML + "{% if false %}{% generation %}{% endgeneration %}{% endif %}"
    with pytest.raises(ValueError, match="line 1: no token of it has a loss"):
        read(write({"messages": TALK}), pretrained(silent), LENGTH, "assistant")


def test_a_template_that_leaves_out_what_is_said(pretrained, write):
    parts = CHATML.replace("m['content']", "m['content'][0]['text']")  # of lists of parts, as vision models have them
    for row in ({"messages": TALK}, {"prompt": [USER], "completion": [ANSWER]}):
        with pytest.raises(ValueError, match="line 1: the chat template leaves out what message 2 says"):
            read(write(row), pretrained(parts), LENGTH)


def test_marks_that_are_no_whole_turns_are_a_loss_but_no_last_turn(pretrained, write):
    split_turn = MARKED_OPENED.replace("<|im_end|>{% endgen", "{% endgeneration %} {% generation %}<|im_end|>{% endgen")
    tokenizer, path = pretrained(split_turn), write({"messages": TALK})
    [example] = read(path, tokenizer, LENGTH, "assistant").examples
    assert shown(tokenizer, example)[1] == "In Paris.<|im_end|>In Rome.<|im_end|>"
    with pytest.raises(ValueError, match="line 1: the chat template renders"):
        read(path, tokenizer, LENGTH, "last")


def test_refused_files(write, tmp_path):
    with pytest.raises(
        ValueError, match=r"line 2: prompt-completion, where line 1 has text; expected one format in a file"
    ):
        read(write(TEXT, PAIR), BYTES, LENGTH)
    with pytest.raises(ValueError, match="holds no examples"):
        read(write(b"", b" "), BYTES, LENGTH)
    with pytest.raises(ValueError, match="holds no questions"):
        read_questions(write(b""), BYTES, LENGTH)
    with pytest.raises(ValueError, match="line 1: a text asks nothing; expected prompt and completion, or messages"):
        read_questions(write(TEXT), BYTES, LENGTH)
    with pytest.raises(IsADirectoryError, match=r"cannot be read: Is a directory; expected a JSONL file"):
        read(tmp_path, BYTES, LENGTH)
    with pytest.raises(FileNotFoundError, match=r"nowhere.jsonl: cannot be read"):
        read(tmp_path / "nowhere.jsonl", BYTES, LENGTH)
    with pytest.raises(ValueError, match="loss 'some': expected one of all, assistant, last"):
        read(write(TEXT), BYTES, LENGTH, "some")


def pairs(count: int, prompts: int | None = None) -> list[dict]:
    return [{"prompt": f"{at % (prompts or count)}?", "completion": f"{at}"} for at in range(count)]


@pytest.mark.parametrize(
    ("rows", "sizes"),
    [(pairs(LEAST), (16, 4, 4)), (pairs(100), (80, 10, 10)), (pairs(120, prompts=60), (96, 12, 12))],
)
def test_parts(write, rows, sizes):
    examples = read(write(*rows), BYTES, LENGTH)
    parts = split(examples, 3)
    assert tuple(map(len, parts)) == sizes
    assert sorted(e.line for part in parts for e in part) == list(range(1, len(rows) + 1))
    prompts = [{e.prompt for e in part} for part in parts]
    assert sum(map(len, prompts)) == len({row["prompt"] for row in rows})
    assert split(examples, 3) == parts
    assert split(examples, 4) != parts


def test_parts_are_the_seeds_alone(write):
    parts = split(read(write(*pairs(LEAST)), BYTES, LENGTH), 0)
    assert [[e.line for e in part] for part in parts[1:]] == [[7, 12, 23, 22], [15, 1, 18, 8]]


def test_equal_texts_are_on_one_side_and_a_frequent_prompt_trains(write):
    texts = [{"text": f"{at % 40}"} for at in range(80)]
    parts = [{e.completion for e in part} for part in split(read(write(*texts), BYTES, LENGTH), 0)]
    assert sum(map(len, parts)) == 40
    frequent = read(write(*pairs(60), *[{"prompt": "again", "completion": f"{at}"} for at in range(20)]), BYTES, LENGTH)
    for seed in range(20):
        assert sum(e.prompt == "again" for e in split(frequent, seed)[0]) == 20


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (pairs(LEAST - 1), f"data.jsonl: 23 examples; expected at least {LEAST} different prompts to hold some out"),
        (pairs(100, prompts=7), "data.jsonl: 7 different prompts in 100 examples; expected at least 24"),
        (pairs(100, prompts=1), "data.jsonl: all prompts of 100 examples are alike; expected"),
        ([{"text": "a"}] * 30, "data.jsonl: all texts of 30 examples are alike; expected"),
        ([*pairs(3), {"prompt": "a" * 500, "completion": "b"}], r"3 examples \(1 more are too long\); expected"),
    ],
)
def test_too_few(write, rows, says):
    with pytest.raises(ValueError, match=says):
        split(read(write(*rows), BYTES, LENGTH), 0)


def test_questions_that_are_trained_on(write):
    train = read(write(*pairs(5)), BYTES, LENGTH).examples
    fresh = {"prompt": "new?", "completion": "1"}
    questions = read_questions(write(fresh, b"", pairs(5)[3], name="test.jsonl"), BYTES, LENGTH)
    assert [question.line for question in questions] == [1, 3]
    assert (questions[1].prompt, questions[1].answer) == (tuple(b"3?"), (*b"3", BYTES.eos))
    overlap(train, questions[:1])
    with pytest.raises(ValueError, match=r"questions that are trained on: line 3 \(line 4 of the examples\); expected"):
        overlap(train, questions)
    overlap(read(write({"text": "new?"}), BYTES, LENGTH).examples, questions)


def test_ids_and_labels_are_trls(pretrained, write, tmp_path):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    import transformers

    tokenizer = pretrained(MARKED, bos=True)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=330, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        )
    )
    texts = [{"text": "In Rome."}, {"text": "Anna lives in Paris.</s>"}]
    strings = [{"prompt": "Where does Anna live?", "completion": " In Rome."}, {"prompt": "a", "completion": " b</s>"}]
    messages = [{"messages": TALK}, {"messages": TALK[:2]}]
    answered = [{"prompt": TALK[:3], "completion": TALK[3:]}, {"prompt": TALK[:1], "completion": TALK[1:]}]
    for rows, loss in ((texts, "all"), (strings, "all"), (answered, "all"), (messages, "all"), (messages, "assistant")):
        arguments = trl.SFTConfig(
            str(tmp_path), assistant_only_loss=loss == "assistant", report_to="none", bf16=False, use_cpu=True
        )
        trainer = trl.SFTTrainer(
            model, arguments, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer.tokenizer
        )
        for example, theirs in zip(
            read(write(*rows), tokenizer, LENGTH, loss).examples, trainer.train_dataset, strict=True
        ):
            assert list(example.row.ids) == theirs["input_ids"]
            assert list(example.row.labels) == theirs.get("labels", theirs["input_ids"])
