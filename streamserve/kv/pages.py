"""The host's ledger of KV-cache pages: every usable page is free or has one owner, at every moment.

Owns who holds which page, and who else reads the prefix cache's pages. Pure bookkeeping: it must not know what a page
contains, and it touches no array. Every method checks all its pages first: one that raises has changed nothing.
"""

import enum
import heapq
from collections.abc import Sequence
from typing import NamedTuple

SCRATCH_PAGE = 0  # nobody's: inactive rows write there, it is never handed out


class Stage(enum.Enum):
    """What a page is held for."""

    PREFIX = "prefix cache"
    PREFILL = "prefill"
    TRANSFER = "transfer"
    SLOT = "slot"


class Owner(NamedTuple):
    """Who holds, or reads, a page: a stage and the request (or slot) in it; the prefix cache has no holder."""

    stage: Stage
    holder: str = ""


PREFIX_CACHE = Owner(Stage.PREFIX)


class OutOfPagesError(ValueError):
    """Fewer pages are free than were asked for."""


class PageLedger:
    """Free pages, the owners of all others, and the readers of those that the prefix cache owns."""

    def __init__(self, num_pages: int):
        if num_pages < 2:
            raise ValueError(f"{num_pages=}: page {SCRATCH_PAGE} is scratch, at least one more is needed")
        self._num_pages = num_pages
        self._free = list(range(SCRATCH_PAGE + 1, num_pages))  # a heap: sorted lists are
        self._owners: dict[int, Owner] = {}
        self._readers: dict[int, set[Owner]] = {}  # pages without readers are absent

    @property
    def num_pages(self) -> int:
        """Pages in all, the scratch page included."""
        return self._num_pages

    @property
    def capacity(self) -> int:
        """Pages that can be owned."""
        return self._num_pages - 1

    @property
    def num_free(self) -> int:
        """Pages without an owner."""
        return len(self._free)

    def acquire(self, count: int, owner: Owner) -> tuple[int, ...]:
        """Give `count` free pages to `owner`, the lowest first: all or none.

        Raises:
          OutOfPagesError: fewer are free. Callers look at `num_free` first.
        """
        if count > len(self._free):
            raise OutOfPagesError(f"{owner} wants {count} pages, {len(self._free)} of {self.capacity} are free")
        pages = tuple(heapq.heappop(self._free) for _ in range(count))
        self._owners.update(dict.fromkeys(pages, owner))
        return pages

    def move(self, pages: Sequence[int], owner: Owner, to: Owner) -> None:
        """Hand pages on from `owner` to `to`.

        Raises:
          ValueError: `owner` does not own one of them, one has readers, or one is named twice.
        """
        self._require_unread(pages, owner)
        self._owners.update(dict.fromkeys(pages, to))

    def release(self, pages: Sequence[int], owner: Owner) -> None:
        """Take pages back from `owner`.

        Raises:
          ValueError: `owner` does not own one of them (a second release, or somebody else's), one has readers, or one
            is named twice.
        """
        self._require_unread(pages, owner)
        for page in pages:
            del self._owners[page]
            heapq.heappush(self._free, page)

    def share(self, pages: Sequence[int], reader: Owner) -> None:
        """Let `reader` read pages of the prefix cache, which can then be neither moved nor released.

        Raises:
          ValueError: one is not the prefix cache's, `reader` reads it already, or it is named twice.
        """
        self._require_owned(pages, PREFIX_CACHE)
        self._require_not_reading(pages, reader)
        self._add_reader(pages, reader)

    def unshare(self, pages: Sequence[int], reader: Owner) -> None:
        """End the reading of `reader`.

        Raises:
          ValueError: `reader` does not read one of them, or one is named twice.
        """
        self._require_reading(pages, reader)
        self._remove_reader(pages, reader)

    def move_reader(self, pages: Sequence[int], reader: Owner, to: Owner) -> None:
        """Hand the reading of pages on from `reader` to `to`.

        Raises:
          ValueError: `reader` does not read one of them, `to` does already, or one is named twice.
        """
        self._require_reading(pages, reader)
        self._require_not_reading(pages, to)
        self._remove_reader(pages, reader)
        self._add_reader(pages, to)

    def owner(self, page: int) -> Owner | None:
        """Say who owns a page: None for a free one and for the scratch page."""
        return self._owners.get(page)

    def readers(self, page: int) -> frozenset[Owner]:
        """Say who reads a page beside its owner."""
        return frozenset(self._readers.get(page, ()))

    def num_readers(self, page: int) -> int:
        """Count the readers of a page."""
        return len(self._readers.get(page, ()))

    def held(self) -> dict[int, Owner]:
        """Copy the owners of all pages that are not free."""
        return dict(self._owners)

    def check(self) -> None:
        """Assert that every usable page is free or owned, exactly once, and that only the prefix cache's are read."""
        usable = list(range(SCRATCH_PAGE + 1, self._num_pages))
        assert sorted([*self._free, *self._owners]) == usable, (self._free, self._owners)
        for page, readers in self._readers.items():
            assert readers, f"page {page} has an empty set of readers"
            assert self._owners.get(page) == PREFIX_CACHE, (page, self._owners.get(page), readers)

    def _require_owned(self, pages: Sequence[int], owner: Owner) -> None:
        _require_distinct(pages)
        for page in pages:
            if self._owners.get(page) != owner:
                raise ValueError(f"page {page} is owned by {self._owners.get(page)}, not by {owner}")

    def _require_unread(self, pages: Sequence[int], owner: Owner) -> None:
        self._require_owned(pages, owner)
        for page in pages:
            if page in self._readers:
                raise ValueError(f"page {page} of {owner} is still read by {sorted(map(str, self._readers[page]))}")

    def _require_reading(self, pages: Sequence[int], reader: Owner) -> None:
        _require_distinct(pages)
        for page in pages:
            if reader not in self._readers.get(page, ()):
                raise ValueError(f"page {page} is not read by {reader}")

    def _require_not_reading(self, pages: Sequence[int], reader: Owner) -> None:
        for page in pages:
            if reader in self._readers.get(page, ()):
                raise ValueError(f"page {page} is already read by {reader}")

    def _add_reader(self, pages: Sequence[int], reader: Owner) -> None:
        for page in pages:
            self._readers.setdefault(page, set()).add(reader)

    def _remove_reader(self, pages: Sequence[int], reader: Owner) -> None:
        for page in pages:
            self._readers[page].remove(reader)
            if not self._readers[page]:
                del self._readers[page]


def _require_distinct(pages: Sequence[int]) -> None:
    if len(set(pages)) != len(pages):
        raise ValueError(f"a page is named twice: {list(pages)}")
