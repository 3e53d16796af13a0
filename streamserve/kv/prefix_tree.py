"""A radix tree over full pages of prompt tokens: which pages already hold the KV of a prompt's beginning.

Owns the pages that the ledger books under `PREFIX_CACHE`, and is the only one to do so. A page's key is its tokens, its
place the path from the root, so equal pages after different beginnings are different nodes. It must not know requests
(only their `Owner`), nor what is in a page; the ledger (`kv/pages.py`) knows who reads one.
"""

import heapq
import itertools
from collections.abc import Iterator, Sequence
from typing import Optional

from streamserve.kv.pages import PREFIX_CACHE, SCRATCH_PAGE, Owner, PageLedger


class _Node:
    """One page of the tree; the root has neither parent nor page."""

    __slots__ = ("children", "key", "last_used", "page", "parent")

    def __init__(self, key: tuple[int, ...], page: int, parent: Optional["_Node"]):
        self.key = key
        self.page = page
        self.parent = parent
        self.children: dict[tuple[int, ...], _Node] = {}
        self.last_used = 0


class PrefixTree:
    """Published prefixes and their pages.

    Attributes:
      queried_tokens: tokens of all prompts that were matched.
      hit_tokens: those among them that were found.
    """

    def __init__(self, ledger: PageLedger, page_size: int):
        self.queried_tokens = 0
        self.hit_tokens = 0
        self._ledger = ledger
        self._page_size = page_size
        self._root = _Node((), SCRATCH_PAGE, None)
        self._nodes: dict[int, _Node] = {}  # by page, the root excluded
        self._clock = 0  # ticks with every match and insert

    @property
    def num_pages(self) -> int:
        """Pages in the tree; purged ones that are still read are not."""
        return len(self._nodes)

    @property
    def num_evictable(self) -> int:
        """Pages that `evict` could free now: those with no reader at or below them. O(pages)."""
        pinned: set[int] = set()
        for node in self._nodes.values():
            if self._ledger.num_readers(node.page):
                above: _Node | None = node
                while above is not None and above.page not in pinned:
                    pinned.add(above.page)
                    above = above.parent
        return len(self._nodes.keys() - pinned)

    def match(self, tokens: Sequence[int], reader: Owner) -> tuple[int, ...]:
        """Find the pages of the longest published prefix of a prompt, and share them with `reader`.

        At least one token is left to compute, since the first output needs the logits of the last: at most
        `(len(tokens) - 1) // page_size` pages.

        Raises:
          ValueError: `reader` reads one of them already.
        """
        path = self._walk(tokens, (len(tokens) - 1) // self._page_size)
        pages = tuple(node.page for node in path)
        self._ledger.share(pages, reader)
        self._touch(path)
        self.queried_tokens += len(tokens)
        self.hit_tokens += self._page_size * len(pages)
        return pages

    def count(self, tokens: Sequence[int]) -> int:
        """Count the pages that `match` would give; nothing is shared, touched or counted."""
        return len(self._walk(tokens, (len(tokens) - 1) // self._page_size))

    def insert(self, tokens: Sequence[int], pages: Sequence[int], owner: Owner) -> tuple[int, ...]:
        """Publish the full pages of a prompt; the pages that become the prefix cache's are shared with `owner`.

        A place that is taken keeps its page: `owner`'s own, if it is another one, stays `owner`'s. Pages from the first
        purged one on are not published: they were computed from it.

        Args:
          tokens: the prompt, or its beginning.
          pages: `pages[i]` holds positions `[i * page_size, (i + 1) * page_size)`; may reach beyond `tokens`.
          owner: owner of those pages that `match` did not give it.

        Returns:
          The pages that `owner` still owns, and must release: duplicates and what was not published.

        Raises:
          ValueError: too few pages, or a page to publish is not `owner`'s; nothing has changed then.
        """
        full = len(tokens) // self._page_size
        if len(pages) < full:
            raise ValueError(f"{len(tokens)} tokens fill {full} pages of {self._page_size}, got {len(pages)} pages")
        sound = next((i for i, page in enumerate(pages[:full]) if self._is_purged(page)), full)
        path = self._walk(tokens, sound)
        fresh = pages[len(path) : sound]
        self._ledger.move(fresh, owner, PREFIX_CACHE)
        self._ledger.share(fresh, owner)
        keys = itertools.islice(self._keys(tokens, sound), len(path), None)
        for key, page in zip(keys, fresh, strict=True):
            parent = path[-1] if path else self._root
            node = _Node(key, page, parent)
            parent.children[key] = self._nodes[page] = node
            path.append(node)
        self._touch(path)
        return tuple(page for page in pages if self._ledger.owner(page) == owner)

    def unshare(self, pages: Sequence[int], reader: Owner) -> None:
        """End the reading of `reader`; purged pages are released with their last reader.

        Raises:
          ValueError: `reader` does not read one of them.
        """
        self._ledger.unshare(pages, reader)
        self._release_unread([page for page in pages if self._is_purged(page)])

    def evict(self, count: int) -> int:
        """Free up to `count` pages, least recently used leaves without readers first.

        A parent goes after its last child. One call costs O(pages + freed * log(pages)).

        Returns:
          How many were freed.
        """
        leaves = [(node.last_used, node.page) for node in self._nodes.values() if self._is_unread_leaf(node)]
        heapq.heapify(leaves)
        freed = 0
        while leaves and freed < count:
            _, page = heapq.heappop(leaves)
            node = self._nodes.pop(page)
            parent = node.parent
            assert parent is not None, "only the root has none, and it is not among the nodes"
            del parent.children[node.key]
            self._ledger.release((page,), PREFIX_CACHE)
            freed += 1
            if parent is not self._root and self._is_unread_leaf(parent):
                heapq.heappush(leaves, (parent.last_used, parent.page))
        return freed

    def purge(self, tokens: Sequence[int]) -> None:
        """Take the path along `tokens` and everything below out of the tree: its KV turned out to be corrupt.

        That is all below the first page, as any page of the path may be the corrupt one. A page that is read stays the
        prefix cache's until its last reader leaves by `unshare`.
        """
        top = self._root.children.pop(tuple(tokens[: self._page_size]), None)
        purged = [] if top is None else [top]
        for node in purged:  # grows as it goes
            del self._nodes[node.page]
            purged.extend(node.children.values())
        self._release_unread([node.page for node in purged])

    def clear(self) -> None:
        """Free every page that has no reader at or below it."""
        self.evict(self.num_pages)

    def _keys(self, tokens: Sequence[int], count: int) -> Iterator[tuple[int, ...]]:
        for i in range(count):
            yield tuple(tokens[i * self._page_size : (i + 1) * self._page_size])

    def _walk(self, tokens: Sequence[int], count: int) -> list[_Node]:
        """Follow the first `count` pages of `tokens` from the root, as far as the tree goes."""
        path: list[_Node] = []
        node = self._root
        for key in self._keys(tokens, count):
            if key not in node.children:
                break
            node = node.children[key]
            path.append(node)
        return path

    def _touch(self, path: list[_Node]) -> None:
        self._clock += 1
        for node in path:
            node.last_used = self._clock

    def _is_unread_leaf(self, node: _Node) -> bool:
        return not node.children and not self._ledger.num_readers(node.page)

    def _is_purged(self, page: int) -> bool:
        return self._ledger.owner(page) == PREFIX_CACHE and page not in self._nodes

    def _release_unread(self, pages: list[int]) -> None:
        self._ledger.release([page for page in pages if not self._ledger.num_readers(page)], PREFIX_CACHE)
