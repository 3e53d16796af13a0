"""Pages of one mesh: what the cache gives up for a request."""

from absl.testing import parameterized

from streamserve.kv.pages import Owner, Stage
from streamserve.pipeserve.store import PageStore
from streamserve.types import Deferred, Pools


class PageStoreTest(parameterized.TestCase):
    @parameterized.parameters((6, True), (7, False))
    def test_cached_prefixes_are_given_up_to_the_last_page_and_none_in_vain(self, wanted, fits):
        store = PageStore(lambda: Pools(target=(), draft=()), num_pages=7, page_size=2, reuse_prefixes=True)
        tokens = tuple(range(8))
        holding = store.begin(tokens, Owner(Stage.PREFILL, "a"))
        store.publish(holding, tokens)
        store.drop(holding)
        self.assertEqual((store.num_free, store.tree.num_evictable), (2, 4))
        got = store.begin(tuple(range(50, 50 + 2 * wanted)), Owner(Stage.PREFILL, "b"))
        self.assertEqual(not isinstance(got, Deferred), fits)
        self.assertEqual((store.num_free, store.tree.num_evictable), (0, 0) if fits else (2, 4))
