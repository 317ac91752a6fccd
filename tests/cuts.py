"""Memory budgets under which one volume is cut into different tasks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tomocpt_stream.blocks import Window, plan_blocks
from tomocpt_stream.errors import PlanError

if TYPE_CHECKING:
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
