"""The ledger: one owner a page, at every moment."""

import hypothesis
import hypothesis.strategies as st
from absl.testing import parameterized

from streamserve.kv.pages import Owner, PageLedger, Stage


class PageLedgerTest(parameterized.TestCase):
    def test_pages_go_out_once_and_come_back(self):
        ledger = PageLedger(2)
        one, two = Owner(Stage.DECODE, "1"), Owner(Stage.DECODE, "2")
        self.assertEqual([ledger.acquire(one), ledger.acquire(two)], [0, 1])
        with self.assertRaisesRegex(ValueError, "no free page .* all 2 are owned"):
            ledger.acquire(one)
        ledger.release(0, one)
        self.assertEqual(ledger.held(), {1: two})
        self.assertEqual(ledger.num_free, 1)

    def test_a_second_release_and_a_stranger_are_refused(self):
        ledger = PageLedger(1)
        owner = Owner(Stage.DECODE, "1")
        page = ledger.acquire(owner)
        with self.assertRaisesRegex(ValueError, "page 0 is owned by .*'1'.*, not by .*'2'"):
            ledger.release(page, Owner(Stage.DECODE, "2"))
        ledger.release(page, owner)
        with self.assertRaisesRegex(ValueError, "owned by None"):
            ledger.release(page, owner)

    def test_check_sees_a_page_that_is_lost_or_doubled(self):
        for damage in (lambda free: free.pop(), lambda free: free.append(free[0])):
            ledger = PageLedger(3)
            ledger.check()
            damage(ledger._free)
            with self.assertRaises(AssertionError):
                ledger.check()

    @hypothesis.given(st.lists(st.tuples(st.booleans(), st.integers(0, 5)), max_size=60))
    def test_no_sequence_of_moves_loses_or_doubles_a_page(self, moves):
        ledger, held = PageLedger(4), {}
        for acquire, name in moves:
            owner = Owner(Stage.DECODE, str(name))
            if acquire and ledger.num_free:
                held.setdefault(owner, []).append(ledger.acquire(owner))
            elif not acquire and held.get(owner):
                ledger.release(held[owner].pop(), owner)
            ledger.check()
            assert ledger.held() == {page: owner for owner, pages in held.items() for page in pages}
