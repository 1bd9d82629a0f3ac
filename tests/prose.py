"""Count headless clauses in prose: clauses whose subject or object is no noun.

`python -m tests.prose [FILES OR FOLDERS]` prints each with its file and line, and their number per 1,000 words. Prose is the
docstrings, comments and help texts of Python files, and Markdown without its code. Without arguments it reads the repository,
except tests.

Counted: "what is lost", "of what runs", "whoever", "nobody", "that of the pool", "those of an engine", "Of a request that
arrives", and sentences that begin with "Who". Not counted: questions, indirect questions ("says what failed", "decides who
starts next"), "what" before its noun ("at what rate"), "who" after its noun ("clients who wait"), "that" of a clause ("shows
that of ten requests one fails"), quoted text and code.
"""

import ast
import io
import os
import re
import sys
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

SKIPPED_FOLDERS = {"tests", "build", "dist", "node_modules", "__pycache__", "results", "demo_adapters"}
SKIPPED_FILES = re.compile(r"_pb2(_grpc)?\.py$")

WORD = re.compile(r"[A-Za-z][A-Za-z'-]*")
CODE = re.compile(r"``.+?``|`[^`]*`|<[^>\n]*>|https?://\S+")
QUOTED = re.compile(r"(?<!\w)'[^'\n]{0,80}'(?!\w)|\"[^\"]{0,200}\"")
DIRECTIVE = re.compile(r"#\s*(type:|noqa|fmt:|pragma|pyright|mypy:|!)")

ASKING = (
    r"(?:ask|say|said|tell|told|show|know|knew|known|see|seen|decide|choose|chose|explain|describe|print|learn|check|name|state|define"
    r"|record|find|found|guess|read|report|document|determine|matter|specif(?:y|ie)|select|list|log|remember|unclear|clear)"
    r"(?:s|es|d|ed|ing|ten|n)?(?: (?:us|you|them|it|users?|clients?|operators?|readers?|and|or|exactly|then|next|in turn))?"
)
DETERMINED = (
    r"(?:kind|sort|number|size|order|extent|time|degree|way|rate|reason|version|value|type|if|price|cost|share|part|else)s?\b"
)
PREPOSITION = r"(?:of|to|from|by|for|with|in|on|than|over|beyond|at|about|into|after|before|beside|behind|as|but|except|and|or)"


@dataclass(frozen=True)
class Text:
    """A piece of prose and the line on which it begins."""

    path: Path
    line: int
    content: str


@dataclass(frozen=True)
class Offence:
    """A headless clause: its file, line, kind and the words around it."""

    path: Path
    line: int
    kind: str
    excerpt: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.kind}: ...{self.excerpt}..."


def headless_what(sentence: str, start: int) -> bool:
    """Tell whether the "what" at `start` heads a clause that stands for a noun."""
    before, after = sentence[:start].rstrip(), sentence[start + len("what") :].lstrip()
    if not (before or after) or re.match(DETERMINED, after, re.IGNORECASE):
        return False  # a table's column may be called "what"
    if re.search(r"\b(?:no matter|so|guess)$", before, re.IGNORECASE):
        return False
    return not re.search(rf"\b{ASKING}$", before, re.IGNORECASE)


def conjunction(sentence: str, start: int) -> bool:
    """Tell whether the "that" at `start` begins a clause, as in "shows that of ten requests one fails"."""
    return bool(re.search(rf"\b(?:so|{ASKING})$", sentence[:start].rstrip(), re.IGNORECASE))


def offences(sentence: str) -> Iterator[tuple[int, str]]:
    """Yield the offset and the kind of each headless clause in a sentence."""
    if sentence.rstrip().endswith("?"):
        return
    for match in re.finditer(r"\bwhat\b(?!['’])", sentence, re.IGNORECASE):
        if headless_what(sentence, match.start()):
            yield match.start(), "what"
    for match in re.finditer(r"\b(?:whoever|whatever|nobody)\b", sentence, re.IGNORECASE):
        if match[0].lower() != "whatever" or re.match(
            r"\s+(?:is|was|are|were|has|can|runs?|comes?)\b", sentence[match.end() :]
        ):
            yield match.start(), match[0].lower()
    for match in re.finditer(r"\b(?:that|those) of\b", sentence, re.IGNORECASE):
        if not conjunction(sentence, match.start()):
            yield match.start(), " ".join(match[0].lower().split())
    if match := re.match(r"\W*(?:[\w*]+: +)?(Of|Who)\b(?![^.]*,)", sentence):
        yield match.start(1), match[1].lower()
    for match in re.finditer(rf"\b(?<!one ){PREPOSITION}\s+(who)\s+(?!is next)", sentence):
        if match[0].split()[0] not in ("and", "or"):
            yield match.start(1), "who"


