"""What the patterns of an adapter's config match.

A regular expression may take for ever or all memory, and nothing else runs in the interpreter meanwhile. An adapter's are a
stranger's, so that all but plain names are matched by a process of their own, which can be given up.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence

TIMEOUT_S = 5.0
"""For all of an adapter's patterns together."""

_PLAIN = re.compile(r"[\w.^$-]*(\\\.[\w.^$-]*)*", re.ASCII)
"""Names, perhaps with escaped dots: these neither repeat nor choose, so that matching is one comparison."""

_PROGRAM = """
import contextlib, json, re, sys
with contextlib.suppress(ImportError, ValueError, OSError):
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
patterns, names = json.load(sys.stdin)
answers = []
for pattern in patterns:
    try:
        compiled = re.compile(pattern)
    except Exception as error:
        answers.append(str(error) or repr(error))
    else:
        answers.append([name for name in names if compiled.fullmatch(name)])
json.dump(answers, sys.stdout)
"""


def matches(patterns: Sequence[str], names: Sequence[str], form: str) -> dict[str, frozenset[str]]:
    """Which of the names each pattern matches.

    Args:
        form: what a pattern stands in, as `%s`; all of it matches all of a name.

    Raises:
        ValueError: one is no pattern, or they take too long.
    """
    hard = [pattern for pattern in patterns if not _PLAIN.fullmatch(pattern)]
    found = {p: frozenset(n for n in names if re.fullmatch(form % p, n)) for p in patterns if p not in hard}
    if not hard:
        return found
    asked = json.dumps([[form % pattern for pattern in hard], list(names)])
    command = [sys.executable, "-I", "-S", "-c", _PROGRAM]
    try:
        answers = json.loads(subprocess.run(command, input=asked, capture_output=True, text=True, timeout=TIMEOUT_S).stdout)
    except (subprocess.TimeoutExpired, ValueError) as error:  # the latter: it came to an end of its memory
        raise ValueError(f"the patterns take more than {TIMEOUT_S:g} s or too much memory to match: {_listed(hard)}") from error
    for pattern, answer in zip(hard, answers):
        if isinstance(answer, str):
            raise ValueError(f"{pattern[:200]!r} is no pattern: {answer[:200]}")
        found[pattern] = frozenset(answer)
    return found


def _listed(patterns: Sequence[str]) -> str:
    return ", ".join(repr(pattern[:80]) for pattern in patterns[:3])
