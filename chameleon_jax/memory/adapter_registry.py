"""The adapters of a loop by name."""

from __future__ import annotations

import dataclasses

from chameleon_jax.loop import ServingLoop
from chameleon_jax.memory.adapters import AdapterInfo


@dataclasses.dataclass
class _Named:
    info: AdapterInfo
    path: str | None
    pinned: bool


class AdapterRegistry:
    """Names to adapters: each with the path it was read from, and whether the name pins it. Removing or replacing a name does
    not disturb requests that hold the content hash."""

    def __init__(self) -> None:
        self._names: dict[str, _Named] = {}

    def set(self, name: str, info: AdapterInfo, path: str | None = None, pinned: bool = False) -> AdapterInfo | None:
        """Names an adapter; returns the one that had the name."""
        old = self.get(name)
        self._names[name] = _Named(info, path, pinned)
        return old

    def remove(self, name: str) -> AdapterInfo:
        """Raises KeyError with the names there are."""
        self.named(name)
        return self._names.pop(name).info

    def get(self, name: str) -> AdapterInfo | None:
        named = self._names.get(name)
        return None if named is None else named.info

    def named(self, name: str) -> AdapterInfo:
        """Raises KeyError with the names there are."""
        if name not in self._names:
            raise KeyError(f"no adapter is named {name!r}; there are: {', '.join(self.names()) or 'none'}")
        return self._names[name].info

    def path(self, name: str) -> str | None:
        named = self._names.get(name)
        return None if named is None else named.path

    def pin(self, name: str, pinned: bool) -> None:
        self._names[name].pinned = pinned

    def is_pinned(self, name: str) -> bool:
        return name in self._names and self._names[name].pinned

    def names_of(self, content_hash: str) -> list[str]:
        return sorted(name for name, named in self._names.items() if named.info.content_hash == content_hash)

    def names_by_hash(self) -> dict[str, list[str]]:
        by_hash: dict[str, list[str]] = {}
        for name in self.names():
            by_hash.setdefault(self._names[name].info.content_hash, []).append(name)
        return by_hash

    def names(self) -> list[str]:
        return sorted(self._names)


class AdapterNames:
    """Keeps what a loop knows true to what names say: a content is known while a name or an unfinished request has it, and
    pinned while a name pins it.

    A name is given new content in place. Requests keep the content that they came with; the name keeps its pin.
    """

    def __init__(self, loop: ServingLoop):
        self.registry = AdapterRegistry()
        self.loop = loop

    def set(
        self, name: str, info: AdapterInfo, path: str | None = None, pinned: bool | None = None, load_inplace: bool = True
    ) -> bool:
        """Gives a name its content.

        Args:
            path: directory from which it was read.
            pinned: whether the name pins it; None: as before, and a new name does not.
            load_inplace: False refuses other content for a name that exists.

        Returns:
            Whether the name had that very content already.

        Raises:
            ValueError: the content cannot be pinned, or the name exists. Nothing has changed then.
        """
        old = self.registry.get(name)
        if old not in (None, info) and not load_inplace:
            raise ValueError(f"lora_name is {name!r}, which has other content; allowed with load_inplace false: a new name")
        if pinned is None:
            pinned = self.registry.is_pinned(name)
        if pinned:
            self.loop.check_pin(info, replaced=self._left_by(name))
        self.loop.add_adapter(info)
        self.registry.set(name, info, path, pinned)
        for changed in (old, info):
            if changed is not None:
                self._settle(changed)
        return old == info

    def remove(self, name: str) -> None:
        """Raises KeyError."""
        self._settle(self.registry.remove(name))

    def pin(self, name: str, pinned: bool = True) -> None:
        """Keeps a name's content in the pool once it is there. Raises ValueError or KeyError."""
        info = self.named(name)
        if pinned:
            self.loop.check_pin(info)
        self.registry.pin(name, pinned)
        self._settle(info)

    def named(self, name: str) -> AdapterInfo:
        """Raises KeyError with the names there are."""
        return self.registry.named(name)

    def _left_by(self, name: str) -> str | None:
        """The content that no other name pins."""
        info = self.registry.get(name)
        if info is None or any(self.registry.is_pinned(n) for n in self.registry.names_of(info.content_hash) if n != name):
            return None
        return info.content_hash

    def _settle(self, info: AdapterInfo) -> None:
        names = self.registry.names_of(info.content_hash)
        if names:
            self.loop.pin_adapter(info.content_hash, any(map(self.registry.is_pinned, names)))
        elif info.content_hash in self.loop.cache:
            self.loop.remove_adapter(info.content_hash)
