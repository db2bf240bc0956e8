"""The click tree as Invoke tasks: `invoke train --mode quick` is click's train command.

Invoke finds the task and splits the words; click alone checks types, choices and defaults. A task's body rebuilds the
words for click from what Invoke understood. Here, in one place, whatever goes wrong becomes one line and an exit
status: 2 for wrong input, 130 for Ctrl-C.
"""

import inspect
import warnings
from contextlib import contextmanager

import click
import invoke
from invoke.exceptions import ParseError

from tools.machine import out_of_memory


def mirror(group) -> invoke.Collection:
    """The commands of a click group as Invoke tasks; groups inside it become sub-collections (interpret.logit-lens)."""
    return _collection(group, ())


def _collection(group, path):
    collection = invoke.Collection(*path[-1:])
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            collection.add_collection(_collection(command, (*path, name)))
        else:
            first = (*path, name) == ("menu",)  # what `invoke` alone does
            collection.add_task(as_task(command, ".".join((*path, name))), name=name, default=first)
    return collection


def as_task(command, path) -> invoke.Task:
    """One click command as an Invoke task. path is its name on the command line, in dots."""
    options = {key(p): p for p in command.params if isinstance(p, click.Option)}
    arguments = [p.name for p in command.params if isinstance(p, click.Argument)]

    def body(context, **given):
        if any(given[name] in ("--help", "-h") for name in arguments):  # Invoke takes it for the argument
            return run(command, ["--help"], path)
        argv = [word for name, option in options.items() for word in words(option, given[name])]
        run(command, [*argv, "--", *(given[name] for name in arguments)], path)

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    body.__name__, body.__doc__ = command.name.replace("-", "_"), command.help
    body.__signature__ = inspect.Signature(
        [inspect.Parameter(name, kind) for name in ("context", *arguments)]
        + [inspect.Parameter(name, kind, default=on(o) if o.is_flag else None) for name, o in options.items()]
    )
    return invoke.task(
        name=path,  # Invoke would run two tasks of one name once
        positional=arguments,
        auto_shortflags=False,  # they would steal letters from each other
        iterable=[name for name, option in options.items() if option.multiple],
        optional=[name for name, option in options.items() if alone(option)],
        help={name: describe(command, option) for name, option in options.items()},
    )(body)


def key(option) -> str:
    """The name under which Invoke knows the option: --n-layer -> n_layer."""
    return option.opts[0].lstrip("-").replace("-", "_")


def on(flag) -> bool:
    """Is the flag on by default? click's absent default is a truthy sentinel, so only True counts."""
    return flag.default is True


def alone(option) -> bool:
    """May the option stand without its value, as in --resume or --resume RUN?"""
    return not option.is_flag and isinstance(option.flag_value, str)


def words(option, value) -> list[str]:
    """The words that give the option this value on click's command line; none where Invoke saw nothing."""
    name, off = option.opts[0], (option.secondary_opts or [None])[0]
    if option.is_flag:
        return [] if value == on(option) else [name if value else off]
    if value is True:  # an optional value was left out
        return [name]
    values = value if option.multiple else [] if value is None else [value]
    return [f"{name}={v}" if name.startswith("--") else f"{name}{v}" for v in values]


def describe(command, option) -> str:
    """The option's help as Invoke shows it: what click shows, its choices or type, range and default included."""
    context = click.Context(command, show_default=True)
    kind = "" if option.is_flag or option.type is click.STRING else option.make_metavar(context)
    _, text = option.get_help_record(context) or ("", "")
    return f"{kind} {text}".strip()


def run(command, argv, path):
    """Run a click command; what goes wrong leaves as invoke.Exit with one line and the exit status."""
    try:
        with explained():
            status = command.main(argv, prog_name=f"invoke {path}", standalone_mode=False)
    except click.ClickException as error:
        raise invoke.Exit(one_line(path, error.format_message()), code=error.exit_code) from None
    except (click.Abort, KeyboardInterrupt):
        raise invoke.Exit(f"invoke {path}: stopped", code=130) from None
    except ValueError as error:
        raise invoke.Exit(one_line(path, error), code=2) from None
    except OSError as error:
        if error.filename is None:  # not about a file that the user can do something about
            raise
        raise invoke.Exit(one_line(path, f"{error.filename}: {error.strerror}"), code=2) from None
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise invoke.Exit(one_line(path, str(error) or "out of memory"), code=2) from None
    if isinstance(status, int) and status:
        raise invoke.Exit(code=status)


@contextmanager
def explained():
    """In place of torch's warning about hipBLASLt, harmless on every card that it names, one line; others as they come.

    Without hipBLASLt for a card torch takes hipBLAS: no result, speed or setting of ours changes.
    """
    show, told = warnings.showwarning, []

    def explain(message, *where, **more):
        if "hipBLASLt on an unsupported architecture" not in str(message):
            show(message, *where, **more)
        elif not told:
            told.append(message)
            click.echo("this torch has no hipBLASLt for this card and uses hipBLAS: nothing else changes", err=True)

    warnings.showwarning = explain
    try:
        yield
    finally:
        warnings.showwarning = show


def one_line(path, message) -> str:
    """A message in one line, with the command it comes from."""
    return f"invoke {path}: {' '.join(str(message).split())}"


def refuse_with_2(program):
    """Let Invoke leave unknown tasks and options with exit status 2, like all wrong input; its own status is 1.

    Invoke reads the words before any task runs and knows no setting for this, so the method of this one program object
    is wrapped. Nothing else of Invoke is touched.
    """
    parse = program.parse_tasks

    def parse_tasks():
        try:
            parse()
        except ParseError as error:
            task = getattr(error.context, "name", None)
            hint = f"invoke {task} --help lists its options" if task else "invoke --list lists the tasks"
            raise invoke.Exit(f"invoke{f' {task}' if task else ''}: {error} ({hint})", code=2) from None

    program.parse_tasks = parse_tasks
