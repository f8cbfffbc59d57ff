"""`specgen`: its commands, and one place where errors become a line and an exit code."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from specgen.cli.adapters import adapters
from specgen.cli.bench import bench
from specgen.cli.chat import chat
from specgen.cli.demo_model import demo_model
from specgen.cli.doctor import doctor
from specgen.cli.generate import generate
from specgen.cli.plugins import plugins
from specgen.cli.serve import serve
from specgen.cli.terminal import fail
from specgen.cli.version import print_version, version
from specgen.errors import SpecgenError


class Commands(TyperGroup):
    """specgen's own commands; plugins are loaded only for a word that is none of them, since that takes seconds."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of that name, or None."""
        own = super().get_command(ctx, cmd_name)
        if own is not None:
            return own
        from specgen.cli.extensions import installed

        extension = installed(own=self.commands).get(cmd_name)
        return extension and extension.command

    def invoke(self, ctx: Any) -> Any:
        """Run the command. What specgen raises on purpose becomes a line on stderr and exit code 2; bugs stay bugs."""
        try:
            return super().invoke(ctx)
        except SpecgenError as error:
            raise typer.Exit(fail(error)) from None


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    # Plain help: the same in a pipe, in a terminal and in the documentation.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


@app.callback()
def specgen(
    show_version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=print_version)
    ] = False,
) -> None:
    """Generate with any Hugging Face causal LM, several tokens per forward, output unchanged.

    Plugins may add commands: `specgen plugins` lists them.
    """


for command in (generate, chat, adapters, serve, plugins, doctor, demo_model, version):
    app.command()(command)
app.add_typer(bench, name="bench")
