"""Law 5 and the promises of generate: cached = uncached, alone = in company, full contexts, stop rules."""

import pytest
import torch
from cases import CONFIGS, TINY, random_params

from gptcore.config import architecture
from gptcore.generate import GenerateOptions, generate, text_pieces
from gptcore.model import forward
from gptcore.sampling import PRESETS

PROMPTS = [[3, 1, 4], [1], [5, 9, 2, 6, 5, 3, 5, 8]]
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


def texts(params, config, prompts, **options):
    """What each row draws, and at which steps something was read again."""
    tap = options.pop("tap", None)
    steps = list(generate(params, config, prompts, GenerateOptions(**options), tap=tap))
    rows = [[step.tokens[row] for step in steps if step.tokens[row] >= 0] for row in range(len(prompts))]
    return rows, [n for n, step in enumerate(steps) if step.reread]


@every_config
@pytest.mark.parametrize("preset", ["greedy", "balanced"])
def test_cached_equals_uncached_also_beyond_the_context(config, preset):
    """45 tokens through a context of 40: both ways read the last half again at the same moments."""
    params = random_params(config)
    ways = [
        texts(params, config, PROMPTS, sampling=PRESETS[preset], max_new_tokens=45, cached=c) for c in (True, False)
    ]
    assert ways[0] == ways[1]
    assert all(len(row) == 45 for row in ways[0][0])
    assert ways[0][1]


@every_config
def test_a_row_draws_the_same_alone_and_in_company(config):
    params = random_params(config)
    together, _ = texts(params, config, PROMPTS, max_new_tokens=50)
    for prompt, wanted in zip(PROMPTS, together, strict=True):
        alone, _ = texts(params, config, [prompt], max_new_tokens=50)
        assert alone == [wanted]


def test_greedy_is_the_argmax_of_forward():
    config, params = CONFIGS["gpt2"], random_params(CONFIGS["gpt2"])
    (row,), _ = texts(params, config, [[7]], sampling=PRESETS["greedy"], max_new_tokens=20)
    ids = [7]
    for token in row:
        assert token == forward(params, config, torch.tensor([ids]))[0][0, -1].argmax()
        ids.append(token)


def test_a_full_context_is_cut_to_its_last_half():
    """With n_context 8 the ninth token finds no room: the model then sees the last four and goes on from there."""
    config = architecture("gpt2", **TINY | {"n_context": 8})
    params = random_params(config)
    (row,), again = texts(params, config, [[1, 2, 3, 4, 5, 6]], sampling=PRESETS["greedy"], max_new_tokens=12)
    assert again == [3, 8]  # six read and three drawn make nine; the last four and five more make nine again
    ids = [1, 2, 3, 4, 5, 6, *row[:3]]
    assert row[3] == forward(params, config, torch.tensor([ids[-4:]]))[0][0, -1].argmax()


def test_a_context_of_one_and_a_prompt_that_is_too_long():
    config = architecture("gpt2", **TINY | {"n_context": 1})
    params = random_params(config)
    ways = [texts(params, config, [[1, 2, 3]], max_new_tokens=5, cached=cached) for cached in (True, False)]
    assert ways[0] == ways[1] == (ways[0][0], [0, 1, 2, 3, 4])


def test_rows_end_by_themselves_at_a_stop_token():
    """Each row stops after its first stop token, the others go on as they would have."""
    config, params = CONFIGS["llama"], random_params(CONFIGS["llama"])
    free, _ = texts(params, config, PROMPTS, max_new_tokens=50)
    stop = free[0][2]
    cut, _ = texts(params, config, PROMPTS, max_new_tokens=50, stop=(stop,))
    for whole, part in zip(free, cut, strict=True):
        end = whole.index(stop) + 1 if stop in whole else 50
        assert part == whole[:end]
    assert len(cut[0]) <= 3


def test_seeds_make_rows_differ_and_repeat():
    config, params = CONFIGS["gpt2"], random_params(CONFIGS["gpt2"])
    rows, _ = texts(params, config, [[1]] * 3, seed=[1, 2, 1], max_new_tokens=30)
    assert rows[0] == rows[2] != rows[1]


