"""Two depth policies that learn, and runs of them in which feedback comes late, in another order or never."""

import contextlib

import numpy as np

from streamserve.bandits import HostPolicy, Policy
from streamserve.specustream.decision_log import DecisionLog
from streamserve.specustream.depth import NOT_RUN, DepthContext, StepStats, StopRule, whole

TIERS = (0, 2, 4, 7)
SLOTS, ROUNDS, SEED = 3, 2, 5


def greedy(tiers, slots, epsilon=0.3):
    """Epsilon-greedy over the mean rate of each arm, in the state; the price of switching enters the choice."""
    del slots
    num_arms = len(tiers)

    def init():
        return np.zeros(num_arms), np.zeros(num_arms)

    def choose(state, context, noise_A2):
        tokens_A, seconds_A = state
        rate_A = tokens_A / np.maximum(seconds_A, 1e-3) - context.switch_A - context.cost_A
        best = int(np.argmax(rate_A))
        arm = int(noise_A2[1, 0] * num_arms) if noise_A2[0, 0] < epsilon else best
        propensity = epsilon / num_arms + (1 - epsilon) * (arm == best)
        plan = whole(context, arm, propensity)
        return plan._replace(rule=StopRule.ENTROPY, threshold=float(noise_A2[2, 0]), wants_divergence=arm == 1), state

    def update(state, context, plan, stats):
        del context
        tokens_A, seconds_A = state[0].copy(), state[1].copy()
        tokens_A[plan.arm] += stats.emitted_B.sum() + stats.divergence_BR.sum()
        seconds_A[plan.arm] += stats.seconds
        return tokens_A, seconds_A

    return Policy(init, choose, update)


def sampler(tiers, slots):
    """Samples arms by a float32 preference that each feedback moves by the time that it took and the slots' holders."""
    del slots
    num_arms = len(tiers)

    def init():
        return np.zeros(num_arms, np.float32), 0

    def choose(state, context, noise_A2):
        preference_A, count = state
        logit_A = preference_A - context.cost_A.astype(np.float32)
        arm = int(np.argmax(logit_A - np.log(-np.log(noise_A2[:, 0]))))
        prob_A = np.exp(logit_A - logit_A.max())
        plan = whole(context, arm, float(prob_A[arm] / prob_A.sum()))
        depth_B = np.where(context.holder_B == NOT_RUN, 0, plan.depth_B).astype(np.int32)
        return plan._replace(depth_B=depth_B, threshold=1.0 / (3 + count)), (preference_A, count)

    def update(state, context, plan, stats):
        preference_A, count = state[0].copy(), state[1] + 1
        step = np.float32(stats.accepted_BR[context.holder_B != NOT_RUN].sum()) * np.float32(stats.seconds)
        preference_A[plan.arm] += step / np.float32(7)
        return preference_A, count

    return Policy(init, choose, update)


def a_context(generator, previous=-1):
    holder_B = np.where(generator.random(SLOTS) < 0.7, generator.integers(1, 99, SLOTS), NOT_RUN)
    draft_A = generator.random(len(TIERS)) / 3
    return DepthContext(
        tiers_A=np.array(TIERS),
        holder_B=holder_B,
        cost_A=(draft_A + 0.1).astype(np.float32),
        draft_A=draft_A,
        switch_A=generator.random(len(TIERS)) * 1e-9,
        previous=previous,
        waiting=int(generator.integers(5)),
        in_transit=int(generator.integers(3)),
        free_pages=float(generator.random()),
        mean_length=float(generator.random() * 1000),
        cached=1 / 3,
        acceptance_K=generator.random(7) if generator.random() < 0.5 else None,
    )


def some_stats(generator, plan):
    ran_BR = generator.random((SLOTS, ROUNDS)) < 0.8
    drafted_BR = np.where(ran_BR, plan.depth_B[:, None], NOT_RUN).astype(np.int32)
    accepted_BR = np.where(ran_BR, generator.integers(0, drafted_BR.clip(0) + 1), NOT_RUN).astype(np.int32)
    emitted_B = (accepted_BR + 1).sum(axis=1).astype(np.int64)
    divergence_BR = (generator.random((SLOTS, ROUNDS)) * plan.wants_divergence).astype(np.float32)
    return StepStats(drafted_BR, accepted_BR, emitted_B, divergence_BR, float(generator.random() * 0.01 + 0.001))


def run(path, make_policy, *, ticks=150, lanes=2, seed=SEED, flush_every=16):
    """Log a run: each lane's feedback comes up to three ticks late, now and then in another order, or never."""
    generator = np.random.default_rng(0)
    policy = make_policy(TIERS, SLOTS)
    hosts = [HostPolicy(policy, num_arms=len(TIERS), seed=seed + lane) for lane in range(lanes)]
    under_way, feedbacks, now_s = [[] for _ in hosts], [0 for _ in hosts], 1e5
    log = DecisionLog(path, header={"policy": "test", "tiers": TIERS, "seed": seed}, flush_every=flush_every)
    with contextlib.closing(log):
        for _ in range(ticks):
            lane = int(generator.integers(lanes))
            now_s += float(generator.random())
            context = a_context(generator)
            plan = hosts[lane].choose(context)
            under_way[lane].append((log.choose(lane, context, plan, feedbacks[lane], now_s), context, plan))
            while (under_way[lane] and generator.random() < 0.5) or len(under_way[lane]) > 3:
                token, context, plan = under_way[lane].pop(int(generator.integers(min(2, len(under_way[lane])))))
                if generator.random() < 0.1:
                    continue  # its tick is lost
                stats = some_stats(generator, plan)
                hosts[lane].update(context, plan, stats)
                feedbacks[lane] += 1
                log.learn(token, stats, now_s)
