"""The ledger: one owner a page, at every moment, and readers on the prefix cache's pages only."""

import hypothesis
import hypothesis.strategies as st
import pytest
from absl.testing import parameterized
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from streamserve.kv.pages import PREFIX_CACHE, SCRATCH_PAGE, OutOfPagesError, Owner, PageLedger, Stage

ONE, TWO = Owner(Stage.PREFILL, "1"), Owner(Stage.SLOT, "2")


class OwningTest(parameterized.TestCase):
    def test_the_scratch_page_is_never_handed_out(self):
        ledger = PageLedger(4)
        self.assertEqual((ledger.num_pages, ledger.capacity, ledger.num_free), (4, 3, 3))
        self.assertEqual(ledger.acquire(3, ONE), (1, 2, 3))
        self.assertIsNone(ledger.owner(SCRATCH_PAGE))
        with self.assertRaisesRegex(ValueError, "page 0 is owned by None"):
            ledger.release((SCRATCH_PAGE,), ONE)

    def test_a_ledger_needs_a_page_beside_the_scratch_page(self):
        with self.assertRaisesRegex(ValueError, "num_pages=1: page 0 is scratch"):
            PageLedger(1)

    def test_the_lowest_free_pages_go_first(self):
        ledger = PageLedger(8)
        ledger.acquire(6, ONE)
        ledger.release((5, 2, 4), ONE)
        self.assertEqual(ledger.acquire(0, TWO), ())
        self.assertEqual(ledger.acquire(2, TWO), (2, 4))
        self.assertEqual(ledger.acquire(2, TWO), (5, 7))
        self.assertEqual(ledger.held(), {1: ONE, 2: TWO, 3: ONE, 4: TWO, 5: TWO, 6: ONE, 7: TWO})

    def test_acquiring_is_all_or_nothing(self):
        ledger = PageLedger(4)
        ledger.acquire(1, ONE)
        with self.assertRaisesRegex(OutOfPagesError, "SLOT.*'2'.* wants 3 pages, 2 of 3 are free"):
            ledger.acquire(3, TWO)
        self.assertEqual(ledger.num_free, 2)
        ledger.check()

    def test_a_page_moves_from_its_owner_only(self):
        ledger = PageLedger(4)
        pages = ledger.acquire(2, ONE)
        ledger.move(pages, ONE, TWO)
        self.assertEqual(ledger.held(), {1: TWO, 2: TWO})
        with self.assertRaisesRegex(ValueError, "page 1 is owned by .*'2'.*, not by .*'1'"):
            ledger.move(pages, ONE, TWO)

    @parameterized.parameters("move", "release")
    def test_one_foreign_page_spoils_all(self, method):
        ledger = PageLedger(4)
        mine, theirs = ledger.acquire(2, ONE), ledger.acquire(1, TWO)
        to = (PREFIX_CACHE,) if method == "move" else ()
        with self.assertRaisesRegex(ValueError, "page 3 is owned by .*'2'.*, not by .*'1'"):
            getattr(ledger, method)((*mine, *theirs), ONE, *to)
        with self.assertRaisesRegex(ValueError, r"named twice: \[1, 1\]"):
            getattr(ledger, method)((1, 1), ONE, *to)
        self.assertEqual(ledger.held(), {1: ONE, 2: ONE, 3: TWO})

    def test_a_second_release_is_refused(self):
        ledger = PageLedger(2)
        ledger.release(ledger.acquire(1, ONE), ONE)
        with self.assertRaisesRegex(ValueError, "page 1 is owned by None"):
            ledger.release((1,), ONE)

    def test_what_is_held_is_a_copy(self):
        ledger = PageLedger(2)
        ledger.acquire(1, ONE)
        ledger.held().clear()
        self.assertEqual(ledger.owner(1), ONE)


class ReadingTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.ledger = PageLedger(5)
        self.pages = self.ledger.acquire(2, PREFIX_CACHE)

    def test_pages_are_read_by_many_until_each_leaves(self):
        self.ledger.share(self.pages, ONE)
        self.ledger.share((1,), TWO)
        self.assertEqual(self.ledger.readers(1), {ONE, TWO})
        self.assertEqual([self.ledger.num_readers(page) for page in (1, 2, 3)], [2, 1, 0])
        self.ledger.unshare(self.pages, ONE)
        self.assertEqual([self.ledger.readers(page) for page in (1, 2)], [{TWO}, frozenset()])
        self.assertEqual(self.ledger.owner(1), PREFIX_CACHE)

    def test_only_the_prefix_caches_pages_can_be_read(self):
        self.ledger.acquire(1, ONE)
        for page, owner in ((3, ".*'1'.*"), (4, "None"), (SCRATCH_PAGE, "None")):
            with self.assertRaisesRegex(ValueError, f"page {page} is owned by {owner}, not by .*prefix cache"):
                self.ledger.share((1, page), TWO)
        self.assertEqual(self.ledger.num_readers(1), 0)

    def test_a_reader_comes_once_and_leaves_once(self):
        self.ledger.share((2,), ONE)
        with self.assertRaisesRegex(ValueError, "page 2 is already read by .*'1'"):
            self.ledger.share(self.pages, ONE)
        with self.assertRaisesRegex(ValueError, "page 1 is not read by .*'1'"):
            self.ledger.unshare((2, 1), ONE)
        with self.assertRaisesRegex(ValueError, "named twice"):
            self.ledger.unshare((2, 2), ONE)
        with self.assertRaisesRegex(ValueError, "named twice"):
            self.ledger.share((1, 1), ONE)
        self.assertEqual([self.ledger.num_readers(page) for page in (1, 2)], [0, 1])

    def test_a_page_that_is_read_is_neither_released_nor_moved(self):
        self.ledger.share((2,), ONE)
        with self.assertRaisesRegex(ValueError, "page 2 of .*prefix cache.* is still read by .*'1'"):
            self.ledger.release(self.pages, PREFIX_CACHE)
        with self.assertRaisesRegex(ValueError, "page 2 .* is still read by"):
            self.ledger.move(self.pages, PREFIX_CACHE, TWO)
        self.assertEqual(self.ledger.held(), {1: PREFIX_CACHE, 2: PREFIX_CACHE})

    def test_reading_is_handed_on(self):
        self.ledger.share(self.pages, ONE)
        self.ledger.move_reader((2,), ONE, TWO)
        self.assertEqual([self.ledger.readers(page) for page in self.pages], [{ONE}, {TWO}])
        with self.assertRaisesRegex(ValueError, "page 2 is not read by .*'1'"):
            self.ledger.move_reader(self.pages, ONE, TWO)
        self.ledger.share((2,), ONE)
        with self.assertRaisesRegex(ValueError, "page 2 is already read by .*'2'"):
            self.ledger.move_reader(self.pages, ONE, TWO)
        self.assertEqual([self.ledger.readers(page) for page in self.pages], [{ONE}, {ONE, TWO}])


