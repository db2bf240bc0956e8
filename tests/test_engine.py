"""The native decoder speaks as forward does: every axis, any batch, threads and chunks to the bit, and never a hang."""

import mmap
import os
import signal
import subprocess
import sys
import threading
from functools import cache

import pytest
import torch
from cases import CONFIGS, random_params, random_tokens
from test_kernels import ISAS, ROOT, each_isa, needs_native, python, sanitize

from gptcore import engine, kernels, tree
from gptcore.cache import KVCache, init_cache, with_lengths
from gptcore.generate import GenerateOptions, generate
from gptcore.model import forward
from gptcore.sampling import PRESETS

pytestmark = needs_native
every_config = pytest.mark.parametrize("name", CONFIGS)
PROMPTS = [[3, 1, 4], [1], [5, 9, 2, 6, 5, 3, 5, 8]]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
each_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


@cache
def params_of(name):
    return random_params(CONFIGS[name], torch.float32)


def texts(name, engine, **options):
    params = options.pop("params", None) or params_of(name)
    steps = list(generate(params, CONFIGS[name], PROMPTS, GenerateOptions(engine=engine, **options)))
    rows = [[step.tokens[row] for step in steps if step.tokens[row] >= 0] for row in range(len(PROMPTS))]
    return rows, [n for n, step in enumerate(steps) if step.reread], len(steps)


@cache
def eager_texts(name, preset):
    return texts(name, "eager", sampling=PRESETS[preset], max_new_tokens=60)


def started(name, lengths=(17, 3, 9), dtype=torch.float32):
    """A ragged cache of rows that hold `lengths` tokens, and what decode_ needs to go on."""
    config, rows = CONFIGS[name], len(lengths)
    tokens = random_tokens(config, rows, max(lengths) + 1)
    _, cache = forward(params_of(name), config, tokens[:, :-1], init_cache(config, rows, dtype=dtype))
    newest = torch.stack([tokens[row, length] for row, length in enumerate(lengths)])
    words = {"seed": torch.arange(rows) * 2**40 - 5, "position": torch.tensor(lengths) + 1}
    return with_lengths(cache, list(lengths)), newest, words


def contents(cache):
    """Every key and value below the rows' lengths: where every layer's numbers can be seen."""
    return [store[row, :, :n] for store in (*cache.k, *cache.v) for row, n in enumerate(cache.length.tolist())]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(contents(a), contents(b), strict=True))


def decode(name, state, n_steps=20, dtype=None, preset="balanced", **rules):
    cache, newest, words = state
    packed = engine.pack(params_of(name), CONFIGS[name], dtype)
    return engine.decode_(packed, cache, newest, **words, n_steps=n_steps, sampling=PRESETS[preset], **rules)


# ------------------------------------------------------------------------------------------------ the same as forward


@every_config
@each_isa
@pytest.mark.parametrize("preset", ["greedy", "balanced"])
def test_native_and_eager_give_the_same_text(name, isa, preset):
    """60 tokens through a context of 40, three ragged rows: also the full contexts are read again at the same moments.

    Exact by law where no draw falls between two implementations' logits; these fixed cases have none.
    """
    with kernels.using("auto", isa):
        assert texts(name, "native", sampling=PRESETS[preset], max_new_tokens=60) == eager_texts(name, preset)


@pytest.mark.parametrize("preset", PRESETS)
def test_eager_draws_the_same_text_whoever_samples(preset):
    """Native attention and sampling, or torch's: with rotary positions the two share the least code."""
    with kernels.using("reference"):
        wanted = texts("interleaved", "eager", sampling=PRESETS[preset], max_new_tokens=60)
    assert eager_texts("interleaved", preset) == wanted


