"""Finished runs in a file of JSON lines, so that a study that is cut off goes on where it was."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from crossrep.errors import DataError

Run = dict[str, Any]
Task = TypeVar("Task")
Result = TypeVar("Result")


def _nothing() -> None:
    pass


class Runs:
    """A run is known by what it is about, the values of `names` in its line, not by the code that did it: whoever changes what a run
    does takes the file away.

    Raises:
        DataError: a line is no run.
    """

    def __init__(self, path: Path, names: Sequence[str]):
        self.path, self.names = path, tuple(names)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.finished: dict[str, Run] = {}
        text = path.read_text() if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        if whole != text:  # the process was killed while it wrote
            path.write_text(whole)
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                found = json.loads(line)
                self.finished[self._identity(found)] = found
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(f"{path}, line {number} is no run: {error!r}; take the line out") from None

    def missing(self, abouts: Sequence[Run]) -> list[int]:
        """The places in `abouts` of runs that are not finished."""
        return [at for at, about in enumerate(abouts) if self._identity(json.loads(json.dumps(about))) not in self.finished]

    def complete(
        self,
        what: str,
        tasks: Sequence[tuple[Run, Task]],
        work: Callable[[Task], Run],
        *,
        workers: int,
        console: Console,
        start: Callable[..., None] = _nothing,
        given: tuple[Any, ...] = (),
    ) -> list[Run]:
        """The runs of `tasks`, in their order; those not in the file are done now.

        Args:
            tasks: what each is about, and what `work` is given.
            workers: processes, each of which calls start(*given) first; 1: this process alone.
        """
        abouts: list[Run] = [json.loads(json.dumps(about)) for about, _ in tasks]  # as it is read again: a tuple is a list there
        wanted = {self._identity(about): (about, task) for about, (_, task) in zip(abouts, tasks)}
        todo = [identity for identity in wanted if identity not in self.finished]
        with self.path.open("a") as file:
            work_left = [wanted[identity][1] for identity in todo]
            for at, found in in_processes(what, work, work_left, workers, console, start, given, len(wanted) - len(todo)):
                self.finished[todo[at]] = wanted[todo[at]][0] | found
                file.write(json.dumps(self.finished[todo[at]]) + "\n")
                file.flush()
        return [self.finished[identity] for identity in wanted]

    def _identity(self, run: Run) -> str:
        return json.dumps([run[name] for name in self.names], sort_keys=True)


def in_processes(
    what: str,
    work: Callable[[Task], Result],
    tasks: Sequence[Task],
    workers: int,
    console: Console,
    start: Callable[..., None] = _nothing,
    given: tuple[Any, ...] = (),
    done: int = 0,
) -> Iterator[tuple[int, Result]]:
    """(place in `tasks`, what `work` made of it), as they finish, under a progress bar; in this process if there is one worker.

    Args:
        done: tasks that the bar counts as finished before.
    """
    if not done and not tasks:
        return
    columns = TextColumn(what), BarColumn(), MofNCompleteColumn(), TextColumn("runs"), TimeElapsedColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=done + len(tasks), completed=done)
        if min(workers, len(tasks)) <= 1:
            start(*given)
            for at, task in enumerate(tasks):
                yield at, work(task)
                progress.advance(bar)
            return
        with ProcessPoolExecutor(min(workers, len(tasks)), get_context("spawn"), initializer=_begin, initargs=(start, given)) as pool:
            futures = {pool.submit(work, task): at for at, task in enumerate(tasks)}
            try:
                for future in as_completed(futures):
                    yield futures[future], future.result()
                    progress.advance(bar)
            finally:
                pool.shutdown(cancel_futures=True)  # after an error, what has not begun; else it would all be run first


def _begin(start: Callable[..., None], given: tuple[Any, ...]) -> None:
    """In a process of the pool. It ends with its parent, however that ends, instead of with its run."""

    def end() -> None:
        parent = parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    Thread(target=end, daemon=True).start()
    start(*given)
