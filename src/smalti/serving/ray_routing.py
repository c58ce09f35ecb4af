"""How Ray Serve chooses a replica for a picture, and how many replicas there are: both by queued cost.

Ray counts requests; a picture of 50 guided steps is worth twenty-five of one that takes 4 unguided ones. Imported by
Ray alone, from the paths that ray_app.py gives it.
"""

from itertools import count
from typing import Any

from ray.serve.config import AutoscalingContext
from ray.serve.request_router import FIFOMixin, PendingRequest, ReplicaID, RequestRouter, RunningReplica

from smalti.serving.ray_engine import QUEUED_COST


class LeastQueuedCost(FIFOMixin, RequestRouter):  # type: ignore[misc]
    """Sends a picture to the replica with the least work.

    That is what this handle has sent there and has not ended or, where it is more, what the replica last told of, for
    there may be other handles. Equals take turns.
    """

    def initialize_state(self, **_: object) -> None:
        """Nothing has been sent."""
        self._costs: dict[str, tuple[ReplicaID, float]] = {}  # by request
        self._turns: dict[ReplicaID, int] = {}
        self._numbers = count()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Each replica a rank of its own, the least loaded first."""
        return [[replica] for replica in sorted(candidate_replicas, key=self._load)]

    def _load(self, replica: RunningReplica) -> tuple[float, int]:
        sent = sum(cost for where, cost in self._costs.values() if where == replica.replica_id)
        told = float(replica.routing_stats.get(QUEUED_COST, 0.0))
        return max(sent, told), self._turns.get(replica.replica_id, -1)

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: object) -> None:
        """Count it."""
        self._turns[replica_id] = next(self._numbers)
        cost = float(pending_request.kwargs.get("cost", 1.0))
        self._costs[pending_request.metadata.internal_request_id] = (replica_id, cost)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Count it no more."""
        self._costs.pop(internal_request_id, None)


class QueuedCostPolicy:
    """As many replicas as the queued cost needs. target_cost: rows x tokens x calls that a replica should have."""

    def __init__(self, target_cost: float) -> None:
        self.target_cost = target_cost

    def __call__(self, context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
        """The wanted number; Ray applies bounds, delays and factors."""
        queued = sum((context.aggregated_metrics or {}).get(QUEUED_COST, {}).values())
        return queued / self.target_cost, {}
