"""An adapter: our models in the Language Model Evaluation Harness, with the numbers of this package.

What you learn here: the harness asks a model for three things only, the likelihood of continuations, the likelihood of
whole texts, and text until a stop string; everything else is tasks. Version 0.4.13 knows no plug-ins, so whoever wants
the model "gptcore" calls adapter() first. It is an extra (pip install -e ".[harness]") and imported when it is used.

    python -m gptcore.evaluate.harness run --model gptcore --model_args run=RUN --tasks gptcore_choice

Next: nothing; this is the edge of the house.
"""

import os
import tempfile
from contextlib import contextmanager
from functools import cache
from importlib import resources
from pathlib import Path
from typing import NamedTuple

from gptcore import checkpoint
from gptcore.device import pick
from gptcore.evaluate.choice import continuations
from gptcore.evaluate.perplexity import score_tokens
from gptcore.generate import GenerateOptions, generate
from gptcore.sampling import PRESETS, Sampling

QUIET = {  # what local tasks need: no hub, and no pool of all cores for an error bar
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "DISABLE_MULTIPROC": "1",
}
MAX_NEW = 256  # tokens to generate where a task does not say
ROWS = 16  # texts to generate at once where nobody says


@cache
def adapter() -> type:
    """The harness's class for our models, registered as "gptcore": adapter()(params, config, tokenizer).

    The harness itself makes one from model_args "run=RUN" and its own batch size (sequences at once) and device. Raises
    ValueError where the harness is not installed.
    """
    try:
        from lm_eval.api.model import TemplateLM
        from lm_eval.api.registry import register_model
        from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
        from lm_eval.utils import simple_parse_args_string
    except ImportError as error:
        raise ValueError(f'harness: expected lm-eval, got {error}; pip install -e ".[harness]" installs it') from error

    @register_model("gptcore")
    class GptCore(TemplateLM):
        """Our functions behind the harness's names; answers come in the order of the requests."""

        def __init__(self, params, config, tokenizer, batch_size=None):
            super().__init__()
            self.model = params, config
            self.gptcore_tokenizer = tokenizer  # not self.tokenizer, where the harness expects one of transformers'
            self.batch_size = batch_size
            self.batch_tokens = None if batch_size is None else batch_size * config.n_context
            self.max_length, self.max_gen_toks = config.n_context, MAX_NEW
            self._device = params["embed"]["w"].device

        @classmethod
        def create_from_arg_obj(cls, arg_dict, additional_config=None):
            return cls(*opened(**arg_dict | {k: v for k, v in (additional_config or {}).items() if v is not None}))

        @classmethod
        def create_from_arg_string(cls, arg_string, additional_config=None):
            return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

        @property
        def eot_token_id(self):
            return self.gptcore_tokenizer.eot

        @property
        def tokenizer_name(self):
            return self.gptcore_tokenizer.fingerprint

        def tok_encode(self, string, add_special_tokens=None, **_):
            return self.gptcore_tokenizer.encode(string)

        def _loglikelihood_tokens(self, requests, disable_tqdm=False, **_):
            pairs = [(context or [self.eot_token_id], ending) for _, context, ending in requests]
            answers = continuations(*self.model, pairs, batch_tokens=self.batch_tokens)
            found = list(zip(answers.log_p.tolist(), answers.greedy.tolist(), strict=True))
            for (texts, _, _), answer in zip(requests, found, strict=True):
                self.cache_hook.add_partial("loglikelihood", texts, answer)
            return found

        def loglikelihood_rolling(self, requests, disable_tqdm=False):
            texts = [request.args[0] for request in requests]
            ids = self.gptcore_tokenizer.encode_batch(texts)
            totals = [0.0] * len(ids)
            if any(ids):
                ways = {"eot": self.eot_token_id, "batch_tokens": self.batch_tokens}
                measures, n_tokens = score_tokens(*self.model, ids, **ways)
                totals = [-nats.double().sum().item() for nats in measures.nats.split(n_tokens.tolist())]
            for text, total in zip(texts, totals, strict=True):
                self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
            return totals

        def generate_until(self, requests, disable_tqdm=False):
            groups = {}  # what may run together draws in the same way
            prompts = self.gptcore_tokenizer.encode_batch([request.args[0] for request in requests])
            for index, (ids, request) in enumerate(zip(prompts, requests, strict=True)):
                asked = normalize_gen_kwargs(request.args[1], MAX_NEW)
                settings = {name: asked[name] for name in Sampling._fields if asked.get(name) is not None}
                sampling = Sampling(**settings) if asked["do_sample"] else PRESETS["greedy"]
                wish = Wish(index, ids or [self.eot_token_id], [text for text in asked["until"] if text])
                groups.setdefault((sampling, asked["max_gen_toks"]), []).append(wish)
            found = [""] * len(requests)
            for (sampling, n_new), wishes in groups.items():
                wishes.sort(key=lambda wish: len(wish.ids))
                size = self.batch_size or ROWS
                for some in (wishes[start : start + size] for start in range(0, len(wishes), size)):
                    texts = continued(*self.model, self.gptcore_tokenizer, some, sampling, n_new)
                    for wish, text in zip(some, texts, strict=True):
                        found[wish.index] = postprocess_generated_text(text, wish.until, None)
            for request, text in zip(requests, found, strict=True):
                self.cache_hook.add_partial("generate_until", request.args, text)
            return found

    return GptCore


