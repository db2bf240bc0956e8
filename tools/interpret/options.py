"""The options that the commands of interpret share."""

import click


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
    click.option(
        "--run", metavar="RUN", help="A run or step folder, or a run's name (default: the newest run's best step)."
    ),
    click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N or mps."),
    click.option("--threads", type=click.IntRange(1, 1024), help="CPU threads (default: all cores)."),
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
