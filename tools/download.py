"""invoke download: token shards of a stream, in the cache before anybody needs them."""

import click

from tools.options import Number, in_cache


@click.command()
@click.option("--tokens", type=click.IntRange(min=2), default=50_000_000, show_default=True, help="Training tokens.")
@click.option(
    "--data",
    default="fineweb-edu",
    show_default=True,
    metavar="SOURCE",
    help="fineweb-edu, wikitext or hf:REPOSITORY[@REVISION][#CONFIG].",
)
@click.option("--text-field", default="text", show_default=True, help="The column that holds the text.")
@click.option(
    "--tokenizer",
    default="cl100k_base",
    show_default=True,
    help="cl100k_base as in medium and full, bpe:4096 as in quick, or any other that invoke train takes.",
)
@in_cache
@click.option(
    "--cache-gb",
    type=Number(min=0, min_open=True),
    help="What the cache may hold (default: 10); older shards go first.",
)
@click.option("--offline", is_flag=True, help="Only look whether everything is there.")
def download(**given):
    """Fetch a stream's first tokens, and go on where an earlier download stopped."""
    from rich.console import Console

    from gptcore.data import streamed, streams
    from tools import fetching

    console = Console(highlight=False)
    if not streams.is_stream(given["data"]):
        raise ValueError(f"data: expected {', '.join(streams.STREAMS)} or hf:REPOSITORY, got {given['data']}")
    stream = streams.open_stream(given["data"], given["text_field"])
    about = f"{stream.repository} ({stream.config or 'default'}, revision {stream.revision or 'newest'})"
    console.print(f"{about}, licence {stream.licence}", markup=False, soft_wrap=True)
    ways = fetching.ways(given, 10.0)
    with fetching.shown(console, f"Fetching {stream.name}") as watch:
        found = streamed.fetch_all(
            given["data"], given["tokenizer"], given["tokens"], cache=given["cache"], text_field=given["text_field"],
            watch=watch, **ways,
        )  # fmt: skip
    counts = f"{found.n_tokens['train']:,} training tokens in {found.n_shards} shards, {found.n_bytes / 1e6:,.1f} MB"
    console.print(f"{counts} in {given['cache']}/{found.folder}", markup=False, soft_wrap=True)
    if found.n_tokens["train"] < given["tokens"]:
        console.print(f"That is all the text of {stream.name}.", markup=False)
