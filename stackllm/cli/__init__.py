"""The command line: each command opens what it needs, calls one library function, and prints."""

from __future__ import annotations

import importlib
import io
import keyword
import re
import sys
from typing import Any

import click

from stackllm import __version__
from stackllm.errors import StackllmError, did_you_mean, first_line

COMMANDS = {
    "features": "Stage one: encoder, recipes and members, out of fold.",
    "stack": "Stage two on top: LightGBM and a blend, leaderboard, submission.",
    "pseudo": "Steps three and four: posteriors and rounds of pseudo-labels.",
    "optim": "Stage three alone, on anybody's submission.",
    "run": "All four steps.",
    "predict": "Apply a run's stored models to new groups.",
    "export": "Export fine-tuned models for peft and the model hub.",
    "import": "Take over predictions that others left, as members.",
    "compare": "Compare two runs, models or files of predictions.",
    "report": "Write a page about a finished run.",
    "runs": "List all runs with their scores.",
    "clean": "Remove runs or parts of the cache.",
    "doctor": "Check what this machine has and what would be used.",
}
"""Name and one-line help of each command; its module is imported only when it is used."""


class LazyGroup(click.Group):
    """A group whose commands live in modules of their own, one each."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order of the recipe."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command's module."""
        if cmd_name not in COMMANDS:
            return None
        name = f"{cmd_name}_" if keyword.iskeyword(cmd_name) else cmd_name
        module = importlib.import_module(f"stackllm.cli.{name}")
        command: click.Command = getattr(module, name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Answer an unknown name with the nearest known one."""
        if args and not args[0].startswith("-") and args[0] not in COMMANDS:
            ctx.fail(f'there is no command "{args[0]}". {did_you_mean(args[0], COMMANDS)}')
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; a setting in an error is called as the option that the command has for it."""
        try:
            return super().invoke(ctx)
        except StackllmError as error:
            command = self.get_command(ctx, ctx.invoked_subcommand or "")
            options = {param.name: param.opts[-1] for param in command.params} if command else {}
            told = re.sub(
                r"\bthe setting (\w+)",
                lambda match: options.get(match[1], match[0]),
                str(error),
            )
            error.args = (told, *error.args[1:])
            raise


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="stackllm")
def cli() -> None:
    """Tell which LLM wrote what.

    Needs train.csv (Question, Response, target) and test.csv (id, Question, Response) in the
    working directory, or a stackllm.toml, or options. A command brings whatever it needs up to
    date first; the same command again goes on where it stopped.

    \b
    Examples:
      stackllm run
      stackllm stack --folds 5
      stackllm pseudo --rounds 2
      stackllm optim submission.csv

    Exit codes: 0 ok, 2 usage, 65 bad data, 66 missing input, 69 server out of reach,
    74 reading or writing failed, 75 locked by another process or --max-requests used up, 130 and
    143 interrupted.

    Shell completion: eval "$(_STACKLLM_COMPLETE=bash_source stackllm)" (or zsh_source, fish_source).
    """


def main() -> None:
    """Run the command line; every foreseen error becomes one sentence and an exit code."""
    from stackllm.cli.signals import StoppedError, catch_signals, farewell
    from stackllm.engine import libraries, ranks

    if ranks.rank():
        sys.exit(ranks.follow())
    catch_signals()
    libraries.hush()
    if isinstance(sys.stdout, io.TextIOWrapper):  # a file or pipe of Windows has a small alphabet
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with ranks.leading():
            status = cli.main(prog_name="stackllm", standalone_mode=False)
    except StackllmError as error:
        click.echo(f"error: {error}" if error.exit_code else str(error), err=True)
        status = error.exit_code
    except click.exceptions.Exit as error:
        status = error.exit_code
    except click.ClickException as error:
        error.show()
        status = error.exit_code
    except click.Abort:
        status = 130
    except StoppedError as error:
        click.echo(farewell(error.number), err=True)
        status = error.status
    except BrokenPipeError:
        status = 74
    except OSError as error:  # what nobody foresaw of a disk that is full or gone
        click.echo(f"error: {_sentence(error)}", err=True)
        status = 74
    except MemoryError:
        click.echo("error: there is not enough memory. Run with --jobs 1 or fewer rows.", err=True)
        status = 74
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # polars', and no Exception
            raise
        click.echo(f"error: polars gave up ({first_line(error)}).", err=True)
        status = 74
    sys.exit(status if isinstance(status, int) else 0)


def _sentence(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename else ""
    return (
        f"{where}the system refused to read or write: {error.strerror or error}. "
        "The same command goes on once this is mended."
    )
