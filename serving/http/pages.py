"""Headers that confine the server's HTML pages."""

from __future__ import annotations

import base64
import hashlib
import re

BLOCKED = ("default-src", "base-uri", "form-action", "frame-ancestors")


def page_headers(**sources: str) -> dict[str, str]:
    """Make the headers of a page that may load and run nothing but the given sources.

    Args:
        sources: Directives of the content security policy, `script_src="'self'"` for example.
    """
    policy = {"connect-src": "'self'"} | {name.replace("_", "-"): source for name, source in sources.items()}
    policy |= dict.fromkeys(BLOCKED, "'none'")
    return {
        "Content-Security-Policy": "; ".join(f"{name} {source}" for name, source in policy.items()),
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "no-cache",
    }


def inline_hash(page: str, element: str) -> str:
    """Hash by which a policy allows the page's only inline element of this name."""
    (text,) = re.findall(f"<{element}>(.*?)</{element}>", page, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
