"""What a running training looks like: a panel that redraws itself, or plain lines where there is no terminal."""

import math
import time
from collections import deque
from contextlib import contextmanager

from rich import box
from rich.console import Group
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

N_ROWS = 15


@contextmanager
def busy(console, text):
    """Say what is waited for: a status while it lasts, or a plain line where there is no terminal."""
    if not console.is_terminal:
        console.print(Text(text), soft_wrap=True)
    with console.status(Text(text)):
        yield


def perplexity(loss) -> str:
    """exp(loss) to four digits; an untrained model's may be beyond floats."""
    return f"{math.exp(loss):.4g}" if loss < 700 else "inf"


def duration(seconds) -> str:
    """Seconds as people say them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def fact_table(title, facts):
    """A table of names and values."""
    table = Table(
        box=box.SIMPLE, title=Text(title, style="bold"), title_justify="left", show_header=False, pad_edge=False
    )
    for name, value in facts.items():
        table.add_row(Text(name, style="#2196f3"), Text(str(value)))
    return table


def panel(title, lines, commands):
    """The end of a command: what came out, and what to type next."""
    text = Text("\n".join(lines) + "\n\n")
    text.append("\n".join(commands), style="bold #2196f3")
    return Panel(text, title=title, title_align="left", border_style="#673ab7", expand=False)


def verdict(train_loss, validation_loss) -> str:
    """What the gap between held-out and training loss says, in words."""
    ratio = validation_loss / train_loss
    if ratio < 1.05:
        return "learning well"
    if ratio < 1.15:
        return "learning, a small gap is normal"
    return "possible overfitting" if ratio > 1.3 else "still training"


class View:
    """Shows records as they come. Inside a with block; the terminal is as before afterwards."""

    def __init__(self, console, run, step):
        self.console, self.run, self.first = console, run, step
        self.rows, self.epoch, self.means = deque(maxlen=N_ROWS), [], None
        self.warmup = int(run["options"]["warmup"] * run["n_steps"])
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        self.progress = Progress(*columns, console=console)
        self.bars = [
            self.progress.add_task(word, total=total) for word, total in (("run", run["n_steps"]), ("epoch", 1))
        ]
        self.live = (
            Live(console=console, refresh_per_second=4, get_renderable=self.draw) if console.is_terminal else None
        )
        self.told = 0.0

    def __enter__(self):
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_):
        if self.live:
            self.live.stop()

    def update(self, record) -> None:
        """Show a record of gptcore.train, or of a validation, sample or note."""
        {"train": self.train, "validation": self.validation, "sample": self.sample, "note": self.note}[record["kind"]](
            record
        )

    def train(self, record):
        """A row; without a terminal a line every few seconds."""
        mean = record["loss"] if self.means is None else 0.95 * self.means + 0.05 * record["loss"]
        self.means = mean
        self.epoch.append(record)
        self.rows.append(record | {"mean": mean})
        ends = [0, *self.run["epoch_ends"]]
        start, end = ends[record["epoch"] - 1], ends[record["epoch"]]
        self.progress.update(self.bars[0], completed=record["step"])
        self.progress.update(self.bars[1], completed=record["step"] - start, total=end - start)
        last = record["step"] in (self.run["n_steps"], self.first + 1)
        if not self.live and (last or time.monotonic() - self.told > 5):
            self.told = time.monotonic()
            self.line(record)

    def line(self, record):
        """The plain form of a row."""
        left = (self.run["n_steps"] - record["step"]) * record["seconds"]
        self.console.print(
            f"update {record['step']:>6,}/{self.run['n_steps']:,}  loss {record['loss']:.4f}  "
            f"perplexity {perplexity(record['loss'])}  lr {record['lr']:.2e}  norm {record['grad_norm']:.2f}  "
            f"{record['tokens_per_second']:,.0f} tok/s  {100 * record['mfu']:.0f} % of peak  {duration(left)} left",
            highlight=False, soft_wrap=True,
        )  # fmt: skip

    def draw(self):
        """The panel: the last rows, then bars."""
        table = Table(box=box.SIMPLE_HEAD)
        for column in ("update", "loss", "perplexity", "mean", "mean perpl.", "rate", "norm", "tok/s", "of peak"):
            table.add_column(column, justify="right")
        for row in self.rows:
            star = "*" if row["step"] <= self.warmup else " "
            table.add_row(
                f"{row['step']:,}", f"{row['loss']:.4f}", perplexity(row["loss"]), f"{row['mean']:.4f}",
                perplexity(row["mean"]), f"{row['lr']:.2e}{star}", f"{row['grad_norm']:.2f}",
                f"{row['tokens_per_second']:,.0f}", f"{100 * row['mfu']:.0f} %",
            )  # fmt: skip
        return Group(table, self.progress)

    def validation(self, record):
        """The epoch's panel."""
        rows, self.epoch = self.epoch, []
        lines = [f"validation loss {record['loss']:.4f}, perplexity {perplexity(record['loss'])}, "
                 f"{record['bits_per_byte']:.4f} bits per byte ({duration(record['seconds'])})"]  # fmt: skip
        if rows:
            loss = sum(row["loss"] for row in rows) / len(rows)
            norms = [row["grad_norm"] for row in rows]
            clipped = 100 * sum(row["clipped"] for row in rows) / len(rows)
            seconds = sum(row["seconds"] for row in rows)
            lines = [
                f"train loss {loss:.4f}, perplexity {perplexity(loss)} ({duration(seconds)})", *lines,
                f"gradient norm {sum(norms) / len(norms):.2f} (max {max(norms):.2f}), rate {rows[-1]['lr']:.2e}",
            ]  # fmt: skip
            style = "yellow" if clipped > 10 else ""
            text = Text("\n".join(lines) + "\n")
            text.append(f"clipped {clipped:.0f} % of the updates\n", style=style)
            text.append(verdict(loss, record["loss"]))
        else:
            text = Text("\n".join(lines))
        title = f"Epoch {record['epoch']} of {self.run['epochs']}, update {record['step']:,}"
        self.console.print(Panel(text, title=title, title_align="left", expand=False))

    def sample(self, record):
        """The texts of the last epoch are shown; those before it go to samples.md alone."""
        if record["step"] == self.run["n_steps"]:
            self.console.print(Text(record["text"]), soft_wrap=True)
            self.console.print(Text("-" * 20))

    def note(self, record):
        """One line."""
        self.console.print(Text(record["text"]))
