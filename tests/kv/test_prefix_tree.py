"""The prefix tree: longest whole-page prefixes, least recently used leaves first, and no page lost under a reader."""

import hypothesis
import hypothesis.strategies as st
from absl.testing import parameterized
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from streamserve.kv.pages import PREFIX_CACHE, Owner, PageLedger, Stage
from streamserve.kv.prefix_tree import PrefixTree


def request(name) -> Owner:
    return Owner(Stage.PREFILL, str(name))


ONE, TWO, THREE = request(1), request(2), request(3)


class PrefixTreeTestCase(parameterized.TestCase):
    """A tree with pages of two tokens; prompts are strings, as one may write "abcd" for four tokens."""

    def setUp(self):
        super().setUp()
        self.ledger = PageLedger(20)
        self.tree = PrefixTree(self.ledger, page_size=2)

    def publish(self, prompt, name="publisher") -> tuple[int, ...]:
        """Serve a prompt from beginning to end: pages that stay in the tree."""
        owner = request(name)
        pages = self.start(prompt, owner)
        for page in self.tree.insert(tokens(prompt), pages, owner):
            self.ledger.release((page,), owner)
        read = tuple(page for page in pages if owner in self.ledger.readers(page))
        self.tree.unshare(read, owner)
        return read

    def start(self, prompt, owner) -> tuple[int, ...]:
        """Match a prompt and acquire what is missing."""
        found = self.tree.match(tokens(prompt), owner)
        return found + self.ledger.acquire(-(-len(prompt) // 2) - len(found), owner)

    def found(self, prompt) -> tuple[int, ...]:
        """Look a prompt up and leave at once."""
        pages = self.tree.match(tokens(prompt), THREE)
        self.tree.unshare(pages, THREE)
        return pages


def tokens(prompt: str) -> list[int]:
    return [ord(letter) for letter in prompt]


class MatchingTest(PrefixTreeTestCase):
    @parameterized.parameters(
        ("", 0), ("a", 0), ("ab", 0), ("abc", 1), ("abcd", 1), ("abcde", 2), ("abcdef", 2), ("abcdefg", 3),
        ("abcdefghijk", 3), ("abxdef", 1), ("axcdef", 0), ("cdefg", 0),
    )  # fmt: skip
    def test_the_longest_whole_page_prefix_is_found_but_never_the_whole_prompt(self, prompt, count):
        pages = self.publish("abcdefg")
        self.assertLen(pages, 3)
        self.assertEqual(self.tree.match(tokens(prompt), ONE), pages[:count])
        self.assertEqual([self.ledger.num_readers(page) for page in pages], [1] * count + [0] * (3 - count))

    def test_tokens_are_counted(self):
        self.publish("abcdefg")
        self.assertEqual((self.tree.queried_tokens, self.tree.hit_tokens), (7, 0))
        self.found("abcdx")
        self.assertEqual((self.tree.queried_tokens, self.tree.hit_tokens), (12, 4))

    def test_a_reader_matches_once(self):
        self.publish("abcd")
        self.tree.match(tokens("abcd"), ONE)
        with self.assertRaisesRegex(ValueError, "already read by .*'1'"):
            self.tree.match(tokens("abcd"), ONE)
        self.assertEqual(self.tree.queried_tokens, 8)


class InsertingTest(PrefixTreeTestCase):
    def test_full_pages_become_the_caches_and_the_tail_stays_with_its_owner(self):
        pages = self.start("abcde", ONE) + self.ledger.acquire(1, ONE)
        self.assertEqual(self.tree.insert(tokens("abcde"), pages, ONE), pages[2:])
        self.assertEqual([self.ledger.owner(page) for page in pages], [PREFIX_CACHE, PREFIX_CACHE, ONE, ONE])
        self.assertEqual([self.ledger.readers(page) for page in pages[:2]], [{ONE}, {ONE}])
        self.assertEqual(self.tree.num_pages, 2)

    def test_matched_pages_are_left_as_they_are(self):
        shared = self.publish("abcd")
        pages = self.start("abcdef", ONE)
        self.assertEqual(pages[:2], shared)
        self.assertEqual(self.tree.insert(tokens("abcdef"), pages, ONE), ())
        self.assertEqual(self.found("abcdefg"), pages)

    def test_the_second_of_two_equal_prompts_keeps_its_duplicates(self):
        first, second = self.start("abcd", ONE), self.start("abcdef", TWO)
        self.tree.insert(tokens("abcd"), first, ONE)
        self.assertEqual(self.tree.insert(tokens("abcdef"), second, TWO), second[:2])
        self.assertEqual(self.found("abcdefg"), first + second[2:])
        self.assertEqual([self.ledger.readers(page) for page in first], [{ONE}, {ONE}])
        self.tree.unshare(second[2:], TWO)
        self.ledger.release(second[:2], TWO)
        self.ledger.check()

    def test_equal_pages_after_different_beginnings_are_different(self):
        self.assertNoCommonElements(self.publish("abxy"), self.publish("cdxy"))
        self.assertEqual(self.tree.num_pages, 4)

    def test_a_page_that_is_not_the_owners_is_refused_and_nothing_changes(self):
        pages = (*self.ledger.acquire(1, ONE), *self.ledger.acquire(1, TWO))
        with self.assertRaisesRegex(ValueError, "page 2 is owned by .*'2'.*, not by .*'1'"):
            self.tree.insert(tokens("abcd"), pages, ONE)
        self.assertEqual(self.ledger.held(), {1: ONE, 2: TWO})
        self.assertEqual((self.tree.num_pages, self.found("abcde")), (0, ()))

    def test_too_few_pages_are_refused(self):
        with self.assertRaisesRegex(ValueError, "5 tokens fill 2 pages of 2, got 1 pages"):
            self.tree.insert(tokens("abcde"), self.ledger.acquire(1, ONE), ONE)


class EvictingTest(PrefixTreeTestCase):
    def test_the_least_recently_used_leaf_goes_first_and_parents_after_children(self):
        root, old = self.publish("aaxx")
        _, new = self.publish("aayy")
        self.assertEqual(self.tree.evict(1), 1)
        self.assertIsNone(self.ledger.owner(old))
        self.assertEqual(self.tree.evict(1), 1)
        self.assertEqual(self.ledger.held(), {root: PREFIX_CACHE})
        self.assertEqual((self.ledger.owner(new), self.tree.evict(5)), (None, 1))

    def test_a_match_makes_a_path_young(self):
        old, new = self.publish("aa"), self.publish("bb")
        self.found("aax")
        self.tree.evict(1)
        self.assertEqual(self.ledger.held(), {old[0]: PREFIX_CACHE})
        self.assertIsNone(self.ledger.owner(new[0]))

    def test_publishing_a_prefix_again_makes_it_young(self):
        old = self.publish("aa")
        self.publish("bb")
        self.publish("aa")  # the whole prompt is never matched: a duplicate
        self.tree.evict(1)
        self.assertEqual(self.ledger.held(), {old[0]: PREFIX_CACHE})

    def test_a_parent_joins_by_its_own_age(self):
        self.publish("aaxx")
        middle = self.publish("bb")
        self.found("aax")  # the parent is younger than "bb" now, its child is not
        self.tree.evict(2)
        self.assertIsNone(self.ledger.owner(middle[0]))
        self.assertEqual(self.found("aax"), (1,))

    def test_what_is_read_stays_with_all_above_it(self):
        pages = self.publish("aabbcc")
        self.publish("dd")
        self.ledger.share(pages[1:2], ONE)
        self.assertEqual((self.tree.num_pages, self.tree.num_evictable), (4, 2))
        self.assertEqual(self.tree.evict(9), 2)
        self.assertEqual(self.found("aabbx"), pages[:2])
        self.assertEqual((self.tree.num_evictable, self.tree.evict(9)), (0, 0))
        self.tree.unshare(pages[1:2], ONE)
        self.tree.clear()
        self.assertEqual(self.ledger.held(), {})

    def test_thousands_of_pages_in_one_path_are_no_matter(self):
        ledger = PageLedger(20_001)
        tree = PrefixTree(ledger, page_size=1)
        prompt = range(10_000)
        for owner, act in ((ONE, lambda: tree.evict(10_000)), (TWO, lambda: tree.purge(prompt))):
            pages = ledger.acquire(10_000, owner)
            self.assertEqual(tree.insert(prompt, pages, owner), ())
            self.assertEqual(tree.num_evictable, 0)
            tree.unshare(pages, owner)
            self.assertEqual(tree.num_evictable, 10_000)
            act()
            self.assertEqual((tree.num_pages, ledger.held()), (0, {}))


class PurgingTest(PrefixTreeTestCase):
    def test_the_path_goes_with_all_below_it_and_nothing_else(self):
        self.publish("aabbcc")
        self.publish("aabbdd")
        self.publish("aaee")
        other = self.publish("ffbb")
        self.tree.purge(tokens("aabb"))
        self.assertEqual((self.found("aabbccx"), self.found("aaeex")), ((), ()))
        self.assertEqual(self.found("ffbbx"), other)
        self.assertEqual(self.ledger.held(), dict.fromkeys(other, PREFIX_CACHE))
        self.assertEqual(self.tree.num_pages, 2)

    def test_purging_what_is_not_there_does_nothing(self):
        pages = self.publish("aabb")
        for prompt in ("", "a", "bb", "bbaa"):
            self.tree.purge(tokens(prompt))
        self.assertEqual(self.found("aabbx"), pages)

    def test_a_purged_page_is_released_by_its_last_reader(self):
        pages = self.publish("aabb")
        for reader in (ONE, TWO):
            self.tree.match(tokens("aax"), reader)
        self.tree.purge(tokens("aabb"))
        self.assertEqual(self.found("aax"), ())
        self.tree.clear()
        self.tree.unshare(pages[:1], ONE)
        self.assertEqual(self.ledger.held(), {pages[0]: PREFIX_CACHE})
        self.tree.unshare(pages[:1], TWO)
        self.assertEqual(self.ledger.held(), {})

    def test_what_was_computed_from_a_purged_page_is_not_published(self):
        self.publish("aa")
        pages = self.start("aabbc", ONE)
        self.tree.purge(tokens("aa"))
        again = self.publish("aa")  # sound this time, and at the place of the purged page
        self.assertEqual(self.tree.insert(tokens("aabbc"), pages, ONE), pages[1:])
        self.assertEqual(self.found("aabbc"), again)
        self.tree.unshare(pages[:1], ONE)
        self.assertIsNone(self.ledger.owner(pages[0]))


PROMPTS = st.lists(st.integers(0, 1), max_size=9).map(tuple)
Prefix = tuple[int, ...]


class TreeMachine(RuleBasedStateMachine):
    """The tree beside a dict from prefixes to pages, while requests come, publish, hand over and leave."""

    def __init__(self):
        super().__init__()
        self.ledger = PageLedger(20)
        self.tree = PrefixTree(self.ledger, page_size=2)
        self.places: dict[Prefix, int] = {}
        self.used: dict[Prefix, int] = {}
        self.orphans: set[int] = set()  # purged and still read
        self.corrupt: set[int] = set()  # purged, or computed from what is now purged
        self.running: list[tuple[Owner, Prefix, tuple[int, ...]]] = []
        self.now = 0

    def touch(self, prefixes):
        self.now += 1
        self.used.update(dict.fromkeys(prefixes, self.now))

    def reads(self, owner, pages) -> tuple[int, ...]:
        return tuple(page for page in pages if owner in self.ledger.readers(page))

    def evictable(self) -> set[Prefix]:
        read = [prefix for prefix, page in self.places.items() if self.ledger.num_readers(page)]
        return {prefix for prefix in self.places if not any(r[: len(prefix)] == prefix for r in read)}

    @rule(prompt=PROMPTS)
    def start(self, prompt):
        self.now += 1
        owner = request(self.now)
        whole = [prompt[:end] for end in range(2, len(prompt), 2)]  # `len(prompt)` is not in the range
        missing = next((i for i, prefix in enumerate(whole) if prefix not in self.places), len(whole))
        found = self.tree.match(prompt, owner)
        assert found == tuple(self.places[prefix] for prefix in whole[:missing])
        assert not self.corrupt.intersection(found)
        assert all(owner in self.ledger.readers(page) for page in found)
        self.touch(whole[:missing])
        wanted = -(-len(prompt) // 2) - len(found)
        self.evict(max(0, wanted - self.ledger.num_free))
        if wanted > self.ledger.num_free:
            self.tree.unshare(found, owner)
        else:
            self.running.append((owner, prompt, found + self.ledger.acquire(wanted, owner)))

    @rule(prompt=PROMPTS)
    def serve(self, prompt):
        """From beginning to end: what leaves pages that nobody reads."""
        before = len(self.running)
        self.start(prompt)
        if len(self.running) > before:
            self.insert(*self.running[-1])
            self.leave(before)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def publish(self, data):
        owner, prompt, pages = data.draw(st.sampled_from(self.running))
        end = data.draw(st.integers(0, len(prompt)))  # prefill may have come so far only
        self.insert(owner, prompt[:end], pages)

    def insert(self, owner, prompt, pages):
        left = self.tree.insert(prompt, pages, owner)
        visited = []
        for i, page in enumerate(pages[: len(prompt) // 2]):
            if page in self.orphans:
                break
            visited.append(prompt[: 2 * i + 2])
            self.places.setdefault(visited[-1], page)
        self.touch(visited)
        assert left == tuple(page for page in pages if page not in {*self.places.values(), *self.orphans})

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def hand_over(self, data):
        index = data.draw(st.integers(0, len(self.running) - 1))
        owner, prompt, pages = self.running[index]
        self.now += 1
        to = Owner(Stage.SLOT, str(self.now))
        self.ledger.move([page for page in pages if self.ledger.owner(page) == owner], owner, to)
        self.ledger.move_reader(self.reads(owner, pages), owner, to)
        self.running[index] = (to, prompt, pages)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def finish(self, data):
        self.leave(data.draw(st.integers(0, len(self.running) - 1)))

    def leave(self, index):
        owner, _, pages = self.running.pop(index)
        self.ledger.release([page for page in pages if self.ledger.owner(page) == owner], owner)
        self.corrupt -= {page for page in pages if self.ledger.owner(page) is None}
        self.tree.unshare(self.reads(owner, pages), owner)
        gone = {page for page in self.orphans if self.ledger.owner(page) is None}
        assert gone == {page for page in self.orphans if not any(page in row[2] for row in self.running)}
        self.orphans -= gone
        self.corrupt -= gone

    @rule(count=st.integers(0, 4))
    def evict(self, count):
        can, read = len(self.evictable()), {page for page in self.places.values() if self.ledger.num_readers(page)}
        assert self.tree.num_evictable == can
        assert self.tree.evict(count) == min(count, can)
        for _ in range(min(count, can)):
            parents = {prefix[:-2] for prefix in self.places}
            leaves = [p for p, page in self.places.items() if p not in parents and page not in read]
            oldest = min(leaves, key=lambda prefix: self.used[prefix])
            assert self.ledger.owner(self.places.pop(oldest)) is None

    @rule(prompt=PROMPTS)
    def purge(self, prompt):
        self.tree.purge(prompt)
        for prefix in [p for p in self.places if len(prompt) > 1 and p[:2] == prompt[:2]]:
            page = self.places.pop(prefix)
            if self.ledger.num_readers(page):
                self.orphans.add(page)
            else:
                assert self.ledger.owner(page) is None
        for owner, _, pages in self.running:
            first = next((i for i, page in enumerate(pages) if page in self.orphans), len(pages))
            self.corrupt |= {page for page in pages[first:] if page in self.orphans or self.ledger.owner(page) == owner}

    @invariant()
    def agrees_with_the_model(self):
        self.ledger.check()
        cached = {page for page, owner in self.ledger.held().items() if owner == PREFIX_CACHE}
        assert cached == {*self.places.values(), *self.orphans}
        assert self.tree.num_pages == len(self.places)
        assert not self.corrupt.intersection(self.places.values())
        for owner, _, pages in self.running:
            assert all(self.ledger.owner(p) == owner or owner in self.ledger.readers(p) for p in pages)

    def teardown(self):
        while self.running:
            self.leave(0)
        self.tree.clear()
        assert self.ledger.held() == {}
        assert self.ledger.num_free == self.ledger.capacity


TreeMachineTest = TreeMachine.TestCase
TreeMachineTest.settings = hypothesis.settings(max_examples=40, stateful_step_count=60, deadline=None)
