"""The numbers that options take."""

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