@sanitize
@every_config
@each_isa
@each_dtype
def test_the_most_likely_token_is_forwards_after_any_number_of_tokens(name, isa, dtype):
    """Teacher forcing against float64 on the same rounded weights: 3 texts, every length from 0 to 38 a row of its own.

    A gap below 1e-4 between the two best may fall either way; that excuses less than 2 in 100.
    """
    config = CONFIGS[name]
    packed = engine.pack(params_of(name), config, dtype)
    rounded = tree.map(torch.Tensor.double, engine.unpack(packed, config))
    tokens = random_tokens(config, 3, 39)
    store = init_cache(config, 3, dtype=torch.float64)
    logits, store = forward(rounded, config, tokens, store)
    best = logits.topk(2, dim=-1)
    sure = best.values[..., 0] - best.values[..., 1] > 1e-4
    spread = lambda buffers: tuple(x.float().repeat_interleave(39, dim=0) for x in buffers)
    lengths = torch.arange(39).repeat(3)
    cache = KVCache(spread(store.k), spread(store.v), lengths, bound=38)
    words = {"seed": lengths, "position": lengths + 1}
    with kernels.using("auto", isa):
        (drawn,), _ = engine.decode_(
            packed, cache, tokens.flatten(), **words, n_steps=1, sampling=PRESETS["greedy"], n_threads=2
        )
    drawn = torch.tensor(drawn).view(3, 39)
    assert sure.float().mean() > 0.98
    assert torch.equal(drawn[sure], best.indices[..., 0][sure])


@every_config
@each_isa
def test_keys_and_values_err_at_most_twice_as_much_as_torch(name, isa):
    """What the last layer appends has passed through all layers: compared with float64, 16 steps on."""
    config, n = CONFIGS[name], 16
    if not config.n_layer:
        return
    errors = {}
    cache, newest, words = started(name, (7, 7, 7))
    packed = engine.pack(params_of(name), config)
    with kernels.using("auto", isa):
        steps, after = engine.decode_(packed, cache, newest, **words, n_steps=n, sampling=PRESETS["greedy"])
    forced = torch.cat([random_tokens(config, 3, 8), torch.tensor(steps).T[:, :-1]], dim=1)
    wide = tree.map(torch.Tensor.double, params_of(name))
    _, truth = forward(wide, config, forced, init_cache(config, 3, dtype=torch.float64))
    _, own = forward(params_of(name), config, forced, init_cache(config, 3))
    for who, found in (("native", after), ("torch", own)):
        pairs = zip((found.k[-1], found.v[-1]), (truth.k[-1], truth.v[-1]), strict=True)
        errors[who] = sum((x.double() - y)[:, :, 8 : 7 + n].square().sum() for x, y in pairs).sqrt()
    assert errors["native"] <= 2 * errors["torch"]


