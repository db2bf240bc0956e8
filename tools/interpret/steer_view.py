"""What invoke interpret.steer does: a direction from two sets of texts, and a prompt with and without it."""

from rich.text import Text

from gptcore.generate import GenerateOptions, generate, text_pieces
from gptcore.interpret.steering import mean_difference, steer
from tools.interpret import looking
from tools.interpret.looking import Document
from tools.interpret.tokens import glyphs


def show(given) -> int:
    """The command: two texts of one seed, plain and steered."""
    looking.check_options(given)
    console = looking.open_console(given)
    model = looking.load(given)
    ids = looking.ids_of(model, given["prompt"], console)
    layer = model.config.n_layer // 2 if given["layer"] is None else given["layer"]
    sets = [[looking.ids_of(model, text, console) for text in given[name]] for name in ("positive", "negative")]
    vector = mean_difference(model.params, model.config, *sets, layer)
    if not vector.any():
        raise ValueError("positive: expected texts that end otherwise than the negative ones, got no direction")
    tap = steer(model.config, vector, layer, given["scale"], given["positions"], n_prompt=len(ids))
    words = f"after layer {layer}, {given['scale']:g} x a direction of length {vector.norm():.3f}, seed {given['seed']}"
    console.print(Text(words))
    texts = {name: continued(model, ids, given, one) for name, one in (("plain", None), ("steered", tap))}
    for name, (text, _) in texts.items():
        line = Text.assemble(f"{name:<8} ", (visible(given["prompt"]), "#666666"), visible(text))
        console.print(line)
    rows = [{"which": name, "continuation": text} for name, (text, _) in texts.items()]
    result = {"layer": layer, "norm": vector.norm().item()}
    result |= {name: {"text": text, "tokens": tokens} for name, (text, tokens) in texts.items()}
    plain = given | {"positions": str(given["positions"])}
    looking.write(plain, model, "interpret.steer", [Document(ids, result, rows)], console)
    return 0


def continued(model, ids, given, tap):
    """(the text that follows, its ids) under a tap, until the end of text."""
    eot = model.tokenizer.eot
    options = GenerateOptions(max_new_tokens=given["max_new_tokens"], seed=given["seed"], stop=(eot,))
    steps = generate(model.params, model.config, [ids], options, tap=tap)
    tokens = [step.tokens[0] for step in steps if step.tokens[0] != eot]
    return "".join(text_pieces(tokens, model.tokenizer)), tokens


def visible(text) -> str:
    """The text on one line, with signs for what has no shape of its own; spaces stay spaces."""
    return glyphs(b"|%b|" % text.encode("utf-8", "replace"))[1:-1]
