"""The table of moves: complete, nothing leads out of an end, and every request can come to one."""

from absl.testing import parameterized

from streamserve.lifecycle import ENDS, MOVES, IllegalMoveError, Life, State

STRIKES = (State.CANCELLED, State.TIMED_OUT, State.FAILED)


def _reachable(start: State, moves=MOVES) -> set[State]:
    found, edge = set(), [start]
    while edge:
        for state in moves[edge.pop()] - found:
            found.add(state)
            edge.append(state)
    return found


def _life_in(state: State) -> Life:
    """A life that has come to `state` by legal moves only."""
    paths = {State.WAITING: []}
    for _ in State:
        paths = {to: [*path, to] for at, path in paths.items() for to in MOVES[at]} | paths
    life = Life("7.0")
    for to in paths[state]:
        life.move(to)
    return life


class MovesTest(parameterized.TestCase):
    def test_the_table_covers_all_states_and_names_no_other(self):
        self.assertEqual(set(MOVES), set(State))
        self.assertLessEqual(set().union(*MOVES.values()), set(State))

    def test_the_ends_are_the_states_without_moves(self):
        self.assertEqual(ENDS, {State.FINISHED, State.REFUSED, *STRIKES})
        self.assertEqual(ENDS, {state for state in State if not MOVES[state]})

    def test_every_state_is_reachable_from_waiting(self):
        self.assertEqual(_reachable(State.WAITING) | {State.WAITING}, set(State))

    def test_no_state_moves_to_itself(self):
        for state, moves in MOVES.items():
            self.assertNotIn(state, moves)

    @parameterized.parameters(*(state for state in State if state not in ENDS))
    def test_what_has_not_ended_can_still_be_answered_and_be_broken_off_at_once(self, state):
        self.assertIn(State.FINISHED, _reachable(state))
        self.assertLessEqual(set(STRIKES), MOVES[state])

    @parameterized.parameters(
        (State.FINISHED, {State.DECODE}),
        (State.REFUSED, {State.WAITING, State.PREFILL}),
        (State.DECODE, {State.TRANSFER}),
        (State.TRANSFER, {State.PREFILL, State.PREEMPTED}),
        (State.PREFILL, {State.WAITING, State.PREEMPTED}),
        (State.PREEMPTED, {State.DECODE}),
        (State.WAITING, {State.PREFILL, State.TRANSFER}),
    )
    def test_a_state_is_entered_only_from(self, state, sources):
        self.assertEqual({source for source, moves in MOVES.items() if state in moves}, sources)

    def test_nothing_can_change_the_table(self):
        with self.assertRaises(TypeError):
            MOVES[State.FINISHED] = frozenset(State)


class LifeTest(parameterized.TestCase):
    def test_a_request_is_preempted_and_still_finishes(self):
        life = Life("7.0")
        for state in ("PREFILL", "TRANSFER", "DECODE", "PREEMPTED", "TRANSFER", "DECODE", "PREEMPTED", "PREFILL"):
            life.move(State[state])
            self.assertIs(life.state, State[state])
            self.assertFalse(life.ended)
        for state in ("WAITING", "PREFILL", "TRANSFER", "DECODE", "FINISHED"):
            life.move(State[state])
        self.assertTrue(life.ended)

    def test_an_illegal_move_names_the_request_and_both_states(self):
        life = Life("7.0")
        with self.assertRaisesRegex(IllegalMoveError, "^request 7.0: no move from WAITING to DECODE$"):
            life.move(State.DECODE)
        self.assertIs(life.state, State.WAITING)

    @parameterized.product(state=list(State), to=list(State))
    def test_a_life_moves_as_the_table_says(self, state, to):
        life = _life_in(state)
        self.assertEqual(life.ended, state in ENDS)
        if to in MOVES[state]:
            life.move(to)
            self.assertIs(life.state, to)
        else:
            with self.assertRaises(IllegalMoveError):
                life.move(to)
            self.assertIs(life.state, state)