@sanitize
@each_isa
@pytest.mark.parametrize("store", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_the_cache_may_be_rounded(isa, store):
    """What is appended is what forward would append, to the storage's last place but one."""
    state = started("llama", dtype=store)
    fresh = started("llama", dtype=store)
    with kernels.using("auto", isa):
        _, after = decode("llama", state, n_steps=1)
    _, wanted = forward(params_of("llama"), CONFIGS["llama"], fresh[1][:, None], fresh[0])
    unit = 4 * torch.finfo(store).eps
    for x, y in zip(contents(after), contents(wanted), strict=True):
        torch.testing.assert_close(x, y, rtol=unit, atol=unit)


# ------------------------------------------------------------------------------------------------ laws, bit for bit


@sanitize
@every_config
@each_isa
def test_threads_batch_and_chunks_change_no_bit(name, isa):
    """1, 2, 3 and 5 threads; a row alone; 20 steps as 1, 7 and 12: the same tokens, and the same cache to the bit."""
    with kernels.using("auto", isa):
        steps, wanted = decode(name, started(name), n_threads=1)
        for n in (2, 3, 5):
            again, after = decode(name, started(name), n_threads=n)
            assert again == steps
            assert same(after, wanted)
        (cache, newest, words), chunks = started(name), []
        for n in (1, 7, 12):
            more, cache = decode(name, (cache, newest, words), n_steps=n, n_threads=2)
            chunks += more
            newest, words = torch.tensor(more[-1]), words | {"position": words["position"] + n}
        assert chunks == steps
        assert same(cache, wanted)
        cache, newest, words = started(name)
        for row in range(3):
            one = slice(row, row + 1)
            pick = lambda stores, one=one: tuple(store[one].clone() for store in stores)
            alone = KVCache(pick(cache.k), pick(cache.v), cache.length[one], cache.bound)
            own, after = decode(name, (alone, newest[one], {key: x[one] for key, x in words.items()}))
            assert [token for (token,) in own] == [step[row] for step in steps]
            whole = [x for store in (*wanted.k, *wanted.v) for x in [store[one, :, : wanted.length[row]]]]
            assert all(torch.equal(x[None], y) for x, y in zip(contents(after), whole, strict=True))


@sanitize
@each_isa
@pytest.mark.parametrize("n_row", [1, 8])
def test_long_contexts_are_shared_out_by_blocks_of_keys(isa, n_row):
    """One key head and several threads, 600 positions: partial results meet in their order, the bits stay."""
    from gptcore.config import architecture

    config = architecture("llama", n_vocab=61, n_context=700, n_layer=2, d_model=48, n_head=3, n_kv_head=1)
    params = random_params(config, torch.float32)
    tokens = random_tokens(config, n_row, 600)
    packed, found = engine.pack(params, config), []
    for n_threads in (1, 2, 3, 5):
        _, cache = forward(params, config, tokens, init_cache(config, n_row))
        words = {"seed": torch.arange(n_row), "position": cache.length + 1}
        with kernels.using("auto", isa):
            found.append(
                engine.decode_(
                    packed, cache, tokens[:, -1], **words, n_steps=9, sampling=PRESETS["balanced"], n_threads=n_threads
                )
            )
    assert all(steps == found[0][0] and same(after, found[0][1]) for steps, after in found)


@each_dtype
def test_instruction_sets_with_fused_multiply_add_agree_to_the_bit(dtype):
    """Every sum has one order, in lanes. (In float32 the number of digits hides nothing: a cache is compared.)"""
    found = []
    for isa in [isa for isa in ISAS if isa != "generic"]:
        with kernels.using("auto", isa):
            found.append(decode("qwen3", started("qwen3"), dtype=dtype))
    assert all(steps == found[0][0] and same(after, found[0][1]) for steps, after in found)


def test_forward_goes_on_where_the_decoder_stopped_and_an_old_handle_stays_valid():
    name = "gpt2"
    before = started(name)
    below = [x.clone() for x in contents(before[0])]
    steps, after = decode(name, before)
    assert all(torch.equal(x, y) for x, y in zip(contents(before[0]), below, strict=True))
    assert decode(name, before)[0] == steps
    forced = torch.tensor([before[1].tolist(), *steps]).T  # (B,21)
    fresh = started(name)[0]
    wanted, _ = forward(params_of(name), CONFIGS[name], forced, fresh)
    logits, _ = forward(params_of(name), CONFIGS[name], forced[:, -1:], after)
    torch.testing.assert_close(logits[:, -1], wanted[:, -1])


@sanitize
def test_a_row_ends_after_its_stop_token_or_when_its_cache_is_full():
    """First, in the middle, never; and the others go on as they would have."""
    free, _ = decode("gpt2", started("gpt2"), n_steps=23)
    assert len(free) == 23
    length = started("gpt2")[0].length
    for step in (0, 9, 22):
        stop = free[step][1]
        cut, after = decode("gpt2", started("gpt2"), n_steps=23, stop=(stop,))
        for row in range(3):
            whole = [drawn[row] for drawn in free]
            end = whole.index(stop) + 1 if stop in whole else 23
            part = [drawn[row] for drawn in cut]
            assert part == (whole[:end] + [-1] * 23)[: len(cut)]
            assert after.length[row] - length[row] == end
    full, after = decode("gpt2", started("gpt2"), n_steps=60)
    assert after.length.tolist() == [40, 40, 40]
    assert [[drawn[row] for drawn in full].count(-1) for row in range(3)] == [14, 0, 6]


@pytest.mark.parametrize("who", ["native", "eager"])
def test_logits_that_are_no_numbers_end_a_text_after_what_was_good(who):
    """A token whose embedding is NaN poisons the step after it: what came before was yielded, whoever decoded."""
    (row, *_), _, _ = texts("neox", "eager", sampling=PRESETS["greedy"], max_new_tokens=30)
    bad = next(token for token in row[5:] if token not in [*row[:5], *PROMPTS[0]])
    params = tree.map(torch.clone, params_of("neox"))
    params["embed"]["w"][bad] = torch.nan
    seen, options = [], GenerateOptions(engine=who, sampling=PRESETS["greedy"], max_new_tokens=30)
    with pytest.raises(ValueError, match="expected a finite largest logit in row 0"):  # noqa: PT012
        for step in generate(params, CONFIGS["neox"], PROMPTS[:1], options):
            seen += step.tokens
    assert seen == row[: row.index(bad) + 1]


def test_stop_tokens_end_rows_alike():
    (first, *_), _, _ = eager_texts("llama", "balanced")
    ways = [texts("llama", who, max_new_tokens=60, stop=(first[7], first[20])) for who in ("native", "eager")]
    assert ways[0] == ways[1]


# ------------------------------------------------------------------------------------------------------------- packing


@every_config
@each_dtype
def test_unpack_gives_the_rounded_weights_back(name, dtype):
    """Exact in float32, rounded to nearest in bfloat16, off by half a step of its row in int8; gains stay."""
    config, params = CONFIGS[name], params_of(name)
    found = dict(tree.walk(engine.unpack(engine.pack(params, config, dtype), config)))
    wanted = dict(tree.walk(params))
    assert found.keys() == wanted.keys()
    for leaf, x in wanted.items():
        assert found[leaf].dtype == torch.float32
        if dtype == torch.float32 or x.dim() == 1 or leaf == "positions.w":
            assert torch.equal(found[leaf], x)
        elif dtype == torch.bfloat16:
            assert torch.equal(found[leaf], x.bfloat16().float())
        else:
            assert ((found[leaf] - x).abs() <= x.abs().amax(1, keepdim=True) / 127 * 0.5001).all()


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps"), reason="no /proc on this system")
@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="no huge pages on this system")
def test_packed_weights_may_lie_in_huge_pages():
    """Private and advised: huge pages are for no other memory. Seen to fail with mmap's default, which is shared."""
    packed = engine.pack(params_of("gpt2"), CONFIGS["gpt2"])
    address, inside, flags = packed.weights[0].data_ptr(), False, []
    for line in open("/proc/self/smaps"):  # noqa: SIM115
        first, *rest = line.split()
        if not first.endswith(":"):
            start, end = (int(x, 16) for x in first.split("-"))
            inside = start <= address < end
        elif inside and first == "VmFlags:":
            flags = rest
    assert "hg" in flags
    assert "sh" not in flags


