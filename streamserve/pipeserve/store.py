"""The pages of one mesh: pools on its devices, the ledger of their owners, and the prefix cache over them.

What a request holds of a mesh is a `Holding`. Only this file changes who owns a page; it knows no program.
"""

from collections.abc import Callable, Sequence

import jax

from streamserve.kv.pages import Owner, PageLedger
from streamserve.kv.prefix_tree import PrefixTree
from streamserve.types import Deferred, Pools


class Holding:
    """Pages that one request holds on one mesh, in the order of positions."""

    __slots__ = ("owner", "pages", "shared")

    def __init__(self, owner: Owner, pages: Sequence[int], shared: Sequence[int] = ()):
        self.owner = owner
        self.pages = list(pages)
        self.shared = set(shared)  # those that belong to the prefix cache and are read only

    @property
    def own(self) -> list[int]:
        """Pages that nobody else may read."""
        return [page for page in self.pages if page not in self.shared]


class PageStore:
    """Pages of one mesh."""

    def __init__(self, allocate: Callable[[], Pools], *, num_pages: int, page_size: int, reuse_prefixes: bool):
        """Allocate the pools.

        Args:
          allocate: makes empty pools of `num_pages` pages.
          num_pages: the scratch page included.
          page_size: positions of a page.
          reuse_prefixes: keep the whole pages of prompts for others that begin with the same tokens.
        """
        self.pools = allocate()
        self.queried_tokens = 0  # prompt tokens that were looked up in the prefix cache
        self.hit_tokens = 0  # of them found
        self._allocate, self._num_pages, self._page_size = allocate, num_pages, page_size
        self._reuse = reuse_prefixes
        self._start_over()

    def _start_over(self) -> None:
        self.ledger = PageLedger(self._num_pages)
        self.tree = PrefixTree(self.ledger, self._page_size)

    @property
    def num_free(self) -> int:
        """Pages that nobody owns."""
        return self.ledger.num_free

    @property
    def num_pages(self) -> int:
        """Pages that can be owned."""
        return self.ledger.capacity

    @property
    def is_lost(self) -> bool:
        """Whether a program took the pools and did not give them back."""
        return any(leaf.is_deleted() for leaf in jax.tree.leaves(self.pools))

    def begin(self, tokens: Sequence[int], owner: Owner, *, ahead: int = 0, reuse: bool = True) -> Holding | Deferred:
        """Reserve the pages of a prompt, those of a known prefix shared.

        Args:
          tokens: at least one.
          owner: who holds them.
          ahead: tokens beyond the prompt that there are to be pages for.
          reuse: look the prompt up in the prefix cache, if there is one.

        Returns:
          The holding; its shared pages are filled already. Or why there is none.
        """
        reuse = reuse and self._reuse
        shared = self.tree.match(tokens, owner) if reuse else ()
        holding = Holding(owner, shared, shared)
        refusal = self.extend(holding, -(-(len(tokens) + ahead) // self._page_size))
        if refusal is not None:
            self.drop(holding)
            return refusal
        if reuse:
            self.queried_tokens += len(tokens)
            self.hit_tokens += len(shared) * self._page_size
        return holding

    def cached_tokens(self, tokens: Sequence[int]) -> int:
        """Count the tokens of a prompt that `begin` would find in the prefix cache, without using it."""
        return self.tree.count(tokens) * self._page_size if self._reuse else 0

    def extend(self, holding: Holding, num_pages: int) -> Deferred | None:
        """Let a holding grow to `num_pages`, at the cost of cached prefixes if need be; all of it or nothing."""
        missing = num_pages - len(holding.pages)
        if missing <= 0:
            return None
        short = missing - self.ledger.num_free
        if short > 0:
            if short > self.tree.num_evictable:  # then nothing is evicted in vain
                return Deferred(f"{missing} pages are needed and {self.ledger.num_free} are free")
            self.tree.evict(short)
        holding.pages += self.ledger.acquire(missing, holding.owner)
        return None

    def publish(self, holding: Holding, tokens: Sequence[int]) -> None:
        """Offer the whole pages of a computed prompt to the prefix cache; the holding goes on reading them."""
        if not self._reuse:
            return
        exclusive = set(self.tree.insert(tokens, holding.pages, holding.owner))
        holding.shared = {page for page in holding.pages if page not in exclusive}

    def hand_on(self, holding: Holding, owner: Owner) -> None:
        """Let a holding pass to its next stage."""
        self.ledger.move(holding.own, holding.owner, owner)
        self.ledger.move_reader(sorted(holding.shared), holding.owner, owner)
        holding.owner = owner

    def drop(self, holding: Holding) -> None:
        """End a holding."""
        self.ledger.release(holding.own, holding.owner)
        self.tree.unshare(sorted(holding.shared), holding.owner)
        holding.pages, holding.shared = [], set()

    def forget(self, tokens: Sequence[int]) -> None:
        """Take a prompt whose pages turned out to be corrupt out of the prefix cache."""
        self.tree.purge(tokens)

    def reset(self) -> None:
        """Begin anew with empty pools and no owners, whatever became of the old ones."""
        self._start_over()
        del self.pools  # both at once may not fit
        self.pools = self._allocate()
