"""Made-up studies of the paper: rows whose answers are known, and what tests of them share."""

import contextlib
import copy
import io
import itertools
import math
import pathlib
import tempfile
from unittest import mock

from absl.testing import parameterized

from experiments import paper_rows
from experiments.paper_arms import PLAIN, Arm
from experiments.paper_rows import ALL, Study

FLEETS = {
    "pd": {"topology": "disaggregated", "num_pairs": 2, "prefill_devices": 1, "decode_devices": 1, "drafts": True},
    "co": {"topology": "colocated", "num_pairs": 2, "prefill_devices": 1, "decode_devices": 2, "drafts": True},
    "tp": {"topology": "colocated", "num_pairs": 1, "prefill_devices": 1, "decode_devices": 4, "drafts": False},
    "bare": {"topology": "colocated", "num_pairs": 2, "prefill_devices": 1, "decode_devices": 2, "drafts": False},
}
CORNERS = list(itertools.product((0, 1), repeat=3))
BASE, SYSTEM = Arm("bare", "round_robin", PLAIN), Arm("pd", "flowguard", "specustream")


def corner_arm(routing, disaggregation, speculation):
    """Name the arm of a setting of the three factors."""
    return Arm(
        "pd" if disaggregation else "co",
        "flowguard" if routing else "round_robin",
        "specustream" if speculation else PLAIN,
    )


ARMS = [*(corner_arm(*corner) for corner in CORNERS), BASE, Arm("tp", "round_robin", PLAIN)]


class PaperCase(parameterized.TestCase):
    """Has a folder, catches what is printed, and draws few resamples, since each costs."""

    def setUp(self):
        super().setUp()
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)
        self.rows_path = self.folder / "rows.jsonl"
        self.enter_context(mock.patch.object(paper_rows, "RESAMPLES", 100))

    @contextlib.contextmanager
    def printing(self):
        self.out, self.err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(self.out), contextlib.redirect_stderr(self.err):
            yield


def speed_of(arm):
    """Twice as fast by routing, half by disaggregation, thrice by speculation; four times by the last two together."""
    routing, disaggregation, speculation = arm.router == "flowguard", arm.fleet == "pd", arm.policy != PLAIN
    return 2.0**routing * 0.5**disaggregation * 3.0**speculation * 4.0 ** (disaggregation * speculation)


def noise(repeat, workload, prompt):
    """Luck that all arms share."""
    return 1.0 + 0.3 * math.sin(7 * repeat + 3 * len(workload) + prompt)


def made_up(speed=speed_of, *, workloads=("alpaca", "sum"), repeats=2, prompts=4, modes=("offline", "open")):
    """Build a study in which each prompt takes `noise / speed` seconds; a tenth of it goes to the first token."""
    runs = [
        made_up_run(arm, repeat, workload, mode, speed(arm), prompts)
        for repeat in range(repeats)
        for workload in workloads
        for mode in modes
        for arm in ARMS
    ]
    facts = {
        "repeats": repeats,
        "modes": list(modes),
        "workloads": {name: {"prompts": prompts, "lines": 80, "sha256": "0"} for name in workloads},
    }
    return Study(HEADER | facts, {name: made_up_engine(name) for name in FLEETS}, runs)


HEADER = {
    "kind": "header",
    "study": paper_rows.STUDY,
    "seed": 0,
    "routers": ["flowguard"],
    "policies": ["specustream"],
    "rate": 4.0,
    "concurrency": 8,
    "max_different": 0,
    "sampling": {"max_tokens": 24, "temperature": 0.0},
    "cores": 2,
    "time": "2026-11-21T19:00:00+00:00",
    "command": "python -m experiments.reproduce_paper",
    "python": "3.11.7",
    "platform": "Linux",
    "versions": {"jax": "0.10.2"},
    "backend": "cpu",
    "devices": ["cpu:0 cpu", "cpu:1 cpu"],
    "git": {"commit": "abcdef0123456789", "dirty": False},
}


def made_up_engine(name):
    """Say what the engine of a fleet would be: eight slots on four devices."""
    fleet = FLEETS[name]
    slots = 8 // fleet["num_pairs"]
    return {
        "kind": "engine",
        "fleet": name,
        "devices": 4,
        "versions": {"jax": "0.10.2", "python": "3.11.7"},
        "programs": 5,
        "warmup_s": 61.5,
        "settings": {
            **{f"topology.{key}": value for key, value in fleet.items() if key != "drafts"},
            "topology.share_devices": False,
            "model.model": "bundled:target",
            "model.dtype": "float32",
            "pipeserve.max_num_seqs": slots,
            "pipeserve.max_prefills": slots,
            "pipeserve.rounds_per_tick": 4,
            "speculation.method": "draft_model" if fleet["drafts"] else "none",
            "speculation.model": "bundled:draft" if fleet["drafts"] else None,
        },
    }


def made_up_run(arm, repeat, workload, mode, speed, prompts):
    """Say what a run would be: ten tokens a prompt, the same for every arm."""
    seconds = [noise(repeat, workload, prompt) / speed for prompt in range(prompts)]
    return {
        "kind": "run",
        "repeat": repeat,
        "workload": workload,
        "mode": mode,
        **arm._asdict(),
        "duration_s": sum(seconds),
        "failed": 0,
        "compilations_after_warmup": 0,
        "preemptions": 0,
        "kv_transfer_bytes": 10 * (arm.fleet == "pd"),
        "drafts": 10 * (arm.policy != PLAIN),
        "draft_tokens": 40 * (arm.policy != PLAIN),
        "accepted_tokens": 15 * (arm.policy != PLAIN),
        "input_tokens": [100 + prompt for prompt in range(prompts)],
        "output_tokens": [10] * prompts,
        "ttft_s": [one / 10 for one in seconds],
        "latency_s": seconds,
        "charged_s": seconds,
        "lane": [prompt % 2 if FLEETS[arm.fleet]["num_pairs"] > 1 else 0 for prompt in range(prompts)],
        "tokens_sha256": [f"{workload}{prompt}" for prompt in range(prompts)],
    }


def cell_of(study, mode="offline", group=ALL):
    """Find the runs of a mode on a workload."""
    return next(cell for cell in paper_rows.cells(study) if (cell.mode, cell.group) == (mode, group))


def alter(study, arm, **values):
    """Change what the first run of an arm says, in a copy."""
    study = copy.deepcopy(study)
    run = next(run for run in study.runs if paper_rows.arm_of(run) == arm)
    run.update({name: value(run[name]) if callable(value) else value for name, value in values.items()})
    return study


def change_engine(study, fleet, settings=None, **values):
    """Change what is said of a fleet's engine, in a copy."""
    study = copy.deepcopy(study)
    study.engines[fleet].update(values)
    study.engines[fleet]["settings"].update(settings or {})
    return study
