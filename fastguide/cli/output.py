"""How completions are printed: as text, as JSON lines, or piece by piece."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import typer

from fastguide.request import Completion, Piece

if TYPE_CHECKING:
    from fastguide.search import Choice


@contextlib.contextmanager
def opened(path: str | None) -> Iterator[TextIO]:
    """The file to write to; standard output for None.

    What the file held is replaced once the models are loaded, not before: a mistake in
    another option must not cost old results.

    Raises:
        ValueError: when it cannot be written, then or later.
        BrokenPipeError: when the reader of standard output has gone.
    """
    try:
        if path is None:
            yield sys.stdout
            sys.stdout.flush()
        else:
            with Path(path).open("a", encoding="utf-8") as file:
                yield file
    except BrokenPipeError:
        raise
    except OSError as error:
        if path is None:
            drop_output()
        name = "standard output" if path is None else repr(path)
        raise ValueError(f"cannot write to {name}: {error.strerror}") from error


def drop_output() -> None:
    """Lead standard output nowhere: Python flushes it at exit, which must not fail once more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Printer:
    """Prints completions in the order of the prompts, and counts them."""

    def __init__(self, file: TextIO, prompts: Sequence[str], samples: int, as_json: bool) -> None:
        """Choose the form of the output.

        Args:
            file: where completions go; errors go to standard error.
            prompts: shown before the completions on terminals.
            samples: per prompt; with several completions each gets a heading.
            as_json: one JSON object per line instead of text.
        """
        self._file = file
        self._prompts = prompts
        self._samples = samples
        self._headings = len(prompts) > 1 or samples > 1
        self._as_json = as_json
        self._held: dict[tuple[int, int], Completion] = {}
        self._rewards: dict[int, float | None] = {}
        self._next = (0, 0)
        self.on_terminal = file.isatty()
        self.finished = self.aborted = self.failed = 0

    def add(self, completion: Completion) -> None:
        """Take a completion; it is printed once those before it have been.

        Those that wait were decoded beside an earlier one, so they have at most as many tokens as
        the engine has rows times the most tokens of a completion.
        """
        self._count(completion)
        if completion.finish_reason == "error":
            typer.echo(f"error: {completion.error}", err=True)
        self._held[completion.prompt, completion.sample] = completion
        while (ready := self._held.pop(self._next, None)) is not None:
            refused = ready.finish_reason == "error" and ready.prompt_tokens == 0
            last = refused or ready.sample == self._samples - 1
            self._next = (ready.prompt + 1, 0) if last else (ready.prompt, ready.sample + 1)
            self._print(ready)

    def choose(self, choice: Choice) -> None:
        """Take the best completion of a prompt, which stands for all its samples."""
        if choice.best is None:
            errors = [c.error for c in choice.completions if c.error is not None]
            unjudged = f"prompt {choice.prompt}: no response could be judged"
            reason = errors[0] if errors else f"{unjudged}, {choice.failures[0]}"
            self.add(Completion(choice.prompt, 0, finish_reason="error", error=reason))
            return
        if choice.failures:
            unjudged = f"{len(choice.failures)} of {len(choice.rewards)} responses are not judged"
            typer.echo(f"prompt {choice.prompt}: {unjudged}, {choice.failures[0]}", err=True)
        self._rewards[choice.prompt] = choice.reward
        self.add(dataclasses.replace(choice.best, sample=0))

    def flush(self) -> None:
        """Print what still waits for others, which will not come."""
        for key in sorted(self._held):
            self._print(self._held[key])
        self._held.clear()

    def _print(self, completion: Completion) -> None:
        if self._as_json:
            fields = as_dict(completion)
            if completion.prompt in self._rewards:
                fields["reward"] = self._rewards[completion.prompt]
            print(json.dumps(fields, ensure_ascii=False), file=self._file, flush=True)
        elif completion.finish_reason != "error":
            self._begin(completion.prompt, completion.sample)
            print(completion.text, file=self._file, flush=True)

    def stream(self, prompt: int, pieces: Iterable[Piece]) -> None:
        """Print one prompt's pieces live, sample after sample; later samples wait their turn."""
        waiting: defaultdict[int, list[Piece]] = defaultdict(list)
        shown, begun = 0, False
        try:
            for piece in pieces:
                waiting[piece.sample].append(piece)
                while waiting[shown]:
                    now = waiting[shown].pop(0)
                    if now.text and not begun:
                        self._begin(prompt, shown)
                        begun = True
                    print(now.text, end="", file=self._file, flush=True)
                    if now.completion is not None:
                        if begun or now.completion.finish_reason != "error":
                            print(file=self._file, flush=True)
                        if now.completion.finish_reason != "error":  # those are raised at the end
                            self._count(now.completion)
                        shown, begun = shown + 1, False
        except KeyboardInterrupt:
            if begun:  # it came while a piece was printed, not while one was computed
                print(file=self._file, flush=True)
                self.aborted += 1
            raise

    def fail(self, sentence: str) -> None:
        """Report a prompt that failed."""
        self.failed += 1
        typer.echo(f"error: {sentence}", err=True)

    def report_interrupt(self) -> None:
        """Say what was done when Ctrl-C came."""
        typer.echo(
            f"interrupted: {self.finished} completions finished, {self.aborted} cut short", err=True
        )

    def _count(self, completion: Completion) -> None:
        if completion.finish_reason == "error":
            self.failed += 1
        elif completion.finish_reason == "aborted":
            self.aborted += 1
        else:
            self.finished += 1

    def _begin(self, prompt: int, sample: int) -> None:
        """A heading where there are several completions, and the prompt on terminals."""
        if self._headings:
            title = f"== prompt {prompt}, sample {sample} =="
            typer.echo(typer.style(title, fg="cyan"), file=self._file)
        if self.on_terminal:
            typer.echo(typer.style(self._prompts[prompt], dim=True), file=self._file, nl=False)


def as_dict(completion: Completion) -> dict[str, object]:
    """What ``--json`` prints of a completion."""
    return {
        "prompt": completion.prompt,
        "sample": completion.sample,
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
        "mean_kl": completion.mean_kl,
        "mean_score": completion.mean_score,
        "seconds": round(completion.seconds, 4),
        "seed": completion.seed,
        "error": completion.error,
    }
