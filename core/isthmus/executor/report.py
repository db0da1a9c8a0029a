"""What building an executor settled on, and what it cost."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True, kw_only=True)
class ExecutorReport:
    """Bytes are differences of what the device had left (of this process's resident memory where
    the device uses the host's), so they hold allocators' slack; ``kv_bytes`` is exact."""

    dtype: str
    kv_dtype: str
    weights_bytes: int = 0
    workspace_bytes: int = 0
    """Kept after the largest step was tried: step buffers, row state and the allocator's reserve."""
    kv_bytes: int = 0
    graph_bytes: int = 0
    num_graphs: int = 0
    load_s: float = 0.0
    warm_up_s: float = 0.0
    capture_s: float = 0.0
    providers: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    """Downgrades and choices, each with its reason."""

    def summary(self) -> str:
        """Where the memory went, in one line."""
        parts = {
            f"weights ({self.dtype})": self.weights_bytes,
            "workspace": self.workspace_bytes,
            f"KV cache ({self.kv_dtype})": self.kv_bytes,
            f"{self.num_graphs} graphs": self.graph_bytes,
        }
        ledger = ", ".join(f"{name} {taken / 2**30:.2f} GiB" for name, taken in parts.items() if taken)
        times = f"loaded in {self.load_s:.1f} s, warm in {self.warm_up_s:.1f} s"
        return f"{ledger}; {times}" + (f", captured in {self.capture_s:.1f} s" if self.num_graphs else "")