def test_a_row_of_zeros_stays_zero():
    whole, scale = engine.quantize(torch.tensor([[0.0, 0.0], [1.0, -0.5]]))
    assert torch.equal(whole * scale[:, None], torch.tensor([[0.0, 0.0], [1.0, -64 / 127]]))


@sanitize
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a["packed"].weights.pop(), "weights: expected 87 tensors, got 86"),
        (lambda a: a["packed"].plan.__setitem__(0, 62), r"embed.w: expected 2976 numbers, got 2928"),
        (lambda a: a["packed"].plan.append(1), "plan: expected 14 numbers, got 15"),
        (lambda a: a["packed"].weights.__setitem__(0, a["packed"].weights[0].half()), "weights: expected float32, bfl"),
        (lambda a: a.update(tokens=torch.tensor([1, 2, 61])), "tokens: expected 0 to 60 in row 2, got 61"),
        (
            lambda a: a.update(cache=a["cache"]._replace(length=torch.tensor([1, 2, 41]))),
            "length: expected 0 to 40",
        ),
        (lambda a: a.update(cache=a["cache"]._replace(k=a["cache"].v[:1])), "k, v: expected 2 layers, got 1, 2"),
        (lambda a: a.update(seed=torch.tensor([1])), r"seed: expected \(3\), contiguous, got \(1\)"),
    ],
)
def test_what_would_leave_the_buffers_is_refused(change, message):
    cache, newest, words = started("gpt2")
    packed = engine.pack(params_of("gpt2"), CONFIGS["gpt2"])
    given = {"packed": packed, "cache": cache, "tokens": newest, **words}
    change(given)
    with pytest.raises(RuntimeError, match=message):
        engine.decode_(**given, n_steps=3, sampling=PRESETS["greedy"])


def test_opcheck():
    cache, newest, words = started("llama")
    packed = engine.pack(params_of("llama"), CONFIGS["llama"])
    arguments = (*packed, newest, list(cache.k), list(cache.v), cache.length)
    words |= {"stop": torch.tensor([3]), "steps": 4, "top_k": 5}
    torch.library.opcheck(torch.ops.gptcore.decode_, arguments, words)


