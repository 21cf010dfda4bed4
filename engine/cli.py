"""The command `loraplex`: one Typer app, without logic. The commands are in `engine.commands`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import typer


def make_app() -> typer.Typer:
    """The app with all its commands; importing them is quick, what is heavy they import when they run."""
    import typer

    from engine.commands import (
        adapters,
        base,
        cluster,
        doctor,
        evaluate,
        generate,
        health,
        keys,
        merge,
        policy,
        readapt,
        root,
        router,
        serve,
        simulate,
        top,
        train,
    )
    from loadtest.cli import app as loadtest

    app = typer.Typer(
        cls=root.Root,
        callback=root.root,
        no_args_is_help=True,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.command("serve")(serve.command)
    app.command("router")(router.command)
    app.add_typer(policy.app, name="policy")
    app.add_typer(keys.app, name="keys")
    app.command("generate")(generate.generate)
    app.add_typer(adapters.app, name="adapters")
    app.command("train")(train.train)
    app.command("eval")(evaluate.evaluate)
    app.command("compare")(evaluate.compare)
    app.command("merge")(merge.merge)
    app.command("readapt")(readapt.readapt)
    base.app.command("check")(readapt.check)
    app.add_typer(base.app, name="base")
    app.add_typer(cluster.app, name="cluster")
    app.command("simulate")(simulate.simulate)
    app.command("top")(top.top)
    app.command("doctor")(doctor.doctor)
    app.command("health")(health.health)
    app.add_typer(loadtest, name="loadtest")
    return app


def main() -> None:
    """Run the command line; the console script."""
    try:
        app = make_app()
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("engine"):
            raise
        sys.stderr.write(
            f"error: the command line needs {error.name}, which the client's install leaves out\n"
            "fix: pip install 'loraplex[cpu]' (or [gpu] on a machine with an NVIDIA GPU, [server] without an engine)\n"
        )
        sys.exit(1)
    app(prog_name="loraplex")


if __name__ == "__main__":
    main()
