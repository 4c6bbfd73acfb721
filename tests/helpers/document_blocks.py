"""The blocks of code in the documents, and what the shell would make of those that are commands."""

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token
from paths import ROOT

PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (
        *ROOT.glob("*.md"),
        *(ROOT / "examples").rglob("*.md"),
        *(page for page in (ROOT / "docs").rglob("*.md") if "_build" not in page.parts),
    )
)

# Programs that are not ours: known to exist, and never run by a test.
_FOREIGN = ("git", "kill", "scontrol", "hostname", "tail", "wg-quick", "tar", "nft")
# Programs whose arguments are ours to check.
_OURS = ("make", "pellm", "pip", "python", "srun", "torchrun")
# What really runs: it reads and writes below the current folder only.
_REAL = ("cat", "head", "mkdir")


@dataclass(frozen=True)
class Block:
    """One block of code.

    Args:
        page: Path of the page below the repository.
        line: Line of its fence, from 1.
        language: First word behind the fence; "" for none, and for code that is only indented.
        text: What it holds, without the fence.
        marks: Invisible comments right before it, ``<!-- name: value -->``.
    """

    page: str
    line: int
    language: str
    text: str
    marks: dict[str, str]

    @property
    def name(self) -> str:
        """Where the block is, as editors understand it."""
        return f"{self.page}:{self.line}"

    @property
    def not_run(self) -> str | None:
        """Why a test cannot run it, or None."""
        return self.marks.get("not run")


def blocks(page: str) -> Iterator[Block]:
    """Return the blocks of a page, in order."""
    return found_in(MarkdownIt().parse((ROOT / page).read_text(encoding="utf-8")), page)


def found_in(tokens: Sequence[Token], page: str) -> Iterator[Block]:
    """Return the blocks among what a page was parsed into, in order."""
    marks: dict[str, str] = {}
    for token in tokens:
        if token.type == "html_block":
            marks |= dict(re.findall(r"<!--\s*([a-z ]+?):\s*(.*?)\s*-->", token.content, re.DOTALL))
        elif token.type in ("fence", "code_block"):
            language = (token.info.split() or [""])[0] if token.type == "fence" else ""
            assert token.map is not None
            yield Block(page, token.map[0] + 1, language, token.content, marks)
            marks = {}
        elif token.nesting >= 0 and not token.type.endswith("_item_open"):
            marks = {}  # a mark stands right before its block


def script_of(block: Block) -> str:
    """Return what a reader types: all of a ``bash`` block; of a ``console`` the lines after prompts.

    A command goes on for as many lines as bash needs to understand it. The rest is what the terminal answers.
    """
    if block.language == "bash":
        return block.text
    commands: list[str] = []
    unfinished = False
    for line in block.text.splitlines():
        if line.startswith("$ "):
            commands.append(line[2:])
        elif unfinished:
            commands[-1] += f"\n{line}"
        else:
            continue
        unfinished = line.endswith("\\") or syntax_error(commands[-1]) is not None
    return "\n".join(commands) + "\n"


def syntax_error(script: str) -> str | None:
    """Return what bash says against a script that it does not run, or None."""
    done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
    return done.stderr.strip() if done.returncode or done.stderr else None


def commands_of(script: str, folder: Path) -> list[list[str]]:
    """Return the commands that bash would run, word by word, in the order in which they start.

    Bash runs the script, with its loops, variables and quotes, in ``folder``; programs only leave a record of
    how they were called.

    Raises:
        AssertionError: If a program is not known, or bash fails.
    """
    tools = folder.parent / "tools"
    if not tools.exists():
        tools.mkdir()
        for tool in _REAL:
            (tools / tool).symlink_to(f"/bin/{tool}")
    (folder / ".venv/bin").mkdir(parents=True, exist_ok=True)
    (folder / ".venv/bin/activate").touch()
    calls = Path(tempfile.mkdtemp(dir=folder.parent))
    lines = [
        "set -e",
        'command_not_found_handle() { echo "no known program: $1" >&2; exit 127; }',
        # A file each: of two that write at a time into one, bash may mix what holds a newline.
        """record() { printf '%s\\0' "$@" > "$CALLS/$EPOCHREALTIME.$BASHPID"; }""",
        *(f'{name}() {{ record {name} "$@"; }}' for name in _OURS),
        *(f"{name}() {{ :; }}" for name in _FOREIGN),
        script,
        "wait",
    ]
    environment = {"PATH": str(tools), "CALLS": str(calls), "HOME": str(folder), "RANK": "1"}
    done = subprocess.run(
        ["/bin/bash", "-c", "\n".join(lines)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=20,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr  # a command in the background fails without an exit status
    return [os.fsdecode(call.read_bytes()).split("\0")[:-1] for call in sorted(calls.iterdir())]
