"""config.json of a transformers model, read with suspicion: a file from elsewhere may say anything.

What you learn here: what a model is stands in two places, in its numbers and in what its code does by default. A
setting that is left out means the default of the model's class; one that asks for what we do not have is refused by
name, never skipped.
"""

from typing import Any

ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh"}
MAX_CONTEXT = 2**24  # a cache of more positions fits no machine


class Settings:
    """The settings of a config.json by name. Raises ValueError naming the setting, with expected and got."""

    def __init__(self, given: dict[str, Any]):
        self.given = given

    def get(self, name, default):
        """The setting, or the default where it is left out or null."""
        value = self.given.get(name)
        return default if value is None else value

    def count(self, name, default=None, most=2**31):
        """A whole number from 1 to `most`."""
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            raise ValueError(f"{name}: expected a whole number from 1 to {most}, got {value!r}")
        return value

    def number(self, name, default):
        """A number above 0 that a float can hold."""
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
            raise ValueError(f"{name}: expected a number above 0, got {value!r}")
        return float(value)

    def flag(self, name, default):
        """True or False."""
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise ValueError(f"{name}: expected true or false, got {value!r}")
        return value

    def choice(self, name, default, choices):
        """What stands beside the setting's value in the dict of choices."""
        value = self.get(name, default)
        if not isinstance(value, str) or value not in choices:
            raise ValueError(f"{name}: expected one of {', '.join(map(str, choices))}, got {value!r}")
        return choices[value]

    def must_be(self, name, wanted):
        """Refuse every other value than the one that our code has."""
        value = self.get(name, wanted)
        if value != wanted:
            raise ValueError(f"{name}: expected {wanted!r}, the only value that is served, got {value!r}")

    def part(self, name) -> "Settings":
        """The settings in a setting; none where it is left out."""
        value = self.get(name, {})
        if not isinstance(value, dict):
            raise ValueError(f"{name}: expected settings by name, got {value!r}")
        return Settings(value)


def common_words(settings, own) -> Settings:
    """The settings of a family with own words {common: own} for what others call hidden_size and so on: transformers
    takes both, and the common word where both are given.
    """
    given = settings.given
    return Settings(given | {name: given[word] for word, name in own.items() if given.get(word) is not None})


def read_rope(settings, *, base_name="rope_theta", fraction_name="partial_rotary_factor", fraction=None) -> dict:
    """The rotary fields of ModelConfig, from both spellings as transformers reads them: rope_scaling before
    rope_parameters, and the settings beside them for what these leave out.

    fraction is the share of a head that turns unless it says otherwise; None: the family turns all of it, always.
    """
    beside = {"rope_theta": settings.given.get(base_name), "partial_rotary_factor": settings.given.get(fraction_name)}
    inside = settings.part("rope_scaling").given or settings.part("rope_parameters").given
    source = Settings(beside | {name: value for name, value in inside.items() if value is not None})
    if fraction is None:
        source.must_be("partial_rotary_factor", 1.0)
    kind = source.get("rope_type", source.get("type", "default"))
    kinds = {"default": "none", "linear": "linear", "llama3": "llama3"}
    if not isinstance(kind, str) or kind not in kinds:
        raise ValueError(f"rope_type: expected one of {', '.join(kinds)}, got {kind!r}")
    fields = {
        "position": "rope", "rope_base": source.number("rope_theta", 10_000.0),
        "rope_fraction": source.number("partial_rotary_factor", fraction or 1.0), "rope_scaling": kinds[kind],
    }  # fmt: skip
    if kind != "default":
        fields["rope_factor"] = source.number("factor", None)
    if kind == "llama3":
        fields["rope_low"] = source.number("low_freq_factor", None)
        fields["rope_high"] = source.number("high_freq_factor", None)
        fields["rope_trained"] = source.count("original_max_position_embeddings")
    return fields


def write_rope(config, *, partial=False) -> dict:
    """Settings that read_rope reads, in both spellings: each version of transformers looks for its own.

    partial says that the family can turn a share of a head; the others have no word for it.
    """
    kind = {"none": "default"}.get(config.rope_scaling, config.rope_scaling)
    scaling = {"rope_type": kind}
    if kind != "default":
        scaling["factor"] = config.rope_factor
    if kind == "llama3":
        scaling |= {
            "low_freq_factor": config.rope_low, "high_freq_factor": config.rope_high,
            "original_max_position_embeddings": config.rope_trained,
        }  # fmt: skip
    base = {"rope_theta": config.rope_base}
    part = {"partial_rotary_factor": config.rope_fraction} if partial else {}
    old = {"rope_scaling": scaling} if kind != "default" else {}
    return {"rope_parameters": base | part | scaling} | base | part | old
