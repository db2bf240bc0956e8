"""How Sphinx makes a site of the lessons: MyST reads Markdown, furo lays it out, and nothing comes from elsewhere.

Equations become MathML while the site is built: browsers draw it themselves, and no script is loaded for it. Pages are
written for GitHub first, so what only a site needs, its table of contents, is added here.
"""

from docutils import nodes
from latex2mathml.converter import convert

project, author, copyright = "gptcore", "gptcore", "gptcore, MIT licence"
extensions = ["myst_parser"]
myst_enable_extensions = ["dollarmath"]
html_theme, html_title = "furo", "gptcore"
html_math_renderer = "mathml"
html_show_sphinx, html_copy_source = False, False
highlight_language = "none"  # a block that names no language is typed in a terminal
CONTENTS = "\n\n```{toctree}\n:hidden:\n:glob:\n\n[0-9]*\n*\n```\n"


def add_contents(app, name, source):
    """Give the first page the order of all others; source is a list of its one text."""
    if name == "index":
        source[0] += CONTENTS


def inline(translator, node):
    """An equation inside a sentence."""
    translator.body.append(convert(node.astext()))
    raise nodes.SkipNode


def display(translator, node):
    """An equation on a line of its own."""
    translator.body.append(f'<div class="math">{convert(node.astext(), display="block")}</div>')
    raise nodes.SkipNode


def setup(app):
    """What Sphinx calls once."""
    app.connect("source-read", add_contents)
    app.add_html_math_renderer("mathml", (inline, None), (display, None))
    return {"parallel_read_safe": True}