class Wish(NamedTuple):
    """A prompt and the strings that end its continuation; its index is its seed."""

    index: int
    ids: list[int]
    until: list[str]


def continued(params, config, tokenizer, wishes, sampling, n_new) -> list[str]:
    """The text after each Wish: up to n_new tokens, or a few beyond one of its strings, or the end of text.

    Prompts keep their end, so that n_new tokens fit the context, or its last half where they never would.
    """
    room = config.n_context - n_new if n_new < config.n_context else max(1, config.n_context // 2)
    options = GenerateOptions(
        sampling=sampling, max_new_tokens=n_new, seed=[wish.index for wish in wishes], stop=(tokenizer.eot,)
    )
    drawn, texts = [[] for _ in wishes], [""] * len(wishes)
    for step in generate(params, config, [wish.ids[-room:] for wish in wishes], options):
        for ids, token in zip(drawn, step.tokens, strict=True):
            ids += [token] * (token >= 0)
        texts = [tokenizer.decode(ids) for ids in drawn]
        said = [any(end in text for end in wish.until) for wish, text in zip(wishes, texts, strict=True)]
        if all(over or token < 0 for over, token in zip(said, step.tokens, strict=True)):
            break
    return texts


def opened(run=None, device="auto", batch_size=None, **_) -> tuple:
    """A run's weights, config and tokenizer, and the harness's batch size; None lets us choose it, which 1 means here.

    1 is what the harness says where nobody has said anything, and a batch size changes no number.
    """
    model = checkpoint.load_model(run, device=pick(device))
    chosen = str(batch_size).isdecimal() and int(batch_size) > 1
    return model.params, model.config, model.tokenizer, int(batch_size) if chosen else None


@contextmanager
def local_tasks():
    """A folder with our four small tasks, for --include_path, in an environment in which nothing asks the network.

    What the user has set stays. The environment counts for libraries that are imported inside the block.
    """
    with tempfile.TemporaryDirectory(prefix="gptcore-tasks-") as folder:
        chosen = {name: value for name, value in QUIET.items() if name not in os.environ}
        if "HF_DATASETS_CACHE" not in os.environ:
            chosen["HF_DATASETS_CACHE"] = str(Path(folder, "cache"))
        os.environ.update(chosen)
        try:
            for source in resources.files("gptcore.evaluate").joinpath("tasks").iterdir():
                text = source.read_text(encoding="utf-8")
                # The harness reads relative paths from the working directory, so they are made absolute here.
                Path(folder, source.name).write_text(text.replace("{folder}", folder), encoding="utf-8")
            yield Path(folder)
        finally:
            for name in chosen:
                del os.environ[name]


def main() -> None:
    """The harness's own command line, with our model and our tasks in it."""
    import sys

    with local_tasks() as folder:
        adapter()
        from lm_eval.__main__ import cli_evaluate

        if "run" in sys.argv[1:2] and "--include_path" not in sys.argv:
            sys.argv += ["--include_path", str(folder)]
        try:
            cli_evaluate()
        except ValueError as error:  # a task that is not there, a run or a device that is not
            sys.stderr.write(f"harness: {error}\n")
            sys.exit(2)


if __name__ == "__main__":
    main()
