"""A map over chunks with several processes: results in order, errors as they are, nothing left behind."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import traceback
import types
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, Literal

from likely.memory import keep_memory

#: Results that may wait for their turn, for each process; arguments are drawn from their iterable no further ahead.
AHEAD = 4
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")

Outcome = tuple[Literal["result", "error"], Any]


def usable_cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_chunks(
    function: Callable[..., Any],
    arguments: Iterable[Any],
    workers: int | None = None,
    *,
    build: Callable[[bytes], Any] | None = None,
    state: bytes = b"",
    built: Any = None,
) -> Iterator[Any]:
    """``function(argument)`` for every argument, in order; with ``build``, ``function(built, argument)``.

    One of the workers is this process; the others have one thread each.  Where that is safe they are forks of this one
    and at work at once; else they are spawned, and this process works while they import what they need.  An exception
    is raised where its result would have come, as it is.  However the iteration ends, also by Ctrl-C, the processes
    end with it.

    >>> list(map_chunks(len, [b"ab", b"c"], workers=1))
    [2, 1]

    Args:
        function: importable by its name (not a lambda, not defined in a script); so are its arguments' classes.
        arguments: drawn a few ahead of the results, so that they need not fit in memory together.  Those of a sequence
            are told to a fork by their number alone.
        workers: number of processes at work, this one included; by default one for each core.
        build: importable as well; called once in each worker that has nothing built.
        state: what ``build`` is given, such as a model's bytes.
        built: what ``build(state)`` gives, if this process has it already; its forks have it with it.

    Raises:
        ValueError: fewer than one worker.
        RuntimeError: a process died, as it does when the system runs out of memory.
    """
    keep_memory()
    workers = usable_cores() if workers is None else workers
    if workers < 1:
        raise ValueError(f"workers: expected at least 1, got {workers}")
    if workers == 1:
        return map(_bind(function, build, state, built), arguments)
    return _Map(function, arguments, workers, build, state, built).run()


def _bind(
    function: Callable[..., Any], build: Callable[[bytes], Any] | None, state: bytes, built: Any
) -> Callable[[Any], Any]:
    if build is None:
        return function
    built = build(state) if built is None else built
    return lambda argument: function(built, argument)


def _forks() -> bool:
    """Whether a fork of this process can go on by itself: no other thread of Python's holds a lock, CUDA is not up."""
    torch = sys.modules.get("torch")
    return (
        sys.platform == "linux"
        and threading.active_count() == 1
        and not (torch is not None and torch.cuda.is_initialized())
    )


class _Feeder(threading.Thread):
    """A thread that only waits for pipes: see :func:`likely.processor.alone`."""

    multiplies = False


