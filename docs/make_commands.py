"""Writes docs/commands.md from what every command says of itself: ``make docs``."""

from __future__ import annotations

from pathlib import Path

import click

from stackllm.cli import COMMANDS, cli

TARGET = Path(__file__).with_name("commands.md")


def reference() -> str:
    """Help of the program and of every command, as Markdown."""
    root = cli.make_context("stackllm", [], resilient_parsing=True, terminal_width=100)
    contexts = [root]
    for name in COMMANDS:
        command = cli.get_command(root, name)
        assert command is not None
        contexts.append(click.Context(command, parent=root, info_name=name))
    parts = [f"## {it.command_path}\n\n```\n{it.get_help()}\n```\n" for it in contexts]
    return "\n".join(["# Commands\n\nWritten by `make docs` from `--help`.\n", *parts])


if __name__ == "__main__":
    TARGET.write_text(reference())
