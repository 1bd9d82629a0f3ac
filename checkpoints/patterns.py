"""Matching of the patterns in an adapter's config.

A regular expression may take for ever or all memory, and nothing else runs in the interpreter meanwhile. The patterns of an
adapter come from a stranger, so all but plain names are matched in a separate process, which can be killed.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence

TIMEOUT_S = 5.0
"""Seconds for all patterns of an adapter together."""

_PLAIN = re.compile(r"[\w.^$-]*(\\\.[\w.^$-]*)*", re.ASCII)
"""Names, perhaps with escaped dots. They have no repetition or alternative, so matching is one comparison."""

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
    """Find the names that each pattern matches.

    Args:
        patterns: regular expressions.
        names: names of modules.
        form: regular expression around a pattern, which stands in it as `%s`. The whole form must match a whole name.

    Raises:
        ValueError: a pattern is invalid, or all together take too long or too much memory.
    """
    hard = [pattern for pattern in patterns if not _PLAIN.fullmatch(pattern)]
    found = {p: frozenset(n for n in names if re.fullmatch(form % p, n)) for p in patterns if p not in hard}
    if not hard:
        return found
    asked = json.dumps([[form % pattern for pattern in hard], list(names)])
    command = [sys.executable, "-I", "-S", "-c", _PROGRAM]
    try:
        answers = json.loads(subprocess.run(command, input=asked, capture_output=True, text=True, timeout=TIMEOUT_S).stdout)
    except (subprocess.TimeoutExpired, ValueError) as error:  # ValueError: the process ran out of memory
        raise ValueError(f"the patterns take more than {TIMEOUT_S:g} s or too much memory to match: {_listed(hard)}") from error
    for pattern, answer in zip(hard, answers):
        if isinstance(answer, str):
            raise ValueError(f"{pattern[:200]!r} is no pattern: {answer[:200]}")
        found[pattern] = frozenset(answer)
    return found


def _listed(patterns: Sequence[str]) -> str:
    return ", ".join(repr(pattern[:80]) for pattern in patterns[:3])