def sentences(content: str) -> Iterator[tuple[int, str]]:
    """Yield each sentence with its offset; a blank line, a list's item, a heading and a table's cell end one too."""
    start = 0
    for match in re.finditer(r"(?<=[.?!])(?:\s+|$)|\n\s*\n|\s*\|\s*|\n\s*(?:[-*]|\d+\.)\s+|\n(?=\s*\w+: )|\n#+ ", content):
        yield start, content[start : match.start()]
        start = match.end()
    yield start, content[start:]


def blank(pattern: re.Pattern[str], content: str) -> str:
    """Replace code or quotations by a noun of the same length, newlines kept, so that offsets stay."""
    return pattern.sub(lambda match: re.sub(r"[^\n]", "X", match[0]), content)


def cleaned(content: str) -> str:
    """Return prose without code and quotations."""
    return blank(QUOTED, blank(CODE, content))


def markdown(path: Path) -> Iterator[Text]:
    """Yield a Markdown file as one text, its fenced code and front matter blanked."""
    content = path.read_text(encoding="utf-8")
    content = re.sub(r"^ *(```|~~~).*?^ *\1 *$", lambda m: re.sub(r"[^\n]", " ", m[0]), content, flags=re.DOTALL | re.MULTILINE)
    yield Text(path, 1, content)


def comments(path: Path, source: str) -> Iterator[Text]:
    """Yield each block of comment lines as one text."""
    block: list[str] = []
    first = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT or DIRECTIVE.match(token.string):
            continue
        line = token.start[0]
        if block and line != first + len(block):
            yield Text(path, first, "\n".join(block))
            block = []
        first = first if block else line
        block.append(token.string.lstrip("#").strip())
    if block:
        yield Text(path, first, "\n".join(block))


def strings(path: Path, source: str) -> Iterator[Text]:
    """Yield docstrings, strings that document a field, and the texts of `help=` and `description=`."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Expr(value=ast.Constant(value=str() as content)):
                yield Text(path, node.value.lineno, content)
            case ast.keyword(arg="help" | "description" | "epilog" | "short_help", value=value):
                content = "".join(
                    part.value for part in ast.walk(value) if isinstance(part, ast.Constant) and isinstance(part.value, str)
                )
                yield Text(path, value.lineno, content)


def texts(path: Path) -> Iterator[Text]:
    """Yield the prose of a Python or Markdown file."""
    if path.suffix == ".md":
        yield from markdown(path)
    elif path.suffix == ".py" and not SKIPPED_FILES.search(path.name):
        source = path.read_text(encoding="utf-8")
        yield from comments(path, source)
        yield from strings(path, source)


def files(paths: Iterable[Path]) -> Iterator[Path]:
    """Yield the files named, and those below the folders named, except hidden files, symlinks and tests."""
    for path in paths:
        if path.is_file():
            yield path
            continue
        for folder, subfolders, names in os.walk(path):
            subfolders[:] = sorted(
                name for name in subfolders if name not in SKIPPED_FOLDERS and not name.startswith((".", "chameleon_jax."))
            )
            yield from (Path(folder, name) for name in sorted(names) if name.endswith((".py", ".md")))


def examine(paths: Iterable[Path]) -> tuple[list[Offence], int]:
    """Return the headless clauses of all files and the number of words read."""
    found: list[Offence] = []
    words = 0
    for path in files(paths):
        for text in texts(path):
            content = cleaned(text.content)
            words += len(WORD.findall(content))
            for start, sentence in sentences(content):
                for offset, kind in offences(sentence):
                    at = start + offset
                    excerpt = " ".join(text.content[max(0, at - 30) : at + 40].split())
                    found.append(Offence(path, text.line + content.count("\n", 0, at), kind, excerpt))
    return found, words


def main() -> None:
    """Print the headless clauses of the files named on the command line, and their number per 1,000 words."""
    paths = [Path(argument) for argument in sys.argv[1:]] or [Path()]
    found, words = examine(paths)
    print(*found, sep="\n")
    print(f"{len(found)} in {words} words: {1000 * len(found) / max(words, 1):.2f} per 1,000")


if __name__ == "__main__":
    main()