def test_a_gradient_is_never_silently_wrong():
    cache, newest, words = started("llama")
    packed = engine.pack(params_of("llama"), CONFIGS["llama"])
    weights = [x.requires_grad_() if x.is_floating_point() and x.numel() else x for x in packed.weights]
    arguments = (weights, *packed[1:], newest, list(cache.k), list(cache.v), cache.length)
    with pytest.raises(NotImplementedError, match="decode_ is inference only"):
        torch.ops.gptcore.decode_(*arguments, **words, stop=torch.tensor([3]), steps=4)


# ------------------------------------------------------------------------------------------------------------ choosing


def test_who_decodes_is_chosen_and_forced():
    """auto takes what serves; native says why it cannot; both say it before anything is computed."""
    options = GenerateOptions(engine="native", max_new_tokens=2)
    look = lambda name, value: value
    refused = [
        ({"tap": look}, params_of("gpt2"), options, "a tap is given"),
        ({}, random_params(CONFIGS["gpt2"]), options, "torch.float64 is not served"),
        ({}, params_of("gpt2"), GenerateOptions(engine="native", cached=False), "nothing is cached"),
    ]
    for tap, params, wanted, why in refused:
        with pytest.raises(ValueError, match=f"engine: expected what the native decoder serves, but {why}"):
            next(generate(params, CONFIGS["gpt2"], [[1]], wanted, **tap))
        next(generate(params, CONFIGS["gpt2"], [[1]], GenerateOptions(cached=wanted.cached), **tap))
    with kernels.using("reference"), pytest.raises(ValueError, match="but GPTCORE_KERNELS=reference"):
        next(generate(params_of("gpt2"), CONFIGS["gpt2"], [[1]], options))
    with pytest.raises(ValueError, match="engine: expected one of auto, eager, native, graph, got 'fast'"):
        GenerateOptions(engine="fast")
    with pytest.raises(ValueError, match=r"dtype: expected one of .*torch.int8, got torch.float16"):
        engine.pack(params_of("gpt2"), CONFIGS["gpt2"], torch.float16)


def test_weights_that_train_can_speak_between_two_updates():
    """requires_grad is no obstacle: generate computes no gradients anyway."""
    params = tree.map(lambda x: x.clone().requires_grad_(), params_of("gpt2"))
    wanted = texts("gpt2", "native", max_new_tokens=9)
    assert texts("gpt2", "native", max_new_tokens=9, params=params) == wanted


def test_bfloat16_weights_speak_too():
    """The same model as its rounded weights in float32 say, but for the cache, which is bfloat16 then."""
    params = tree.map(torch.Tensor.bfloat16, params_of("gpt2"))
    rows, _, _ = texts("gpt2", "native", max_new_tokens=30, params=params)
    assert all(len(row) == 30 for row in rows)


# ----------------------------------------------------------------------------------------- never a hang, always in time


def test_a_call_is_sized_by_the_speed_seen():
    pace = engine.Pace()
    assert pace.n_steps == 1
    for made, seconds, wanted in [(1, 0.001, 50), (50, 0.1, 25), (25, 1e-9, 256), (1, 3.0, 1)]:
        pace.learn_(made, seconds)
        assert pace.n_steps == wanted


WORK = """
import sys
sys.path.insert(0, "tests")
import torch
from cases import CONFIGS, random_params
from gptcore.generate import GenerateOptions, generate
config = CONFIGS["llama"]
params = random_params(config, torch.float32)
def text(n=200):
    options = GenerateOptions(engine="native", max_new_tokens=n)
    return [step.tokens for step in generate(params, config, [[1, 2], [3]], options)]
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no CPU affinity on this system")
def test_works_on_one_cpu():
    code = WORK + "import os\nos.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\nprint(len(text()))"
    assert python(code) == (0, "200\n")


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no CPU affinity on this system")
def test_a_team_that_is_pushed_onto_one_cpu_still_ends():
    """More threads than CPUs, asked for by number: waiting yields."""
    code = """
