"""Fenced blocks of the documentation, and a session that runs them.

A comment on the line above a fence, invisible on the page, marks a block:

    <!-- run -->       console: every `$ ` line is run, in order, in the page's own folder, and must exit 0 (unless the
                       next command is `echo $?`); python: executed in the namespace of the page's earlier blocks.
    <!-- output -->    what the python block before it printed
    <!-- study -->     yaml: a study file, or some of its keys, that the study parser must accept

In a console block the lines under a command are its output. `…` matches any text, or any lines if it is alone on its
line. A block with title="name" is written to a file of that name before later blocks run.
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

from command import leeway, split

FENCE = re.compile(
    r"(?:^<!-- (?P<mark>\w+) -->\n)?^```(?P<language>\w*)(?: title=\"(?P<title>[^\"]+)\")?\n(?P<text>.*?)^```$",
    re.M | re.S,
)


@dataclass(frozen=True)
class Block:
    """One fenced block: its place, mark, language, title and text."""

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
    """Return (command, expected output) pairs of a console block. A line that ends in `\\` continues on the next."""
    pairs: list[tuple[str, str]] = []
    continued = False
    for line in text.splitlines():
        if continued:
            pairs[-1] = (f"{pairs[-1][0][:-1]} {line.strip()}", "")
        elif line.startswith("$ "):
            pairs.append((line[2:], ""))
        elif pairs:
            pairs[-1] = (pairs[-1][0], f"{pairs[-1][1]}{line}\n")
        elif line.strip():
            raise ValueError(f"output before the first command: {line!r}")
        continued = bool(pairs) and not pairs[-1][1] and pairs[-1][0].endswith("\\")
    return pairs


def leeway_commands(text: str) -> Iterator[str]:
    """Yield the `leeway …` lines of any block, without prompt sign or comment."""
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        if match := re.match(r"\s*(?:\$ |- run: )?(leeway .*)$", line):
            yield match[1]


def matches(expected: str, printed: str) -> bool:
    """Return whether `printed` is the expected output, `…` matching anything."""
    lines = [line.rstrip() for line in expected.strip("\n").splitlines()]
    pattern = "\n".join("(?:.*\n?)*?" if line.strip() == "…" else _line_pattern(line) for line in lines)
    pattern = pattern.replace("(?:.*\n?)*?\n", "(?:.*\n)*?").replace("\n(?:.*\n?)*?", "(?:\n.*)*?")
    text = "\n".join(line.rstrip() for line in printed.strip("\n").splitlines())
    return re.fullmatch(pattern, text) is not None


def _line_pattern(line: str) -> str:
    return ".*?".join(re.escape(part) for part in line.split("…"))


@dataclass
class Session:
    """The folder, shell and Python namespace of one page."""

    folder: Path
    code: int = 0
    printed: str = ""
    names: dict[str, Any] = field(default_factory=lambda: {"__name__": "__main__"})

    def run(self, block: Block) -> None:
        """Run a block; raise AssertionError if its result differs from the page."""
        if block.title:
            path = self.folder / block.title
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text, "utf-8")
            if path.name == "pyproject.toml":
                install(path)
        if block.mark == "output":
            assert matches(block.text, self.printed), f"{block}: printed\n{self.printed}"
        if block.mark == "run" and block.language == "python":
            with _captured() as out:
                exec(compile(block.text, str(block), "exec"), self.names)
            self.printed = out.getvalue()
        elif block.mark == "run":
            self._run_console(block)

    def _run_console(self, block: Block) -> None:
        pairs = commands(block.text)
        for k, (command, expected) in enumerate(pairs):
            stdout, stderr = self._leeway(command) if _is_plain(command) else self._shell(command)
            code_checked = k + 1 < len(pairs) and pairs[k + 1][0] == "echo $?"
            assert self.code == 0 or code_checked, f"{block}: {command}: exit {self.code}\n{stdout}{stderr}"
            assert not expected or matches(expected, stdout), f"{block}: {command} printed\n{stdout}{stderr}"

    def _leeway(self, command: str) -> tuple[str, str]:
        """Run a leeway command in this process, through the same entry point, to save the start of an interpreter."""
        done = leeway(*split(command))
        self.code = done.returncode
        return done.stdout, done.stderr

    def _shell(self, command: str) -> tuple[str, str]:
        script = f'leeway() {{ {shlex.quote(sys.executable)} -m leeway "$@"; }}\n(exit {self.code})\n{command}'
        path = os.pathsep.join([str(self.folder), *(p for p in sys.path if p), os.environ.get("PYTHONPATH", "")])
        env = {**os.environ, "PYTHONPATH": path, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False, env=env)
        self.code = done.returncode
        return done.stdout, done.stderr


def _is_plain(command: str) -> bool:
    """Return whether this is one leeway command without a pipe or redirection."""
    lexer = shlex.shlex(command, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words = list(lexer)
    return words[0] == "leeway" and not any(set(w) <= set("|&;<>()") for w in words)


@contextlib.contextmanager
def _captured() -> Iterator[io.StringIO]:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        yield out


def install(pyproject: Path) -> None:
    """Write the entry points that `pip install --editable .` would register, without network or build."""
    import tomllib

    project = tomllib.loads(pyproject.read_text("utf-8"))["project"]
    folder = pyproject.parent / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    groups = project.get("entry-points", {})
    lines = [f"[{g}]\n" + "".join(f"{k} = {v}\n" for k, v in points.items()) for g, points in groups.items()]
    (folder / "entry_points.txt").write_text("\n".join(lines))
