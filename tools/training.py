"""The work on a run: update after update, with validation, samples and saves at the epochs' ends.

gptcore yields records and knows no console; here they are written down, shown and acted on. Ctrl-C and SIGTERM end the
run between two updates, with everything saved.
"""

import signal
import time
from contextlib import contextmanager

from gptcore import checkpoint, optim
from gptcore.data.download import Lost
from gptcore.evaluate.perplexity import Stopped, score_documents
from gptcore.files import write_whole
from gptcore.generate import GenerateOptions, generate
from gptcore.lora import second
from gptcore.sampling import Sampling
from gptcore.train import NotFinite, flops_per_token, train
from tools import fetching
from tools.machine import out_of_memory
from tools.modes import PROMPTS
from tools.plot import write_loss_plot
from tools.tables import final_panel, site_table
from tools.view import View


def work(job, console) -> int:
    """Train until the end or a signal; returns the exit status."""
    if job.debug:
        console.print(site_table(job))
    with signals() as asked, checkpoint.Saver(job.path) as saver, View(console, job.run, job.state.step) as view:
        begin_downloads(job, view, stop=lambda: bool(asked))
        follow(job, saver, view, stop=lambda: bool(asked))
        saver.join()  # only what is on the disk has ended
        ended = job.state.step == job.options.n_steps and not epoch_is_open(job)
        reason = asked[0] if asked and not ended else "end"
        checkpoint.append_metrics(job.path, {"kind": "stop", "step": job.state.step, "reason": reason})
    write_loss_plot(job.path)
    console.print(final_panel(job, reason))
    return {"SIGINT": 130, "SIGTERM": 143}.get(reason, 0)


def follow(job, saver, view, stop) -> None:
    """Updates, and at an epoch's end validation, save and samples. The run is whole at every record."""
    try:
        if job.state.step == 0:  # killed before its next save, the run can still go on
            if "init" in job.run and "validated_at" not in job.known:  # what it begins with is a result too
                validate(job, view, stop)
            save(job, saver)
        if epoch_is_open(job):  # stopped between an epoch's last update and its samples
            end_epoch(job, saver, view, stop)
        flops = flops_per_token(job.config, job.dataset.n_context)
        for record in train(job.params, job.config, job.dataset.batch, job.state, job.options, stop=stop):
            if record["kind"] == "train":
                record |= {"epoch": epoch_of(job), "mfu": record["tokens_per_second"] * flops / job.peak}
                job.known |= {"train_loss": record["loss"], "lr": record["lr"]}
            tell(job, view, record)
            if epoch_is_open(job):
                end_epoch(job, saver, view, stop)
            elif job.state.step % job.save_every == 0:
                save(job, saver)
        save(job, saver)
    except Stopped:  # in the middle of a validation or of samples, which the resumed run will make
        save(job, saver)
    except Lost as error:  # what has been learned is kept until the hub is back
        save(job, saver)
        saver.join()
        raise ValueError(f"{error}; invoke train --resume {job.path.name} goes on from here") from None
    except (NotFinite, MemoryError, RuntimeError) as error:
        if not isinstance(error, NotFinite) and not out_of_memory(error):
            raise
        saver.join()  # what is named below is on the disk
        checkpoint.append_metrics(job.path, {"kind": "stop", "step": job.state.step, "reason": str(error)})
        kept = checkpoint.step_name(checkpoint.marked(job.path, "latest"))
        hint = "; --device cpu may show whether MPS is to blame" if job.device.type == "mps" else ""
        raise ValueError(f"training stopped, {error}; {job.path} keeps {kept}{hint}") from None


def begin_downloads(job, view, stop) -> None:
    """Let missing shards arrive in the background; a batch that waits for one says so, and can be stopped."""
    for download in job.dataset.downloads:
        told = set()

        def watch(progress, download=download, told=told):
            if stop():
                raise Stopped
            if (where := (progress.n_chunks, progress.trouble)) not in told:
                told.add(where)
                view.update({"kind": "note", "text": f"Waiting for a shard: {fetching.describe(progress)}"})

        download.watch = watch
        if download.gap() is not None:
            download.start()


