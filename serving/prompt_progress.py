"""Progress bar over the prompts of one call."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

from tqdm.auto import tqdm

from chameleon_jax.request import Request

UseTqdm = bool | Callable[..., Any]
"""True, False, or a function that is called as `tqdm` is and returns a bar."""


class PromptProgress:
    """Progress bar that counts the prompts done, and shows the mean speed in tokens a second.

    Args:
        requests: Requests of the call, one a prompt.
        use_tqdm: True shows a bar where stderr is a terminal or the program is a notebook: in a log each refresh would be a
            line. A function makes the bar wherever it runs.
    """

    def __init__(self, requests: Iterable[Request], use_tqdm: UseTqdm):
        self._left = set(requests)
        make = use_tqdm if callable(use_tqdm) else tqdm
        hidden = {} if callable(use_tqdm) else {"disable": not (use_tqdm and _is_watched())}
        self._bar = make(total=len(self._left), desc="Processed prompts", dynamic_ncols=True, **hidden)
        self._prompt_tokens = self._output_tokens = 0

    def __enter__(self) -> PromptProgress:
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.close()

    def update(self, requests: Iterable[Request]) -> None:
        """Count the requests that have ended among `requests`, which may hold some twice and others' too."""
        ended = {request for request in requests if request.finish_reason is not None} & self._left
        if not ended:
            return
        self._left -= ended
        self._prompt_tokens += sum(len(request.prompt_token_ids) for request in ended)
        self._output_tokens += sum(len(request.output_token_ids) for request in ended)
        seconds = self._bar.format_dict["elapsed"] or float("inf")
        speeds = f"input: {self._prompt_tokens / seconds:.2f} toks/s, output: {self._output_tokens / seconds:.2f} toks/s"
        self._bar.set_postfix_str(f"est. speed {speeds}", refresh=False)
        self._bar.update(len(ended))


def _is_watched() -> bool:
    return sys.stderr.isatty() or "ipykernel" in sys.modules
