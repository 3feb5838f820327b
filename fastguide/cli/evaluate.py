"""``fastguide evaluate``: a study's results, table and plots."""

from __future__ import annotations

from pathlib import Path

import typer

from fastguide.cli import options


def evaluate(
    study: options.StudyFile,
    out: options.StudyOut,
    plots: options.Plots = True,
) -> None:
    """Compare methods on the same prompts.

    Killed and started again, it continues. Writes results.json, table.md and plots.
    docs/evaluate.md says what a study is.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
    )

    from fastguide.engine.progress import pace
    from fastguide.evaluate import Runner, read_study
    from fastguide.evaluate.report import frontier, matplotlib, sweep, table

    if plots:
        matplotlib()  # said before anything is sampled
    compared = read_study(study)
    folder = Path(out)
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        *pace(),
    )
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        every, one = bar.add_task("points", total=None), bar.add_task("", total=None, visible=False)

        def told(what: str, done: int, of: int) -> None:
            if what == "points":
                bar.update(every, completed=done, total=of)
                bar.update(one, visible=False)
            else:
                bar.update(one, description=what, completed=done, total=of, visible=True)

        results = Runner(compared, folder, told).run()
    text = table(results)
    (folder / "table.md").write_text(text, encoding="utf-8")
    typer.echo(text, nl=False)
    for result in results:
        if result["failed"]:
            typer.echo(f"{result['point']}: {result['failed']} rewards are missing", err=True)
    if plots:
        for name in ("reward", *compared.held_out):
            frontier(results, folder / f"frontier-{name}.png", y=name)
        varied = [(k, v) for result in results for k, v in result["setting"].items()]
        for setting in dict.fromkeys(key for key, value in varied if not isinstance(value, str)):
            sweep(results, setting, folder / f"sweep-{setting}.png")
