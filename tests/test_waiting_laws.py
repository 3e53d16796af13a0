"""The waiting queue under any sequence of calls: against a naive one, and the bound on unfairness."""

import hypothesis
import hypothesis.strategies as st
from absl.testing import parameterized

from streamserve.waiting import INPUT_WEIGHT, OUTPUT_WEIGHT, WaitingQueue
from tests.test_waiting import waiting_request


class NaiveQueue:
    """The rules again, over one list that is searched anew each time."""

    def __init__(self, max_waiting):
        self.max_waiting, self.entries, self.popped, self.served, self.left = max_waiting, [], set(), {}, []

    def line(self, entry):
        return entry.request.priority, entry.request.tenant

    def lines(self):
        return {self.line(entry) for entry in self.entries}

    def has_room(self):
        return sum(entry.sequence not in self.popped for entry in self.entries) < self.max_waiting

    def put(self, entry):
        line = self.line(entry)
        if all(self.line(other) != line or other.sequence in self.popped for other in self.entries):
            self.served[line] = max(self.served.get(line, 0), self.least(line))
        self.entries.append(entry)

    def least(self, line):
        waiting = [self.served[other] for other in self.lines() - {line} if other[0] == line[0]]
        left = [self.served[other] for other in self.left if other[0] == line[0] and other not in self.lines()]
        return min(waiting, default=left[-1] if left else 0)

    def first(self):
        def turn(entry):
            return entry.request.priority, self.served[self.line(entry)], entry.sequence

        return min(self.entries, key=turn, default=None)

    def pop(self):
        entry = self.first()
        if entry is not None:
            self.served[self.line(entry)] += INPUT_WEIGHT * len(entry.request.prompt_token_ids)
            self.popped.add(entry.sequence)
            self.take(entry)
        return entry

    def put_back(self, entry):
        self.served[self.line(entry)] -= INPUT_WEIGHT * len(entry.request.prompt_token_ids)
        self.entries.append(entry)

    def charge(self, entry, output_tokens):
        self.served[self.line(entry)] += OUTPUT_WEIGHT * output_tokens

    def take(self, entry):
        self.entries.remove(entry)
        if self.line(entry) not in self.lines():
            self.left.append(self.line(entry))


class Both:
    """A queue and the naive one side by side; `out` has been popped, `gone` was removed."""

    def __init__(self, max_waiting):
        self.queue, self.naive = WaitingQueue(max_waiting), NaiveQueue(max_waiting)
        self.out, self.gone, self.accepted, self.now = [], [], 0, 0

    def put(self, tenant, priority, number):
        request = waiting_request(f"{self.now}", tenant, priority=priority, tokens=number + 1)
        room = self.naive.has_room()
        assert (self.queue.put(request) is None) == room
        if room:
            self.naive.put(self.queue._entries[request.request_id])
            self.accepted += 1

    def pop(self, *unused):
        del unused
        entry = self.queue.pop()
        assert entry is self.naive.pop()
        self.out += [entry] if entry else []

    def put_back(self, tenant, priority, number):
        del tenant, priority
        if self.out:
            entry = self.out.pop(number % len(self.out))
            self.queue.put_back(entry)
            self.naive.put_back(entry)

    def remove(self, tenant, priority, number):
        del tenant, priority
        if self.naive.entries:
            entry = self.naive.entries[number % len(self.naive.entries)]
            assert self.queue.remove(entry.request.request_id) is entry
            self.naive.take(entry)
            self.gone.append(entry)

    def charge(self, tenant, priority, number):
        del tenant, priority
        if self.out:
            entry = self.out[number % len(self.out)]
            self.queue.charge(entry.request, number)
            self.naive.charge(entry, number)

    def compare(self):
        assert self.queue.peek() is self.naive.first()
        assert len(self.queue) == len(self.naive.entries)
        assert len(self.queue._entries) - len(self.queue._put_back) <= self.naive.max_waiting


