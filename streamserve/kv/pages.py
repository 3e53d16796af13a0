"""The host's ledger of cache rows: every page has exactly one owner, at every moment.

In this version a page is a whole row (slot) of a decode mesh's cache. Pure bookkeeping: no array is touched here.
"""

import enum
from typing import NamedTuple


class Stage(enum.Enum):
    """What a page is held for."""

    DECODE = "decode"


class Owner(NamedTuple):
    """Who holds a page."""

    stage: Stage
    request_id: str


class PageLedger:
    """Free pages and the owners of all others."""

    def __init__(self, num_pages: int):
        self._free = list(range(num_pages - 1, -1, -1))
        self._owners: dict[int, Owner] = {}
        self._num_pages = num_pages

    @property
    def num_pages(self) -> int:
        """Pages in all."""
        return self._num_pages

    @property
    def num_free(self) -> int:
        """Pages without an owner."""
        return len(self._free)

    def acquire(self, owner: Owner) -> int:
        """Give a free page to `owner`.

        Returns:
          The page, the lowest free one.

        Raises:
          ValueError: none is free. Callers look at `num_free` first.
        """
        if not self._free:
            raise ValueError(f"no free page for {owner}: all {self._num_pages} are owned")
        page = self._free.pop()
        self._owners[page] = owner
        return page

    def release(self, page: int, owner: Owner) -> None:
        """Take a page back from `owner`.

        Raises:
          ValueError: `owner` does not own it: a second release, or a release by somebody else.
        """
        self._check(page, owner)
        del self._owners[page]
        self._free.append(page)
        self._free.sort(reverse=True)

    def held(self) -> dict[int, Owner]:
        """Pages that are owned."""
        return dict(self._owners)

    def check(self) -> None:
        """Assert that every page is either free or owned, exactly once."""
        assert sorted([*self._free, *self._owners]) == list(range(self._num_pages)), (self._free, self._owners)

    def _check(self, page: int, owner: Owner) -> None:
        if self._owners.get(page) != owner:
            raise ValueError(f"page {page} is owned by {self._owners.get(page)}, not by {owner}")
