"""Misbehaviour on demand, for `smalti chaos` and tests: what a bad request, a bad kernel or a full device would do."""

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from smalti.serving.messages import PictureOrder
from smalti.serving.picture import Picture


@dataclass(frozen=True)
class Faults:
    """Faults at the middle of a plan. hang_seconds: how long a hang lasts, if nobody kills it."""

    hang_seconds: float = 3600.0

    def before_forward(self, orders: Sequence[PictureOrder], pictures: Sequence[Picture]) -> None:
        """Do what the orders ask for, if their pictures are half drawn."""
        for order, picture in zip(orders, pictures, strict=True):
            if order.fault is None or picture.call < picture.plan.num_calls // 2:
                continue
            if order.fault == "abort":
                os.kill(os.getpid(), signal.SIGKILL)
            elif order.fault == "hang":
                time.sleep(self.hang_seconds)
            elif order.fault == "nan":
                x = picture.trajectory.x
                if x.is_floating_point():
                    picture.trajectory.x = torch.full_like(x, torch.nan)
                else:  # tokens
                    picture.guidance_scale = torch.nan
            elif order.fault == "out_of_memory":
                raise torch.OutOfMemoryError(f"a fault: no memory for {len(orders)} pictures")
            else:
                raise RuntimeError("a fault: the forward failed")
