"""The documentation as tests read it: its fenced blocks, what marks them, and shells and sessions to run them in.

A block is marked by a comment on the line above its fence, which a reader of the page does not see:

    <!-- run -->       console: every `$ ` line is run, in order, in the page's own folder, and exits with 0 (or the
                       next command is `echo $?`); python: it is executed, after the page's earlier ones.
    <!-- output -->    what the python block before it printed
    <!-- study -->     yaml: a study file, or some of its keys: the study parser takes them

In a console block the lines under a command are what it prints. `…` stands for any text, on a line of its own for any
lines. A block with title="name" is a file of that name, there before what follows it is run.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FENCE = re.compile(
    r"(?:^<!-- (?P<mark>\w+) -->\n)?^```(?P<language>\w*)(?: title=\"(?P<title>[^\"]+)\")?\n(?P<text>.*?)^```$",
    re.M | re.S,
)


@dataclass(frozen=True)
class Block:
    """One fenced block: where it stands, what it is, and what is to be done with it."""

    page: Path
    line: int
    mark: str
    language: str
    title: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks(page: Path) -> list[Block]:
    text = page.read_text("utf-8")
    return [
        Block(
            page,
            text.count("\n", 0, m.start()) + 1,
            *(m[k] or "" for k in ("mark", "language", "title")),
            m["text"],
        )
        for m in FENCE.finditer(text)
    ]


def commands(text: str) -> list[tuple[str, str]]:
    """(command, what the page says it prints) of a console block; a command goes on where its line ends on `\\`."""
    found: list[tuple[str, str]] = []
    more = False
    for line in text.splitlines():
        if more:
            found[-1] = (f"{found[-1][0][:-1]} {line.strip()}", "")
        elif line.startswith("$ "):
            found.append((line[2:], ""))
        elif found:
            found[-1] = (found[-1][0], f"{found[-1][1]}{line}\n")
        elif line.strip():
            raise ValueError(f"output before the first command: {line!r}")
        more = bool(found) and not found[-1][1] and found[-1][0].endswith("\\")
    return found


def named(text: str) -> Iterator[str]:
    """The `leeway …` lines of any block, without prompt sign, comment or what is around it."""
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        if found := re.match(r"\s*(?:\$ |- run: )?(leeway .*)$", line):
            yield found[1]


def alike(shown: str, printed: str) -> bool:
    """Whether a page's output is what was printed, `…` standing for anything."""
    lines = [line.rstrip() for line in shown.strip("\n").splitlines()]
    pattern = "\n".join("(?:.*\n?)*?" if line.strip() == "…" else _inside(line) for line in lines)
    pattern = pattern.replace("(?:.*\n?)*?\n", "(?:.*\n)*?").replace("\n(?:.*\n?)*?", "(?:\n.*)*?")
    text = "\n".join(line.rstrip() for line in printed.strip("\n").splitlines())
    return re.fullmatch(pattern, text) is not None


def _inside(line: str) -> str:
    return ".*?".join(re.escape(part) for part in line.split("…"))


@dataclass
class Session:
    """A page's folder, shell and Python, from its first block to its last."""

    folder: Path
    code: int = 0
    printed: str = ""
    names: dict[str, Any] = field(default_factory=lambda: {"__name__": "__main__"})

    def do(self, block: Block) -> None:
        """Carry a block out; raises AssertionError where it is not as the page says."""
        if block.title:
            path = self.folder / block.title
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text, "utf-8")
            if path.name == "pyproject.toml":
                install(path)
        if block.mark == "output":
            assert alike(block.text, self.printed), f"{block}: printed\n{self.printed}"
        if block.mark == "run" and block.language == "python":
            with _captured() as out:
                exec(compile(block.text, str(block), "exec"), self.names)
            self.printed = out.getvalue()
        elif block.mark == "run":
            self._shell(block)

    def _shell(self, block: Block) -> None:
        todo = commands(block.text)
        for k, (command, shown) in enumerate(todo):
            printed, said = self._leeway(command) if _plain(command) else self._other(command)
            expected = k + 1 < len(todo) and todo[k + 1][0] == "echo $?"
            assert self.code == 0 or expected, f"{block}: {command}: exit {self.code}\n{printed}{said}"
            assert not shown or alike(shown, printed), f"{block}: {command} printed\n{printed}{said}"

    def _leeway(self, command: str) -> tuple[str, str]:
        """A command of ours, in this process: the same words by the same door, without a new Python for each."""
        from leeway.cli import main

        before = sys.argv
        sys.argv = shlex.split(command, comments=True)
        with _captured() as out, contextlib.redirect_stderr(io.StringIO()) as said:
            try:
                main()
            except SystemExit as end:
                self.code = int(end.code or 0)
            finally:
                sys.argv = before
        return out.getvalue(), said.getvalue()

    def _other(self, command: str) -> tuple[str, str]:
        script = f'leeway() {{ {shlex.quote(sys.executable)} -m leeway "$@"; }}\n(exit {self.code})\n{command}'
        path = os.pathsep.join([str(self.folder), *(p for p in sys.path if p), os.environ.get("PYTHONPATH", "")])
        told = {**os.environ, "PYTHONPATH": path, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False, env=told)
        self.code = done.returncode
        return done.stdout, done.stderr


def _plain(command: str) -> bool:
    """Whether it is one command of ours and no more: no pipe, no file to write to."""
    words = shlex.shlex(command, posix=True, punctuation_chars=True)
    words.whitespace_split = True
    listed = list(words)
    return listed[0] == "leeway" and not any(set(w) <= set("|&;<>()") for w in listed)


@contextlib.contextmanager
def _captured() -> Iterator[io.StringIO]:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        yield out


def install(pyproject: Path) -> None:
    """What `pip install --editable .` leaves behind, as far as entry points go: no network, no build."""
    import tomllib

    project = tomllib.loads(pyproject.read_text("utf-8"))["project"]
    folder = pyproject.parent / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    groups = project.get("entry-points", {})
    lines = [f"[{g}]\n" + "".join(f"{k} = {v}\n" for k, v in points.items()) for g, points in groups.items()]
    (folder / "entry_points.txt").write_text("\n".join(lines))