class CheckTest(parameterized.TestCase):
    @parameterized.named_parameters(
        ("a_lost_page", lambda ledger: ledger._free.pop()),
        ("a_page_that_is_free_twice", lambda ledger: ledger._free.append(ledger._free[0])),
        ("a_page_both_free_and_owned", lambda ledger: ledger._free.append(1)),
        ("a_free_scratch_page", lambda ledger: ledger._free.append(SCRATCH_PAGE)),
        ("a_reader_of_a_request_s_page", lambda ledger: ledger._readers.update({1: {TWO}})),
        ("a_reader_of_a_free_page", lambda ledger: ledger._readers.update({3: {TWO}})),
        ("an_empty_set_of_readers", lambda ledger: ledger._readers.update({2: set()})),
    )
    def test_check_sees(self, damage):
        ledger = PageLedger(4)
        ledger.acquire(1, ONE)
        ledger.acquire(1, PREFIX_CACHE)
        ledger.check()
        damage(ledger)
        with self.assertRaises(AssertionError):
            ledger.check()


OWNERS = st.sampled_from([ONE, TWO, PREFIX_CACHE])
PAGES = st.lists(st.integers(0, 4), min_size=1, max_size=2)


class LedgerMachine(RuleBasedStateMachine):
    """The ledger beside two dicts: calls that break a rule raise and change nothing, all others do what they say."""

    def __init__(self):
        super().__init__()
        self.ledger = PageLedger(5)
        self.owners: dict[int, Owner] = {}
        self.readers: dict[int, set[Owner]] = {page: set() for page in range(5)}

    def call(self, method, pages, *args, when) -> list[int]:
        """Call `method`, which must raise unless all pages allow it; return the pages that change."""
        if len(set(pages)) == len(pages) and all(when(page) for page in pages):
            method(pages, *args)
            return pages
        with pytest.raises(ValueError, match="page"):
            method(pages, *args)
        return []

    def unread(self, page, owner) -> bool:
        return self.owners.get(page) == owner and not self.readers[page]

    @rule(count=st.integers(0, 3), owner=OWNERS)
    def acquire(self, count: int, owner: Owner):
        free = [page for page in range(1, 5) if page not in self.owners]
        if count <= len(free):
            assert self.ledger.acquire(count, owner) == tuple(free[:count])
            self.owners.update(dict.fromkeys(free[:count], owner))
        else:
            with pytest.raises(OutOfPagesError):
                self.ledger.acquire(count, owner)

    @rule(pages=PAGES, owner=OWNERS, to=OWNERS)
    def move(self, pages, owner, to):
        for page in self.call(self.ledger.move, pages, owner, to, when=lambda page: self.unread(page, owner)):
            self.owners[page] = to

    @rule(pages=PAGES, owner=OWNERS)
    def release(self, pages, owner):
        for page in self.call(self.ledger.release, pages, owner, when=lambda page: self.unread(page, owner)):
            del self.owners[page]

    @rule(pages=PAGES, reader=OWNERS)
    def share(self, pages, reader):
        can = lambda page: self.owners.get(page) == PREFIX_CACHE and reader not in self.readers[page]  # noqa: E731
        for page in self.call(self.ledger.share, pages, reader, when=can):
            self.readers[page].add(reader)

    @rule(pages=PAGES, reader=OWNERS)
    def unshare(self, pages, reader):
        for page in self.call(self.ledger.unshare, pages, reader, when=lambda page: reader in self.readers[page]):
            self.readers[page].remove(reader)

    @rule(pages=PAGES, reader=OWNERS, to=OWNERS)
    def move_reader(self, pages, reader, to):
        can = lambda page: reader in self.readers[page] and to not in self.readers[page]  # noqa: E731
        for page in self.call(self.ledger.move_reader, pages, reader, to, when=can):
            self.readers[page] = self.readers[page] - {reader} | {to}

    @invariant()
    def agrees_with_the_model(self):
        self.ledger.check()
        assert self.ledger.held() == self.owners
        assert self.ledger.num_free == self.ledger.capacity - len(self.owners)
        assert all(self.ledger.readers(page) == readers for page, readers in self.readers.items())


LedgerMachineTest = LedgerMachine.TestCase
LedgerMachineTest.settings = hypothesis.settings(max_examples=30, stateful_step_count=60, deadline=None)