class _Map:
    """One map: arguments wait in a queue, from which this process and a thread for each other process take them."""

    def __init__(
        self,
        function: Callable[..., Any],
        arguments: Iterable[Any],
        workers: int,
        build: Callable[[bytes], Any] | None,
        state: bytes,
        built: Any,
    ) -> None:
        self._job, self._built = (function, build, state), built
        self._arguments = iter(arguments)
        self._known = arguments if isinstance(arguments, Sequence) else None
        self._workers = workers
        self._waiting: deque[tuple[int, Any]] = deque()
        self._outcomes: dict[int, Outcome] = {}
        self._changed = threading.Condition()
        self._over = False
        self._drawn = 0  # arguments taken from their iterable, and its error if it had one

    def run(self) -> Iterator[Any]:
        processes: list[BaseProcess] = []
        threads: list[_Feeder] = []
        call: Callable[[Any], Any] | None = None
        given = 0
        try:
            with _one_thread():
                self._draw(1)
                if self._waiting:
                    self._start(processes, threads)
                while True:
                    self._draw(given + AHEAD * self._workers)
                    if given == self._drawn:
                        return
                    with self._changed:
                        outcome = self._outcomes.pop(given, None)
                        task = self._waiting.popleft() if outcome is None and self._waiting else None
                        if outcome is None and task is None:
                            self._changed.wait(1.0)  # with a limit, or Windows does not hear of Ctrl-C
                            continue
                    if task is not None:
                        number, argument = task
                        try:
                            call = call or _bind(*self._job, self._built)
                            done: Outcome = ("result", call(argument))
                        except Exception as error:
                            done = ("error", error)
                        with self._changed:
                            self._outcomes[number] = done
                        continue
                    assert outcome is not None
                    given += 1
                    kind, value = outcome
                    if kind == "error":
                        raise value
                    yield value
        finally:
            with self._changed:
                self._over = True
                self._changed.notify_all()
            for process in processes:
                process.terminate()
            for process in processes:
                process.join(5.0)
                if process.is_alive():
                    process.kill()
                    process.join()
            for thread in threads:
                thread.join()
            for process in processes:
                process.close()

    def _draw(self, until: int) -> None:
        """Take arguments from their iterable, so many in all, while fewer wait than there are workers.

        An error of the iterable comes in its turn.
        """
        while self._drawn < until and len(self._waiting) < self._workers:
            try:
                argument = next(self._arguments)
            except StopIteration:
                return
            except Exception as error:
                self._arguments = iter(())
                with self._changed:
                    self._outcomes[self._drawn] = ("error", error)
                self._drawn += 1
                return
            with self._changed:
                self._waiting.append((self._drawn, argument))
                self._changed.notify()
            self._drawn += 1

    def _start(self, processes: list[BaseProcess], threads: list[_Feeder]) -> None:
        """Start the other processes, then, since a fork should have none, the threads that feed them."""
        forked = _forks()
        context: Any = multiprocessing.get_context("fork" if forked else "spawn")
        pipes = [multiprocessing.Pipe() for _ in range(self._workers - 1)]
        for _, theirs in pipes:
            others = [end for pair in pipes for end in pair if end is not theirs] if forked else []
            job = (*self._job, *((self._built, self._known) if forked else (None, None)))
            process = context.Process(target=_serve, args=(theirs, others, *job), daemon=True)
            with _sober_start(forked):
                process.start()
            processes.append(process)
        for ours, theirs in pipes:
            theirs.close()
            by_number = forked and self._known is not None
            threads.append(_Feeder(target=self._feed, args=(ours, by_number), daemon=True))
            threads[-1].start()

    def _feed(self, connection: Connection, by_number: bool) -> None:
        """Hand a process one argument after another and gather what it answers; runs in a thread of its own."""
        with connection:
            while True:
                with self._changed:
                    while not self._waiting and not self._over:
                        self._changed.wait()
                    if self._over:
                        return
                    number, argument = self._waiting.popleft()
                try:
                    connection.send(number if by_number else argument)
                    outcome: Outcome = connection.recv()
                except (EOFError, OSError):
                    message = "a worker process died without an answer, perhaps for want of memory; use fewer workers"
                    outcome = ("error", RuntimeError(message))
                except Exception as error:  # what cannot be sent to another process
                    outcome = ("error", error)
                with self._changed:
                    self._outcomes[number] = outcome
                    self._changed.notify_all()


def _serve(
    connection: Connection,
    others: list[Connection],
    function: Callable[..., Any],
    build: Any,
    state: bytes,
    built: Any,
    known: Sequence[Any] | None,
) -> None:
    """The life of a worker: answer arguments until the pipe closes, which it also does when the parent dies.

    Args:
        others: ends of pipes that a fork has and must not keep open.
        known: the arguments, of which numbers come through the pipe; None if they come themselves.
    """
    keep_memory()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for other in others:
        other.close()
    call: Callable[[Any], Any] | None = None
    with connection, contextlib.suppress(EOFError, OSError):
        while True:
            argument = connection.recv()
            try:
                if call is None:
                    _limit_threads()
                    call = _bind(function, build, state, built)
                    _limit_threads()
                outcome: Outcome = ("result", call(argument if known is None else known[argument]))
            except Exception as error:
                error.add_note("in a worker process:\n" + traceback.format_exc().rstrip())
                outcome = ("error", error)
            try:
                connection.send(outcome)
            except (EOFError, OSError):
                raise
            except Exception as error:  # a result or an error that cannot cross processes
                connection.send(("error", RuntimeError(f"cannot send {outcome[1]!r} between processes: {error}")))


def _limit_threads() -> None:
    if "torch" in sys.modules:  # where torch comes later, the environment says it
        sys.modules["torch"].set_num_threads(1)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Within the context torch, if it is there, uses one thread, so that the workers share the cores evenly."""
    torch = sys.modules.get("torch")
    threads = torch.get_num_threads() if torch else 1
    if torch:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if torch:
            torch.set_num_threads(threads)


@contextlib.contextmanager
def _sober_start(forked: bool) -> Iterator[None]:
    """Within the context a new process starts deaf to Ctrl-C, with one thread, and without the user's script.

    A spawned process imports the main script anew, and a script without ``if __name__ == "__main__"`` would run a
    second time; nothing of it is needed here.  (Python warns that a fork has none of its parent's threads.)
    """
    main = sys.modules["__main__"]
    before = {name: os.environ.get(name) for name in _THREADS}
    mask = None
    try:
        if hasattr(signal, "pthread_sigmask"):
            from multiprocessing import resource_tracker

            resource_tracker.ensure_running()  # its own start would end the blocking of the signal
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # inherited
        if not forked:
            sys.modules["__main__"] = types.ModuleType("__main__")
        os.environ.update(dict.fromkeys(_THREADS, "1"))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
            yield
    finally:
        sys.modules["__main__"] = main
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        if mask is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
