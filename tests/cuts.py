"""One volume cut into tasks in different ways, and the budgets under which a plan cuts it so."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tomocpt_stream.blocks import Window, plan_blocks
from tomocpt_stream.errors import PlanError

if TYPE_CHECKING:
    from tomocpt_stream.blocks import BlockPlan
    from tomocpt_stream.frame import Shape


def budget(shape: Shape, window: Window, share: float, **options: Any) -> int:
    """Return a budget between the least that any plan needs (share 0) and all in one task (share 1)."""
    most = plan_blocks(shape, window, memory=10**13, **options).projected_bytes
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        try:
            plan_blocks(shape, window, memory=middle, **options)
        except PlanError:
            low = middle
        else:
            high = middle
    return round(high + share * (most - high))


def plans(shape: Shape, window: Window, **options: Any) -> dict[str, BlockPlan]:
    """Return plans of one map, by how they cut it: all equal but for their tasks."""
    whole = plan_blocks(shape, window, memory=10**13, **options)
    z, y, x = whole.group
    return {
        "whole": whole,
        "columns": replace(whole, group=(z, 1, 1)),
        "layers": replace(whole, group=(1, y, x)),
        "bricks": replace(whole, group=(-(-z // 2), -(-y // 2), -(-x // 2))),
        "chunks": replace(whole, group=(1, 1, 1)),
    }
