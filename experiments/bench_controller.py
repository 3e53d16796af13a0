"""What controlling a lane costs: CPU time of a tick's `SpecuStream.plan` and `SpecuStream.learn`, by depth policy.

COMMAND   nice -n 19 python -m experiments.bench_controller --output=FILE.json
          (options: --policies=specustream,goodput,... --ticks=1000 --repeats=7)
DURATION  about a minute on one core.

The lane has four slots, of which one or all are held, a drafter that catches up, prices between two context lengths,
and no log; what a tick brings is drawn beforehand and told a tick late. Runs take turns, so that what else the machine
does meets all policies alike. CPU time of a process, not the clock's: the loop shares its cores with the models. Ticks
follow one another without a model between them, so that caches are warmer than they are while serving.
"""

import pathlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from absl import app, flags, logging

from experiments import common
from experiments.bench_common import spread
from streamserve.parts import POLICIES
from streamserve.specustream import CostTable, DraftWay, LaneLoad, SpecuStream, Ticket, synthetic
from streamserve.types import EMPTY_TOKEN, StepOutput

TIERS, SLOTS, ROUNDS, BATCHES = (0, 1, 2, 4, 6, 8), 4, 4, (1, 4)
ROUND_S, TOKEN_S, DRAFT_S = 1e-3, 1e-4, 5e-5  # plain decoding, what a token of depth adds, and drafting's part of that
ACCEPTANCE = 0.75
TICKS_OF_A_REQUEST = 32
WARM_UP = 100  # ticks of a run that do not count
OUTPUTS = 32  # that take turns, of each depth
MICROSECONDS = 1e6


