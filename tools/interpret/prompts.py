"""Pairs of prompts: texts as ids, the tokens that continue them, and which positions stand for each other."""

from typing import NamedTuple

import torch
from rich.text import Text

from gptcore.interpret import pairs
from gptcore.interpret.attribution import measured
from tools.interpret.looking import ids_of
from tools.interpret.tokens import token_text


class Case(NamedTuple):
    """One pair, ready to run: ids of both prompts, (1,T) each, the target's id, the foil's, and which positions of the
    two stand for each other (None: all)."""

    clean: torch.Tensor
    corrupt: torch.Tensor
    target: int
    foil: int
    links: list[tuple[int, int]] | None


def case_of(model, clean, corrupted, target, foil, console, counter, *, exact=False) -> Case:
    """Two texts and what continues them as ids; foil None: the corrupted text's own answer. What was decided is said.

    Raises ValueError for an empty text, and for a foil that begins as the target does.
    """
    found = continued(model, clean, target, console, exact=exact)
    texts = {"clean": found.prompt, "corrupted": corrupted.rstrip(" ")}
    ids = [ids_of(model, text, console, name) for name, text in texts.items()]
    tokens = [torch.tensor([each], device=model.params["embed"]["w"].device) for each in ids]
    if foil is None:
        foil = pairs.foil_of(last_logits(model, tokens[1])[0], found.ids[0])
        counter.n_rows += 1
    else:
        foil = pairs.continuation(model.tokenizer, corrupted, foil, exact=exact).ids[0]
    if foil == found.ids[0]:
        raise ValueError(f"foil: expected another token than the target, got {token_text(model.tokenizer, foil)} twice")
    links = None if len(ids[0]) == len(ids[1]) else pairs.align_ends(*ids)
    return Case(*tokens, found.ids[0], foil, links)


def continued(model, prompt, target, console, *, exact=False) -> pairs.Target:
    """What continues a prompt; what was decided is said."""
    found = pairs.continuation(model.tokenizer, prompt, target, exact=exact)
    for note in found.notes:
        console.print(Text(note))
    return found


def shared(model, prompt, *answers) -> str:
    """The token by which all the answers to a prompt begin, as it is shown; empty where they do not.

    Bytes, and words never met in training, can begin alike.
    """
    first = {pairs.continuation(model.tokenizer, prompt, answer).ids[0] for answer in answers}
    return token_text(model.tokenizer, first.pop()) if len(first) == 1 else ""


def last_logits(model, tokens):
    """What the model says after the last token, (B,V)."""
    return measured(model.params, model.config, tokens, lambda logits: logits)
