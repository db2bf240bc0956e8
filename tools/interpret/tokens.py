"""Tokens on a screen: whole, on one line, never markup, as wide as they say they are."""

from rich.text import Text

SIGNS = {"\n": "⏎", "\t": "⇥"}


def glyphs(raw) -> str:
    """The bytes of a token as characters that can be seen.

    A space at an end is ·, a newline ⏎, a tab ⇥; what has no shape of its own or turns the direction of what follows is
    its number (U+202E), and a byte that is no character is <0xE2>.
    """
    text = raw.decode("utf-8", "surrogateescape")
    seen = [_glyph(c) for c in text]
    for end in (0, -1):
        if text[end:] and text[end] == " ":
            seen[end] = "·"
    return "".join(seen)


def _glyph(c):
    if 0xDC80 <= ord(c) <= 0xDCFF:  # a byte that is no character, as surrogateescape hides it
        return f"<0x{ord(c) - 0xDC00:02X}>"
    return SIGNS.get(c) or (c if c.isprintable() else f"U+{ord(c):04X}")


def token_text(tokenizer, id) -> str:
    """A token as it is shown; an id without bytes goes by its name, or by its number where it has none."""
    if raw := tokenizer.decode_bytes([id]):
        return glyphs(raw)
    names = {number: name for name, number in tokenizer.special.items()}
    return names.get(id, f"<{id}>")


def token_cell(tokenizer, id, style="", width=None) -> Text:
    """token_text as rich Text, cut with … to a width in columns of the terminal."""
    cell = Text(token_text(tokenizer, id), style=style, no_wrap=True)
    if width:
        cell.truncate(width, overflow="ellipsis")
    return cell
