"""invoke build: compile the native kernels, if anything changed."""

import click


@click.command()
def build():
    """Compile the native kernels for this machine; does nothing when nothing changed."""
    from tools import native

    result = native.build()
    if not result.ok:
        click.echo(result.text, err=True)
        return 1
    click.echo("native kernels: built" if result.compiled else "native kernels: nothing changed")
    return 0
