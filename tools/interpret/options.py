"""The options that the commands of interpret share."""

import click

from tools.options import from_run, on_device, with_threads


def _all(*decorators):
    def decorate(command):
        for decorator in reversed(decorators):  # the first one is shown first
            command = decorator(command)
        return command

    return decorate


with_text = _all(
    click.option("--text", metavar="TEXT", help="The text to look at."),
    click.option("--demo", is_flag=True, help="Look at texts of our own."),
    click.option("--interactive", is_flag=True, help="Ask for text after text; quit, exit or q ends."),
)

with_machine = _all(
    from_run,
    on_device,
    with_threads,
    click.option("--seed", type=int, default=42, show_default=True, help="Of whatever is drawn."),
)

with_html = click.option(
    "--html", metavar="FILE", help="Write a page to look at, which needs nothing else; - is standard output."
)

with_model = _all(
    with_machine,
    click.option(
        "--json", metavar="FILE", help="Write every number; - is standard output, which then holds nothing else."
    ),
    click.option("--csv", metavar="FILE", help="Write a row for each cell of the result; - is standard output."),
)
