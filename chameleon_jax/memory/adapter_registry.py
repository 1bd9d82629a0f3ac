"""Adapters by name: the content each name stands for, its directory, and whether the name pins it. And mixes of adapters."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable

from chameleon_jax.checks import require
from chameleon_jax.config import EngineConfig
from chameleon_jax.memory.adapter_cache import AdapterCache
from chameleon_jax.memory.adapters import AdapterInfo, AdapterMix
from chameleon_jax.sampling_params import LoRAMix

MAX_MIXES = 64
"""Mixes that are kept for further requests. The least recently used one leaves host memory first."""


@dataclasses.dataclass
class _Named:
    info: AdapterInfo
    path: str | None
    pinned: bool


class AdapterRegistry:
    """Names of adapters, over the cache that holds their content.

    A content stays in the cache's books while a name or an unfinished request has it, and is pinned while a name pins it. A
    name can be given new content in place. Requests keep the content that they came with; the name keeps its pin.

    A mix has no name of its own. It is kept for further requests until MAX_MIXES others were used since, or no name has one of
    its members any more.

    Args:
        clock: Seconds, monotonic.
        largest_need: Pages that the largest unfinished request may take, requests of the given content hash left out.
    """

    def __init__(self, cache: AdapterCache, clock: Callable[[], float], largest_need: Callable[[str], int]):
        self._cache = cache
        self._clock = clock
        self._largest_need = largest_need
        self._names: dict[str, _Named] = {}
        self._mixes: OrderedDict[str, tuple[AdapterMix, str]] = OrderedDict()  # and their labels, least recently used first

    # -- changes --------------------------------------------------------------------------------------------------------

    def add(
        self, name: str, info: AdapterInfo, path: str | None = None, pinned: bool | None = None, load_inplace: bool = True
    ) -> bool:
        """Give a name its content.

        Args:
            name: A new name, or one that gets new content.
            info: The content.
            path: Directory from which it was read.
            pinned: Whether the name pins it. None keeps the name's pin; a new name has none.
            load_inplace: False refuses other content for a name that exists.

        Returns:
            Whether the name had that very content already.

        Raises:
            ValueError: The content cannot be pinned, or the name exists. Nothing has changed then.
        """
        old = self.get(name)
        if old not in (None, info) and not load_inplace:
            raise ValueError(f"lora_name is {name!r}, which has other content; allowed with load_inplace false: a new name")
        if pinned is None:
            pinned = self.is_pinned(name)
        if pinned:
            self._check_pin(info, replaced=self._pinned_by_alone(name))
        self._cache.add(info, self._clock())
        self._names[name] = _Named(info, path, pinned)
        for changed in (old, info):
            if changed is not None:
                self._settle(changed)
        return old == info

    def remove(self, name: str) -> None:
        """Forget a name. Requests that came with it finish; then its content is forgotten unless another name has it.

        Raises:
            KeyError: No adapter has that name; lists the names there are.
        """
        info = self.named(name)
        del self._names[name]
        self._settle(info)

    def pin(self, name: str, pinned: bool = True) -> None:
        """Keep a name's content in the pool once it is there, or stop to.

        Raises:
            ValueError: Too little of the pool would be left for requests.
            KeyError: No adapter has that name; lists the names there are.
        """
        info = self.named(name)
        if pinned:
            self._check_pin(info)
        self._names[name].pinned = pinned
        self._settle(info)

    def add_mix(self, mix: AdapterMix, label: str, info: AdapterInfo) -> bool:
        """Keep a mix, and forget those beyond MAX_MIXES. Args: label: its text for people.

        Returns:
            Whether it is kept: not where the last name of a member went while the mix was packed.
        """
        named = {named.info.content_hash for named in self._names.values()}
        if not all(member in named for member, _ in mix.members):
            return False
        self._cache.add(info, self._clock())
        self._mixes[mix.content_hash] = (mix, label)
        while len(self._mixes) > MAX_MIXES:
            self._forget_mix(next(iter(self._mixes)))
        return True

    def use_mix(self, mix: AdapterMix) -> bool:
        """Return whether a mix, or the one adapter that it is, can be used; it is the last used then."""
        if mix.content_hash in self._mixes:
            self._mixes.move_to_end(mix.content_hash)
        return mix.content_hash in self._mixes or mix.has(mix.content_hash)

    # -- questions ------------------------------------------------------------------------------------------------------

    def get(self, name: str) -> AdapterInfo | None:
        """Content of a name; None where no adapter has it."""
        named = self._names.get(name)
        return None if named is None else named.info

    def named(self, name: str) -> AdapterInfo:
        """Content of a name. Raises KeyError, with the names there are."""
        if name not in self._names:
            raise KeyError(f"no adapter is named {name!r}; there are: {', '.join(self.names()) or 'none'}")
        return self._names[name].info

    def mix(self, lora: LoRAMix) -> AdapterMix:
        """Mix of the contents that the names have now. Raises KeyError."""
        return AdapterMix.of((self.named(member.name).content_hash, weight) for member, weight in lora.members)

    def path(self, name: str) -> str | None:
        """Directory from which a name's content was read."""
        named = self._names.get(name)
        return None if named is None else named.path

    def is_pinned(self, name: str) -> bool:
        """Whether the name pins its content."""
        return name in self._names and self._names[name].pinned

    def names(self) -> list[str]:
        """Every name, sorted."""
        return sorted(self._names)

    def names_by_hash(self) -> dict[str, list[str]]:
        """`content hash -> its names, sorted`. A mix has its label."""
        by_hash = {content_hash: [label] for content_hash, (_, label) in self._mixes.items()}
        for name in self.names():
            by_hash.setdefault(self._names[name].info.content_hash, []).append(name)
        return by_hash

    def check_restart(self, config: EngineConfig) -> None:
        """Check that an engine of other settings can serve the same names. Raises ValueError.

        Args:
            config: The settings, every size filled in.
        """
        assert config.num_pages is not None
        for name in self.names():
            info = self.named(name)
            require(config.enable_lora, "enable_lora", False, f"True, as adapter {name!r} is registered")
            allowed = f"at least {info.rank}, the rank of adapter {name!r}"
            require(info.rank <= config.max_lora_rank, "max_lora_rank", config.max_lora_rank, allowed)
            allowed = f"more than {info.num_pages + 1}, as adapter {name!r} takes {info.num_pages}"
            require(info.num_pages < config.num_pages - 1, "num_pages", config.num_pages, allowed)
        pinned = self._cache.pinned_pages()
        if pinned > (config.num_pages - 1) // 2:
            raise ValueError(
                f"num_pages is {config.num_pages}; allowed: more than {2 * pinned}, as pinned adapters take {pinned}"
            )

    def copy_to(self, other: AdapterRegistry) -> None:
        """Give another registry the same names, and forget the mixes."""
        for content_hash in list(self._mixes):
            self._forget_mix(content_hash)
        for name, named in self._names.items():
            other.add(name, named.info, named.path, named.pinned)

    # -- keeping the cache's books true to the names --------------------------------------------------------------------

    def _check_pin(self, info: AdapterInfo, replaced: str | None = None) -> None:
        """Raise ValueError where pinning `info` in the place of `replaced` could starve a live request."""
        taken = self._cache.pinned_pages(info.content_hash, replaced) + info.num_pages
        need = self._largest_need(info.content_hash)
        capacity = self._cache.pool.capacity
        if taken + need > capacity or taken > capacity // 2:
            raise ValueError(
                f"pinned adapters would take {taken} of {capacity} pages; allowed: half, and room for every "
                f"request (the largest needs {need})"
            )

    def _pinned_by_alone(self, name: str) -> str | None:
        """Content hash of a name that no other name pins; None where another does, or the name is new."""
        info = self.get(name)
        if info is None or any(n.pinned and n.info == info for other, n in self._names.items() if other != name):
            return None
        return info.content_hash

    def _settle(self, info: AdapterInfo) -> None:
        """Pin, unpin or drop a content as its names say now."""
        owners = [named for named in self._names.values() if named.info.content_hash == info.content_hash]
        if owners:
            self._cache.pin(info.content_hash, any(named.pinned for named in owners))
            return
        for content_hash in [key for key, (mix, _) in self._mixes.items() if mix.has(info.content_hash)]:
            self._forget_mix(content_hash)
        if info.content_hash in self._cache:
            self._cache.remove(info.content_hash)

    def _forget_mix(self, content_hash: str) -> None:
        """Drop a mix. Requests that came with it finish; then its memory is free."""
        del self._mixes[content_hash]
        self._cache.remove(content_hash)
