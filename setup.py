"""What pip builds. Everything is pure Python and declared in pyproject.toml."""

from setuptools import setup

setup()
