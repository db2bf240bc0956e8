"""The options that several commands share, and the numbers that options take."""

import math

import click


class Number(click.FloatRange):
    """A range of finite numbers: nan is in every range of click's, because no comparison with it is true."""

    def convert(self, value, param, ctx):
        """The number, or click's error."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"expected a finite number, got {number}", param, ctx)
        return number


from_run = click.option(
    "--run", metavar="RUN", help="A run or step folder, or a run's name (default: the newest run's best step)."
)
in_cache = click.option(
    "--cache", type=click.Path(file_okay=False), default="data", show_default=True, help="Folder of the token shards."
)
offline = click.option(
    "--offline", is_flag=True, help="Fetch nothing, even where the run's held-out text is no longer in the cache."
)
on_device = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N or mps.")
with_threads = click.option("--threads", type=click.IntRange(1, 1024), help="CPU threads (default: all cores).")
