"""invoke data: what is in the cache of token shards, whether it is whole, and how to be rid of it."""

import click

from tools.options import in_cache


@click.command()
@in_cache
@click.option("--verify", is_flag=True, help="Read every shard and compare its sha256.")
@click.option("--clear", metavar="FOLDER", help="Delete this folder's shards, as the list names it, or all.")
def data(cache, verify, clear):
    """List the cached token shards, verify them, or delete them."""
    from rich.console import Console

    from gptcore.data import budget
    from tools import fetching

    console = Console(highlight=False)
    entries = budget.entries(cache)
    if clear:
        return fetching.clear(console, cache, entries, clear)
    if not entries:
        console.print(
            f"No shards in {cache} yet: invoke download fetches some, invoke train makes its own.", markup=False
        )
        return 0
    console.print(fetching.entry_table(entries))
    console.print(f"{budget.folder_bytes(cache) / 1e6:,.1f} MB in {cache}", markup=False)
    return fetching.verify(console, cache, entries) if verify else 0