def define_flags(values: flags.FlagValues) -> None:
    """Define the flags; on call and not on import, since other scripts have flags of the same names."""
    flags.DEFINE_string("output", "bench_controller.json", "JSON file that is written.", flag_values=values)
    flags.DEFINE_list("policies", sorted(POLICIES), "Names of depth policies.", flag_values=values)
    flags.DEFINE_integer("ticks", 1000, "Ticks of a run that count.", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("repeats", 7, "Runs of each policy and batch.", lower_bound=1, flag_values=values)


def main(argv: Sequence[str]) -> None:
    """Run the command line."""
    del argv
    logging.set_verbosity(logging.WARNING)
    values = flags.FLAGS
    unknown = sorted(set(values.policies) - set(POLICIES))
    if unknown:
        common.stop(f"unknown policy {unknown[0]!r}; known: {', '.join(sorted(POLICIES))}")
    cells = bench(values.policies, ticks=values.ticks, repeats=values.repeats)
    command = ("python", "-m", "experiments.bench_controller", *sys.argv[1:])
    record = {
        "environment": common.environment(share_devices=False, command=command),
        "lane": {"tiers": TIERS, "slots": SLOTS, "rounds": ROUNDS, "acceptance": ACCEPTANCE},
        "ticks": values.ticks,
        "repeats": values.repeats,
        "cpu_us": cells,
    }
    common.write_json(pathlib.Path(values.output), record)
    for cell in cells:
        total = cell["total"]
        told = f"{total['median']:6.1f} us ({total['q25']:.1f} to {total['q75']:.1f})"
        print(f"{cell['policy']:18} batch {cell['batch']}: {told}")


def bench(policies: Sequence[str], *, ticks: int, repeats: int) -> list[dict[str, Any]]:
    """Run every policy at every batch, turn by turn; gives a row of each, in microseconds of a tick."""
    runs: dict[tuple[str, int], list[np.ndarray]] = {(name, batch): [] for name in policies for batch in BATCHES}
    for seed in range(repeats):
        for (name, batch), of_cell in runs.items():
            of_cell.append(run(name, batch, ticks, seed=seed))
    return [{"policy": name, "batch": batch, **summary(of_cell)} for (name, batch), of_cell in runs.items()]


def summary(runs: Sequence[np.ndarray]) -> dict[str, dict[str, float]]:
    """Give the spread over runs of a run's median tick, microseconds; medians of the parts need not add up."""
    parts = {"plan": [run[:, 0] for run in runs], "learn": [run[:, 1] for run in runs]}
    parts["total"] = [run.sum(axis=1) for run in runs]
    return {
        name: spread([MICROSECONDS * float(np.median(seconds)) for seconds in values]) for name, values in parts.items()
    }


def run(name: str, batch: int, ticks: int, *, seed: int, clock: Callable[[], float] = time.process_time) -> np.ndarray:
    """Control a lane for some ticks.

    Args:
      name: of the policy.
      batch: slots that are held.
      ticks: that count.
      seed: of what the ticks bring and how long they take.
      clock: s, of CPU time.

    Returns:
      float64 [ticks, 2], s: of `plan` and of `learn`.
    """
    rng = np.random.default_rng([seed, batch])
    outputs = {tier: [draw_output(rng, batch, tier) for _ in range(OUTPUTS)] for tier in TIERS}
    noise = rng.lognormal(0.0, 0.05, WARM_UP + ticks + 1).tolist()
    controller = make_controller(name)
    unread = controller.plan(_load(batch, 0), 0.0)
    spent = []
    for tick in range(1, WARM_UP + ticks + 1):
        load = _load(batch, tick)
        output, seconds = _came(unread, outputs, tick, noise[tick])
        begin = clock()
        ticket = controller.plan(load, float(tick))
        planned = clock()
        controller.learn(unread, output, seconds, float(tick))
        spent.append((planned - begin, clock() - planned))
        unread = ticket
    return np.array(spent[WARM_UP:])


def make_controller(name: str) -> SpecuStream:
    """Build the control loop of a lane, over prices between whose context lengths every tick lies."""
    tier_A = np.asarray(TIERS, np.float64)
    slower_NC1 = np.array([[1.0, 1.1], [1.15, 1.3], [1.4, 1.6]])[:, :, None]  # by batch and context length
    costs = CostTable(
        tiers=TIERS,
        batches=(1, 2, SLOTS),
        contexts=(320, 1920),
        seconds_NCA=slower_NC1 * (ROUND_S + TOKEN_S * tier_A),
        draft_NCA=slower_NC1 * (DRAFT_S * tier_A),
    )
    # Only the oracle needs to be told, and only it pays for it.
    process = synthetic.parse(f"iid:{ACCEPTANCE}", max(TIERS)) if name == "oracle" else None
    way = DraftWay(catches_up=True, process=process)
    return SpecuStream(POLICIES[name](TIERS, SLOTS), costs, slots=SLOTS, rounds=ROUNDS, way=way)


def draw_output(rng: np.random.Generator, batch: int, depth: int) -> StepOutput:
    """Draw what a tick of `batch` rows brings, all of which draft `depth` tokens in every round."""
    accepted_BR = np.minimum(rng.geometric(1 - ACCEPTANCE, (batch, ROUNDS)) - 1, depth).astype(np.int32)
    emitted_BRT = np.arange(depth + 1) <= accepted_BR[:, :, None]
    first_B1 = np.full((batch, 1), EMPTY_TOKEN, np.int32)
    tokens_BX = np.where(emitted_BRT, 7, EMPTY_TOKEN).astype(np.int32).reshape(batch, -1)
    host: dict[str, Any] = {  # arrays of the host, as a lane reads them
        "tokens": np.concatenate([first_B1, tokens_BX], axis=1),
        "accepted": accepted_BR,
        "drafted": np.full_like(accepted_BR, depth),
        "divergence": np.zeros((batch, ROUNDS), np.float32),
        "finish": np.zeros(batch, np.int32),
    }
    return StepOutput(**host, logprobs=None)


def _load(batch: int, tick: int) -> LaneLoad:
    """Let the first slots be held, by requests that come and go together."""
    generation = tick // TICKS_OF_A_REQUEST
    holders = {slot: generation * batch + slot for slot in range(batch)}
    return LaneLoad(holders=holders, mean_length=400.0 + 8 * (tick % TICKS_OF_A_REQUEST))


def _came(
    ticket: Ticket, outputs: Mapping[int, Sequence[StepOutput]], tick: int, noise: float
) -> tuple[StepOutput, float]:
    """Find an output of a ticket's depth, and how long its tick took."""
    seconds = ROUNDS * float(ticket.context.cost_A[ticket.plan.arm]) + float(ticket.context.switch_A[ticket.plan.arm])
    return outputs[ticket.tier][tick % OUTPUTS], seconds * noise


if __name__ == "__main__":
    define_flags(flags.FLAGS)
    app.run(main)
