"""Keeps trees of arrays on disk by step, with orbax: what training needs to go on after it was killed.

Owns the folder of one run. It knows nothing of what the trees hold: parameters, an optimizer's state, anything.
"""

import pathlib
from types import TracebackType
from typing import Any

import jax
import orbax.checkpoint as ocp


class Checkpoints:
    """The checkpoints of one run; a context manager.

    A checkpoint appears under its step once it is whole, so a run killed while saving goes on from the one before.
    """

    def __init__(self, folder: pathlib.Path, *, max_to_keep: int):
        """Open a folder, making it if need be.

        Args:
          folder: of this run alone.
          max_to_keep: older checkpoints are deleted beyond this number.
        """
        options = ocp.CheckpointManagerOptions(max_to_keep=max_to_keep, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(folder.resolve(), options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Wait until everything is written."""
        self._manager.close()

    def latest_step(self) -> int | None:
        """Step of the newest whole checkpoint; None if there is none."""
        return self._manager.latest_step()

    def save(self, step: int, tree: Any) -> None:
        """Write a tree of arrays in the background; it may be donated as soon as this returns.

        Raises:
          ValueError: the step was saved before, or is not after the latest.
        """
        latest = self.latest_step()
        if latest is not None and step <= latest:
            raise ValueError(f"step {step} is not after the latest checkpoint's, {latest}")
        self._manager.save(step, args=ocp.args.StandardSave(tree))

    def restore(self, like: Any, *, step: int | None = None, shardings: Any = None) -> Any:
        """Read a tree, each array straight into its shards.

        Args:
          like: a tree of arrays or `jax.ShapeDtypeStruct` of the same structure and shapes; its dtypes are given back.
          step: which; None means the latest.
          shardings: tree of `NamedSharding`; None takes those of `like`.

        Raises:
          FileNotFoundError: there is no such checkpoint.
          ValueError: `like` has another structure or other shapes than what was saved.
        """
        wanted = self.latest_step() if step is None else step
        if wanted is None or wanted not in self._manager.all_steps():
            raise FileNotFoundError(f"{self._manager.directory} has no checkpoint {'at all' if step is None else step}")
        if shardings is None:
            shardings = jax.tree.map(lambda leaf: leaf.sharding, like)
        abstract = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), like, shardings
        )
        return self._manager.restore(wanted, args=ocp.args.StandardRestore(abstract))
