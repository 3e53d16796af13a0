"""Stream pairs: how devices are divided among them, and how they differ on purpose."""

import dataclasses

from streamserve.config.checks import check_choice, check_range


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TopologyConfig:
    """How devices are divided.

    Attributes:
      topology: "disaggregated" gives each pair a prefill and a decode mesh; "colocated" one mesh for both, the control
        that disaggregation is measured against.
      num_pairs: stream pairs (lanes).
      prefill_devices: devices of each prefill mesh, its degree of tensor parallelism; unused when colocated.
      decode_devices: the same of each decode mesh.
      share_devices: let meshes share devices when there are too few.
    """

    topology: str = "disaggregated"
    num_pairs: int = 1
    prefill_devices: int = 1
    decode_devices: int = 1
    share_devices: bool = False

    def __post_init__(self) -> None:
        check_choice("topology.topology", self.topology, ("disaggregated", "colocated"))
        for name in ("num_pairs", "prefill_devices", "decode_devices"):
            check_range(f"topology.{name}", getattr(self, name), 1)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LanesConfig:
    """Stream pairs that differ on purpose, so that routing has something to see on one machine.

    Each field is empty, or has one entry a pair.

    Attributes:
      slots: decode slots, instead of `pipeserve.max_num_seqs`.
      decode_pool_tokens: size of the decode mesh's pools, tokens, instead of that of `pipeserve`.
      slowdown: times, at least 1, that every prefill call and tick seems to take.
      transfer_delay_s: seconds that every hand-off is held up.
      down_from_s: seconds from the pair's first request at which it dies; negative for never.
      down_until_s: seconds from its first request at which it comes back, empty.
      acceptance: what synthetic acceptance draws from there, instead of `speculation.acceptance`.
    """

    slots: tuple[int, ...] = ()
    decode_pool_tokens: tuple[int, ...] = ()
    slowdown: tuple[float, ...] = ()
    transfer_delay_s: tuple[float, ...] = ()
    down_from_s: tuple[float, ...] = ()
    down_until_s: tuple[float, ...] = ()
    acceptance: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("slots", "decode_pool_tokens"):
            for value in getattr(self, name):
                check_range(f"lanes.{name}", value, 1)
        if any(value < 1 for value in self.slowdown):
            raise ValueError(f"lanes.slowdown must be at least 1, got {self.slowdown}")
        if any(value < 0 for value in self.transfer_delay_s):
            raise ValueError(f"lanes.transfer_delay_s must not be negative, got {self.transfer_delay_s}")
        if len(self.down_from_s) != len(self.down_until_s):
            raise ValueError("lanes.down_from_s and lanes.down_until_s go together")
        for begin_s, end_s in zip(self.down_from_s, self.down_until_s, strict=True):
            if begin_s >= 0 and end_s <= begin_s:
                raise ValueError(f"a pair that dies at {begin_s} s must come back later, not at {end_s} s")

    @property
    def are_handicapped(self) -> bool:
        """Whether any pair is slowed down, held up or killed."""
        return bool(self.slowdown or self.transfer_delay_s or self.down_from_s)
