"""Where a model's time goes: onnxruntime's own profile, summed up by op type."""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from qat2int8.pipelines.sessions import Feeds, profiled_session, run_session

__all__ = ["OpTime", "profile"]


@dataclass(frozen=True)
class OpTime:
    """All nodes of one op type: how many, milliseconds a run, share of the whole in percent."""

    op_type: str
    nodes: int
    milliseconds: float
    percent: float


def profile(model: Path, batches: Iterable[Feeds], *, threads: int = 1) -> tuple[OpTime, ...]:
    """Run the batches with the runtime's profiler on; op types of the executed graph, the slowest first.

    The first batch warms up and is not counted unless it is the only one.

    Raises:
        UnsupportedModel: onnxruntime refuses the model.
        DataError: the inputs do not fit the model.
    """
    with tempfile.TemporaryDirectory(prefix="qat2int8-") as folder:
        running = profiled_session(model, Path(folder) / "profile", threads=threads)
        for feeds in batches:
            run_session(running, feeds)
        events = json.loads(Path(running.end_profiling()).read_text())
    kernels = [event for event in events if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")]
    by_node: dict[tuple[str, str], list[float]] = defaultdict(list)
    for event in kernels:
        by_node[event["args"]["op_name"], event["name"]].append(event["dur"] / 1000.0)
    totals: dict[str, float] = defaultdict(float)
    nodes: dict[str, int] = defaultdict(int)
    for (op_type, _), times in by_node.items():
        counted = times[1:] or times
        totals[op_type] += sum(counted) / len(counted)
        nodes[op_type] += 1
    whole = sum(totals.values())
    return tuple(
        OpTime(op_type, nodes[op_type], total, 100.0 * total / whole if whole else 0.0)
        for op_type, total in sorted(totals.items(), key=lambda item: -item[1])
    )
