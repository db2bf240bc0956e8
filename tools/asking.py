"""Questions in the terminal: a list with arrow keys, or a line of text. Ctrl-C raises KeyboardInterrupt."""

COLOURS = [("pointer", "#673ab7 bold"), ("highlighted", "#673ab7"), ("answer", "#2196f3"), ("instruction", "#666666")]


def select(message, rows, default=None):
    """One of the rows (value, what it means in a few words), with the arrow keys and Enter; returns its value."""
    import questionary

    width = max(len(str(value)) for value, _ in rows)
    choices = [questionary.Choice(f"{value!s:<{width}}  {hint}".rstrip(), value=value) for value, hint in rows]
    style = questionary.Style(COLOURS)
    first = next((choice for choice in choices if choice.value == default), None)
    return questionary.select(message, choices, default=first, style=style, qmark="").unsafe_ask()


def text(message, default="", check=None):
    """A line of text; check returns True, or what is wrong, which is shown until it is right."""
    import questionary

    style = questionary.Style(COLOURS)
    return questionary.text(message, default, validate=check, style=style, qmark="").unsafe_ask()