class Batching:
    """Continuous batching as in the paper: who does not fit in memory goes back, and admission ends there.

    Tenants a and b always wait, others come now and then; each goes through its own `sizes`, (prompt, output).
    """

    def __init__(self, sizes, capacity, tenants):
        self.sizes, self.capacity, self.tenants = sizes, capacity, tenants
        self.queue, self.used = WaitingQueue(64), 0
        self.arrivals, self.served = dict.fromkeys(tenants, 0), dict.fromkeys(tenants, 0)
        self.running = []  # [request, prompt, output, emitted]
        self.gaps = [0]

    def size(self, tenant, index):
        return self.sizes[tenant][index % len(self.sizes[tenant])]

    def refill(self, tenant):
        while sum(entry.request.tenant == tenant for entry in self.queue._entries.values()) < 2:
            index = self.arrivals[tenant]
            self.queue.put(waiting_request(f"{tenant}{index}", tenant, tokens=self.size(tenant, index)[0]))
            self.arrivals[tenant] += 1

    def serve(self, tenant, service):
        self.served[tenant] += service
        self.gaps.append(self.served["a"] - self.served["b"])

    def admit(self):
        while entry := self.queue.pop():
            request = entry.request
            prompt, output = self.size(request.tenant, int(request.request_id[1:]))
            if self.used + prompt + output > self.capacity:
                self.queue.put_back(entry)
                return
            self.used += prompt + output
            self.running.append([request, prompt, output, 0])
            self.serve(request.tenant, INPUT_WEIGHT * prompt)
            if request.tenant in "ab":
                self.refill(request.tenant)

    def tick(self, number):
        for tenant in "ab" if number % 7 else self.tenants:
            self.refill(tenant)
        self.admit()
        for row in self.running:
            self.queue.charge(row[0], 1)
            self.serve(row[0].tenant, OUTPUT_WEIGHT)
            row[3] += 1
        self.used -= sum(prompt + output for _, prompt, output, emitted in self.running if emitted == output)
        self.running = [row for row in self.running if row[3] < row[2]]


class LawsTest(parameterized.TestCase):
    @hypothesis.settings(max_examples=200, deadline=None)
    @hypothesis.given(
        max_waiting=st.integers(1, 6),
        steps=st.lists(
            st.tuples(
                st.sampled_from(["put", "put", "put", "pop", "pop", "put_back", "remove", "charge", "charge"]),
                st.sampled_from("abc"),
                st.integers(0, 1),
                st.integers(0, 9),
            ),
            min_size=10,
            max_size=80,
        ),
    )
    def test_it_does_what_a_naive_queue_does_and_nobody_is_lost_or_served_twice(self, max_waiting, steps):
        both = Both(max_waiting)
        for both.now, (step, *arguments) in enumerate(steps):
            getattr(both, step)(*arguments)
            both.compare()
        while both.queue:
            both.pop()
        assert sorted(entry.sequence for entry in both.out + both.gone) == list(range(both.accepted))
        assert not both.queue._lines
        assert not both.queue._put_back

    @hypothesis.settings(max_examples=60, deadline=None)
    @hypothesis.given(
        sizes=st.fixed_dictionaries(
            dict.fromkeys("abcd", st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=8))
        ),
        room=st.integers(0, 120),
        others=st.integers(0, 2),
    )
    @hypothesis.example(sizes={"a": [(1, 40)], "b": [(1, 1)]}, room=0, others=0)
    @hypothesis.example(sizes={"a": [(40, 1)], "b": [(1, 1)], "c": [(9, 9)]}, room=0, others=1)
    def test_service_of_two_who_always_wait_differs_by_no_more_than_the_theorem_says(self, sizes, room, others):
        pairs = [pair for tenant in sizes for pair in sizes[tenant]]
        capacity = max(prompt + output for prompt, output in pairs) + room
        batching = Batching(sizes, capacity, "abcd"[: 2 + others])
        for number in range(300):
            batching.tick(number)
        assert batching.served["a"] > 0
        assert batching.served["b"] > 0
        longest = max(prompt for prompt, _ in pairs)
        # Over any interval, hence between any two moments.
        assert max(batching.gaps) - min(batching.gaps) <= 2 * max(INPUT_WEIGHT * longest, OUTPUT_WEIGHT * capacity)

    @hypothesis.settings(max_examples=60, deadline=None)
    @hypothesis.given(
        wanted=st.lists(
            st.tuples(st.sampled_from("ab"), st.integers(0, 1), st.integers(1, 50), st.integers(0, 3)), max_size=40
        )
    )
    def test_a_tenants_requests_of_one_priority_keep_their_order_and_the_bound_holds(self, wanted):
        queue, order = WaitingQueue(5), []
        for index, (tenant, priority, tokens, pops) in enumerate(wanted):
            refused = queue.put(waiting_request(f"{index}", tenant, priority=priority, tokens=tokens))
            assert len(queue) == 5 if refused else len(queue) <= 5
            order += [queue.pop() for _ in range(min(pops, len(queue)))]
        order += [queue.pop() for _ in range(len(queue))]
        for line in {(entry.request.priority, entry.request.tenant) for entry in order}:
            mine = [entry.sequence for entry in order if (entry.request.priority, entry.request.tenant) == line]
            assert mine == sorted(mine)
        assert len({entry.request.request_id for entry in order}) == len(order)
