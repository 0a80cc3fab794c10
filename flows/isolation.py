"""Steps in a process of their own that is killed at their time limit: what no thread can stop, a signal does.

The process is kept from step to step, with the policy in its memory. It is asked in JSON, a line a step, and says in
JSON what it would show. Once it has ended, by its limit or by itself, the next step starts another.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import IO, Any

from flows.desk import Desk
from flows.lent import borrow, end_with_parent, how_it_ended, lend
from flows.progress import Advance, Reporter

HERE = frozenset({"release"})
"""Steps that wait for a person, and compute nothing."""


class Overdue(TimeoutError):
    """A step took longer than its limit, and was stopped."""


class Lost(ChildProcessError):
    """The process of a step ended before the step did."""


class _Raised(Exception):
    """Carries what a step itself raised: its process is sound."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(error)
        self.error = error


class Isolated:
    """The steps of a desk, in a process of their own.

    Args:
        desk: of the run. It computes nothing itself.
    """

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        self._process: subprocess.Popen[str] | None = None
        self._lines: queue.Queue[str] = queue.Queue()

    def wrap(self, name: str, step: Callable[..., Any]) -> Callable[..., Any]:
        """Return a callable that has the step done elsewhere."""
        if name in HERE:

            def alone(*args: Any, **kwargs: Any) -> Any:
                self.close()  # a wait of hours holds no accelerator
                return step(*args, **kwargs)

            return alone

        def call(*args: Any, **kwargs: Any) -> Any:
            return self._ask(name, args, kwargs)

        return call

    def close(self) -> None:
        """End the process, and all that it started."""
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    with contextlib.suppress(OSError):
                        stream.close()

    def _ask(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        limit = self.desk.config.timeouts.get(name, 0.0)
        if self._process is None:
            self._process, self._lines = _start(lend(self.desk)), queue.Queue[str]()
            reader = threading.Thread(target=_read, args=(self._process.stdout, self._lines), daemon=True)
            reader.start()
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps({"step": name, "args": args, "kwargs": kwargs}, default=_plain) + "\n")
            self._process.stdin.flush()
            with ExitStack() as bars:
                return self._listen(name, time.monotonic() + limit if limit else None, bars)
        except _Raised as raised:
            raise raised.error from None
        except BrokenPipeError as error:
            self.close()
            raise Lost(f"the process of step {name!r} had ended; run the same command again") from error
        except BaseException:
            self.close()
            raise

    def _listen(self, name: str, until: float | None, bars: ExitStack) -> Any:
        advance: Advance = self.desk.advance
        while True:
            kind, *said = json.loads(self._line(name, until))
            if kind == "result":
                return said[0]
            if kind == "error":
                raise _Raised(_revived(*said))
            if kind == "bar":
                advance = bars.enter_context(self.desk.reporter.bar(*said))
            elif kind == "end":
                bars.close()
                advance = self.desk.advance
            elif kind == "advance":
                advance(*said)
            else:
                getattr(self.desk.reporter, kind)(*said)

    def _line(self, name: str, until: float | None) -> str:
        try:
            line = self._lines.get(timeout=None if until is None else max(0.0, until - time.monotonic()))
        except queue.Empty:
            limit = self.desk.config.timeouts[name]
            raise Overdue(
                f"step {name!r} took longer than timeouts.{name} = {limit:g} s and was stopped; what it had committed "
                "is kept, and the same command goes on from there: raise the limit, or make the step smaller"
            ) from None
        if not line:
            assert self._process is not None
            code = self._process.wait()
            how = how_it_ended(code)
            raise Lost(f"the process of step {name!r} {how}; what it had committed is kept: run the same command again")
        return line


def _read(stream: IO[str], lines: queue.Queue[str]) -> None:
    """Hand on what the process says, and an empty line at the end."""
    with contextlib.suppress(ValueError, OSError):
        for line in stream:
            lines.put(line)
    lines.put("")


class _Relay(Reporter):
    """Says to the process that asked what it should show."""

    def __init__(self, say: Callable[..., None]) -> None:
        super().__init__(quiet=True)
        self.say = say

    def heading(self, text: str) -> None:
        self.say("heading", text)

    def line(self, text: str) -> None:
        self.say("line", text)

    def table(self, title: str, columns: list[str], rows: list[list[str]]) -> None:
        self.say("table", title, columns, rows)

    @contextmanager
    def bar(self, label: str, total: int) -> Iterator[Advance]:
        self.say("bar", label, total)
        yield lambda n, note="": self.say("advance", n, note)
        self.say("end")


def _start(lent: dict[str, Any]) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "flows.isolation"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
        start_new_session=True,
    )
    assert process.stdin is not None
    process.stdin.write(json.dumps(lent) + "\n")
    return process


def _plain(value: Any) -> Any:
    """Return an array as JSON has it."""
    return value.tolist()


def _revived(module: str, name: str, text: str) -> BaseException:
    """Return the error that a step raised, or one that names it."""
    kind = getattr(importlib.import_module(module), name, None)
    if isinstance(kind, type) and issubclass(kind, Exception):
        with contextlib.suppress(TypeError):
            return kind(text)
    return RuntimeError(f"{name}: {text}")


def main() -> None:
    """Do what is asked for, a line a step, until the input ends."""
    end_with_parent(lambda: os.killpg(0, signal.SIGKILL))  # and all that this one started
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is not an answer

    def say(*what: Any) -> None:
        print(json.dumps(what), file=out, flush=True)

    with borrow(json.loads(sys.stdin.readline()), _Relay(say)) as desk:
        from flows.do import STEPS

        desk.advance = lambda n, note="": say("advance", n, note)
        for line in sys.stdin:
            asked = json.loads(line)
            try:
                result = STEPS[asked["step"]](desk, *asked["args"], **asked["kwargs"])
            except Exception as error:
                traceback.print_exc()
                say("error", type(error).__module__, type(error).__qualname__, str(error))
            else:
                say("result", result)


if __name__ == "__main__":
    main()
