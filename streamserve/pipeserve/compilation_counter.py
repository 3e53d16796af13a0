"""What was compiled while nothing was to be compiled: the process's compilations, counted or forbidden."""

import jax

_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"  # of jax.monitoring, once per compilation


class CompilationError(AssertionError):
    """Something was compiled after warm-up."""


class CompilationCounter:
    """Counts the compilations of the process while it is switched on."""

    def __init__(self, *, forbid: bool = False) -> None:
        """Start switched off; `forbid` makes each compilation an error where it happens."""
        self.count = 0
        self.on = False
        self._forbid = forbid
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        del kwargs
        if self.on and event == _COMPILE_EVENT:
            self.count += 1
            if self._forbid:
                raise CompilationError(f"a program was compiled after warm-up, in {duration_secs:.3f} s")