import os, sys
sys.path.insert(0, "tests")
import test_engine as t
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
one, _ = t.decode("gpt2", t.started("gpt2"), n_threads=1)
print(t.decode("gpt2", t.started("gpt2"), n_threads=7)[0] == one)
"""
    assert python(code) == (0, "True\n")


@pytest.mark.parametrize("n", ["1", "2", "64"])
def test_works_with_any_number_of_threads(n):
    assert python(WORK + "print(len(text()))", OMP_NUM_THREADS=n) == (0, "200\n")


def test_works_beside_busy_processes(busy):
    """Eight of them on whatever CPUs there are: whoever waits gives its CPU away."""
    assert python(WORK + "print(len(text()))", OMP_NUM_THREADS="2") == (0, "200\n")


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="no /proc on this system")
@pytest.mark.parametrize("n_byte", [2**22, 5 * 2**22])
def test_works_where_threads_cannot_be_created(n_byte):
    """Beside 63 more stacks there is no room for, the team is none of them, or two: the same tokens.

    Python's own threads say that the system refuses.
    """
    code = f"""
import resource, sys, threading
sys.path.insert(0, "tests")
import test_engine as t
packed = t.engine.pack(t.params_of("gpt2"), t.CONFIGS["gpt2"])
states = [t.started("gpt2") for _ in range(2)]
def work(n):
    cache, newest, words = states.pop()
    rules = {{"n_steps": 20, "sampling": t.PRESETS["balanced"], "n_threads": n}}
    return t.engine.decode_(packed, cache, newest, **words, **rules)[0]
one = work(1)
n_page = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (n_page * resource.getpagesize() + {n_byte},) * 2)
end, others = threading.Event(), []
try:
    for _ in range(63):
        others.append(threading.Thread(target=end.wait))
        others[-1].start()
except RuntimeError as error:
    print(error)
end.set()
for other in others[:-1]:
    other.join()
print(work(64) == one)
"""
    assert python(code, OMP_NUM_THREADS="1") == (0, "can't start new thread\nTrue\n")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_works_in_a_data_loaders_worker():
    """Forked after the parent has decoded and torch has begun its pool."""
    code = """
import sys
sys.path.insert(0, "tests")
import torch
import test_engine as t
work = lambda: t.decode("gpt2", t.started("gpt2"), n_threads=3)[0]
first = work()
torch.ones(10**6).sum()
class Texts(torch.utils.data.Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, index):
        return work() == first
print(list(torch.utils.data.DataLoader(Texts(), batch_size=None, num_workers=2, multiprocessing_context="fork")))
"""
    assert python(code, OMP_NUM_THREADS="2") == (0, "[True, True, True, True]\n")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_works_in_a_forked_child():
    code = """
import os, sys
sys.path.insert(0, "tests")
import test_engine as t
work = lambda: t.decode("gpt2", t.started("gpt2"), n_threads=3)[0]
first = work()
child = os.fork()
if child == 0:
    os._exit(0 if work() == first else 3)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert python(code, seconds=60) == (0, "0\n")


def test_two_python_threads_at_once_give_what_one_gives():
    wanted, results = texts("llama", "native", max_new_tokens=100), {}

    def work(name):
        results[name] = all(texts("llama", "native", max_new_tokens=100) == wanted for _ in range(5))

    workers = [threading.Thread(target=work, args=(name,)) for name in "ab"]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert results == {"a": True, "b": True}


def test_other_python_threads_run_meanwhile():
    """A counter advances during one call. Seen to stand still where the interpreter is held."""
    state, packed = started("gpt2", (1, 1, 1)), engine.pack(params_of("gpt2"), CONFIGS["gpt2"])
    count, moved, done = [0], [], threading.Event()

    def work():
        for _ in range(20):
            before = count[0]
            cache, newest, words = state
            engine.decode_(packed, cache, newest, **words, n_steps=39, sampling=PRESETS["balanced"])
            moved.append(count[0] - before)
        done.set()

    worker = threading.Thread(target=work)
    worker.start()
    while not done.is_set():
        count[0] += 1
    worker.join()
    assert sum(moved) > 0, moved


def test_ctrl_c_ends_a_long_text():
    """A million tokens were asked for; the signal arrives in the middle of them."""
    code = WORK + "print('begun', flush=True)\ntext(10**6)"
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        assert process.stdout.readline() == "begun\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode != 0
    assert "KeyboardInterrupt" in errors