@pytest.mark.parametrize("cached", [True, False])
def test_a_tap_edits_while_decoding(cached):
    """Zeroing every head in every step, cached or not, gives the same text, and another one than without."""
    config, params = CONFIGS["alibi"], random_params(CONFIGS["alibi"])
    silence = lambda name, value: torch.zeros_like(value) if name.endswith("attn.z") else value
    edited, _ = texts(params, config, PROMPTS, max_new_tokens=20, cached=cached, tap=silence)
    assert edited == texts(params, config, PROMPTS, max_new_tokens=20, tap=silence)[0]
    assert edited != texts(params, config, PROMPTS, max_new_tokens=20)[0]


def test_a_tap_sees_prefill_and_every_step():
    config, params = CONFIGS["gpt2"], random_params(CONFIGS["gpt2"])
    shapes = []

    def watch(name, value):
        if name == "blocks.0.resid_pre":
            shapes.append(tuple(value.shape))
        return value

    texts(params, config, [[1, 2, 3]], max_new_tokens=3, tap=watch)
    assert shapes == [(1, 3, 40), (1, 1, 40), (1, 1, 40)]


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[]], {}, "prompts: expected token ids in 0..60, at least one a row, got none"),
        ([[1], [61]], {}, "prompts: expected token ids in 0..60, at least one a row, got 61..61"),
        ([[1], [2]], {"seed": [1]}, "seed: expected one for all or 2, got 1"),
        ([[1]], {"max_new_tokens": -1}, "max_new_tokens: expected at least 0, got -1"),
        ([[1]], {"sampling": PRESETS["greedy"]._replace(top_p=1.5)}, r"top_p: expected a number in \(0, 1\], got 1.5"),
    ],
    ids=["empty", "outside", "seeds", "length", "top_p"],
)
def test_bad_requests_are_refused(prompts, options, message):
    config = CONFIGS["gpt2"]
    with pytest.raises(ValueError, match=message):
        list(generate(random_params(config), config, prompts, GenerateOptions(**options)))


def test_nothing_asked_nothing_drawn():
    config = CONFIGS["gpt2"]
    assert list(generate(random_params(config), config, [[1]], GenerateOptions(max_new_tokens=0))) == []
    assert list(generate(random_params(config), config, [])) == []


def test_gradients_are_as_before_between_two_tokens():
    """A generator that held no_grad open would silence its caller. Seen to fail with no_grad around the loop."""
    config = CONFIGS["gpt2"]
    for _ in generate(random_params(config), config, [[1]], GenerateOptions(max_new_tokens=2)):
        assert torch.is_grad_enabled()


class Letters:
    """A stand-in tokenizer whose tokens are single bytes; only its stream is used here."""

    def stream(self):
        from codecs import getincrementaldecoder

        decoder = getincrementaldecoder("utf-8")(errors="replace")
        feed = lambda token: decoder.decode(bytes([token]))
        return type("Stream", (), {"feed": staticmethod(feed), "end": lambda self: decoder.decode(b"", True)})()


@pytest.mark.parametrize(
    ("text", "stop", "pieces"),
    [
        ("abc", (), ["a", "b", "c"]),
        ("a€b", (), ["a", "€", "b"]),
        ("one END two", ("END",), list("one ")),
        ("EN or END", ("END",), ["EN ", "o", "r", " "]),
        ("aab", ("ab", "b"), ["a"]),
        ("xEN", ("END",), ["x", "EN"]),
    ],
    ids=str,
)
def test_text_is_streamed_up_to_the_first_stop_string(text, stop, pieces):
    assert list(text_pieces(text.encode(), Letters(), stop)) == pieces


def test_half_a_character_at_the_end_is_replaced():
    assert list(text_pieces("a€".encode()[:-1], Letters())) == ["a", "\ufffd"]


def test_a_short_row_goes_on_when_the_longest_has_ended():
    """Seen to fail with the bound of the row that is gone: the cache seemed full, 36 tokens too early."""
    config = CONFIGS["gpt2"]
    params = random_params(config)
    greedy = {"sampling": PRESETS["greedy"], "max_new_tokens": 12, "engine": "eager"}
    texts = lambda prompts, **ways: list(generate(params, config, prompts, GenerateOptions(**greedy | ways)))
    last = texts([[1] * 38])[0].tokens[0]
    alone = [step.tokens[0] for step in texts([[2, 5]])]
    assert last not in alone
    together = texts([[1] * 38, [2, 5]], stop=(last,))
    assert [step.tokens[1] for step in together] == alone