def end_epoch(job, saver, view, stop) -> None:
    """Validation, a save that stays, samples and the plot: what a stop left out, the resumed run begins with."""
    step = job.state.step
    if job.known.get("validated_at") != step:
        validate(job, view, stop)
        save(job, saver)
    for prompt, text in samples(job, stop):
        tell(job, view, {"kind": "sample", "step": step, "prompt": prompt, "text": text})
    write_samples(job.path)
    write_loss_plot(job.path)
    job.known |= {"sampled_at": step}


def validate(job, view, stop) -> None:
    """Measure the weights as they are, and remember whether they are the best so far."""
    step = job.state.step
    record = {"kind": "validation", "step": step, "epoch": epoch_of(job), **validation(job, stop)}
    best = record["loss"] < job.known.get("best_loss", float("inf"))
    job.known |= {"validation_loss": record["loss"], "bits_per_byte": record["bits_per_byte"]}
    job.known |= {"validated_at": step} | ({"best_loss": record["loss"], "best_step": step} if best else {})
    tell(job, view, record)


def epoch_is_open(job) -> bool:
    """Has an epoch's last update been made, but not its validation and samples?"""
    return job.state.step in job.run["epoch_ends"] and job.known.get("sampled_at") != job.state.step


def epoch_of(job) -> int:
    """The epoch, from 1 on, that the last finished update belongs to."""
    return next(n for n, end in enumerate(job.run["epoch_ends"], 1) if job.state.step <= end)


def tell(job, view, record) -> None:
    """Write a record down, then show it."""
    checkpoint.append_metrics(job.path, record)
    view.update(record)


def write_samples(run_dir) -> None:
    """samples.md from the run's metrics, in which no text is twice, however often the run was resumed."""
    rows = [row for row in checkpoint.read_metrics(run_dir) if row["kind"] == "sample"]
    texts = (f"## update {row['step']:,}: {row['prompt']}\n\n{row['text']}\n" for row in rows)
    write_whole(run_dir / "samples.md", "\n".join(texts))


def save(job, saver) -> None:
    """The step as it is now; an epoch's end stays for good."""
    ends = job.state.step in job.run["epoch_ends"]
    tokens = job.state.step * job.dataset.n_sequences * job.dataset.n_context
    state = job.known | {"epoch": epoch_of(job) if job.state.step else 0, "epoch_end": ends, "tokens": tokens}
    moving = optim.state(job.state.optimizer)
    saver.save(job.state.step, params=second(job.params, job.config), optimizer=moving, rng={}, state=state)


def validation(job, stop) -> dict:
    """Loss, perplexity and bits per byte of the documents held out, as invoke evaluate measures them."""
    began = time.perf_counter()
    scores = score_documents(
        job.params, job.config, job.dataset.validation, eot=job.dataset.tokenizer.eot,
        token_bytes=job.dataset.tokenizer.n_bytes, max_tokens=job.run["n_validation_tokens"], stop=stop,
    )  # fmt: skip
    return {
        "loss": scores.loss, "perplexity": scores.perplexity, "bits_per_byte": scores.bits_per_byte,
        "n_tokens": int(scores.n_tokens.sum()), "seconds": time.perf_counter() - began,
    }  # fmt: skip


def samples(job, stop):
    """(prompt, its continuation) for each of PROMPTS: 100 tokens at temperature 0.5."""
    encode, decode = job.dataset.tokenizer.encode, job.dataset.tokenizer.decode
    prompts = [encode(prompt) for prompt in PROMPTS]
    options = GenerateOptions(
        sampling=Sampling(temperature=0.5), seed=job.run["seed"], stop=(job.dataset.tokenizer.eot,)
    )
    rows = [list(ids) for ids in prompts]
    for step in generate(job.params, job.config, prompts, options):
        for row, token in zip(rows, step.tokens, strict=True):
            row += [token] if token >= 0 and token not in options.stop else []
        if stop():
            raise Stopped
    for prompt, row in zip(PROMPTS, rows, strict=True):
        yield prompt, decode(row)


@contextmanager
def signals():
    """A list that SIGINT and SIGTERM add their name to; a second one interrupts at once."""
    asked = []

    def handle(number, frame):
        if asked:
            raise KeyboardInterrupt
        asked.append(signal.Signals(number).name)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
