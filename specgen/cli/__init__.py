"""The command line. torch and transformers are imported inside the commands that need them: `--help` is quick."""


def main() -> None:
    """Run `specgen` with the arguments of this process."""
    from specgen.cli.app import app

    app(prog_name="specgen")
