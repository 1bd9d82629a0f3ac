"""Adapters that are loaded, replaced and unloaded the whole time, and the possible contents of a name meanwhile."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter

import httpx


class Churn:
    """Names whose content changes over HTTP, as an operator would change it.

    Args:
        contents: Directories below the server's adapter directory.
    """

    def __init__(self, http: httpx.AsyncClient, names: list[str], contents: list[str], rng: random.Random):
        self.counts: Counter[str] = Counter()
        self.errors: list[str] = []
        self._http = http
        self._contents = contents
        self._rng = rng
        self._possible: dict[str, set[str | None]] = {name: {None} for name in names}  # None: unloaded
        self._watched: dict[str, list[set[str | None]]] = {name: [] for name in names}

    @property
    def names(self) -> list[str]:
        return list(self._possible)

    def watch(self, name: str) -> set[str | None]:
        """Contents that the name has from now until `unwatch`; a change adds to them."""
        seen = set(self._possible[name])
        self._watched[name].append(seen)
        return seen

    def unwatch(self, name: str, seen: set[str | None]) -> None:
        self._watched[name] = [other for other in self._watched[name] if other is not seen]

    async def run(self, pause: float, until: float) -> None:
        """Change one name after the other until `until` (`time.monotonic()`), and never leave a change half done."""
        while time.monotonic() < until:
            await self.change(self._rng.choice(self.names))
            await asyncio.sleep(self._rng.uniform(0, 2 * pause))

    async def change(self, name: str) -> None:
        content = self._rng.choice([*self._contents, *self._contents, None])
        if content is None and self._possible[name] == {None}:
            return
        self._add(name, content)
        if content is None:
            body, path = {"lora_name": name}, "/v1/unload_lora_adapter"
        else:
            body, path = {"lora_name": name, "lora_path": content}, "/v1/load_lora_adapter"
        response = await self._http.post(path, json=body)
        if response.status_code != 200:
            self.errors.append(f"{path} {name}: {response.status_code} {response.text[:200]}")
            return
        self.counts["unloaded" if content is None else "loaded" if None in self._possible[name] else "replaced"] += 1
        self._possible[name] = {content}

    def _add(self, name: str, content: str | None) -> None:
        self._possible[name].add(content)
        for seen in self._watched[name]:
            seen.add(content)
