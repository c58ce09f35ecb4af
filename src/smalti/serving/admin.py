"""/v1/admin: what serves, swapped and split while it serves. For holders of the admin key only.

A request names runs by their names in one folder that the server was given; no text of a request becomes a path.
"""

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from fastapi import APIRouter, Depends
from fastapi import Path as PathParameter
from pydantic import BaseModel, Field

from smalti.errors import UserError, unknown_name
from smalti.serving.arms import Arms, ArmSetState
from smalti.serving.messages import ModelCard
from smalti.serving.schemas import StrictRequest

Result = TypeVar("Result")

_Name = Annotated[str, Field(min_length=1, max_length=200)]


class ModelChange(StrictRequest):
    """A run to load. swap: it takes over the requests of the name's control; add: it waits for POST /v1/admin/arms."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", description="As requests will call it.")]
    run: Annotated[_Name, Field(description="One of the names that GET /v1/admin/models lists.")]
    mode: Literal["swap", "add"] = "swap"


class ArmsChange(StrictRequest):
    """A name's arms, the control first."""

    name: _Name
    weights: Annotated[
        dict[_Name, Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False, strict=False)]],
        Field(min_length=1, max_length=20, description="Weights by version, as name@version; 0 keeps one for later."),
    ]
    shadow: _Name | None = None


class RunList(BaseModel):
    """Runs that can be loaded, and versions that are."""

    runs: list[str]
    served: list[str]


class LoadedModel(BaseModel):
    """A version that was loaded."""

    model: str
    name: str
    version: str
    architecture: str
    parameters: int


def runs_in(folder: Path) -> dict[str, Path]:
    """The folders directly below a folder, by name; what a link leads out of it is left out."""
    try:
        inside = folder.resolve(strict=True)
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise UserError(f"models folder {folder}: {error.strerror}") from None
    return {e.name: e.resolve() for e in entries if e.is_dir() and e.resolve().is_relative_to(inside)}


def admin_router(arms: Arms, guard: Callable[..., Any], models: Path | None = None) -> APIRouter:
    """The administrator's routes. guard: a dependency that raises for who is none. models: the folder of runs."""
    router = APIRouter(prefix="/v1/admin", tags=["admin"], dependencies=[Depends(guard)])
    working: set[asyncio.Task[Any]] = set()

    async def to_its_end(work: Coroutine[Any, Any, Result]) -> Result:
        """Half a swap is none: it goes on when the administrator's connection breaks."""
        task = asyncio.create_task(work)
        working.add(task)
        task.add_done_callback(working.discard)
        return await asyncio.shield(task)

    def runs() -> dict[str, Path]:
        if models is None:
            raise UserError("run: the server was started without a models folder, from which to load")
        return runs_in(models)

    @router.get("/arms")
    async def read_arms() -> list[ArmSetState]:
        """Every name's arms: weights, failures, what the shadow found, and what was changed when and why."""
        return arms.arms_state()

    @router.get("/models")
    async def read_runs() -> RunList:
        """What can be loaded and what is."""
        found = {} if models is None else await asyncio.to_thread(runs_in, models)
        return RunList(runs=list(found), served=[card.key for card in arms.cards()])

    @router.post("/models")
    async def change_model(asked: ModelChange) -> LoadedModel:
        """Load a run for a name, or a new name; answers when it serves. Where it cannot, all stays as it was."""
        found = await asyncio.to_thread(runs)
        run = found.get(asked.run)
        if run is None:
            raise unknown_name("run", asked.run, found)
        known = any(card.name == asked.name for card in arms.cards())
        change = arms.swap if known and asked.mode == "swap" else arms.add_version
        return _loaded(await to_its_end(change(asked.name, run)))

    @router.delete("/models/{key}")
    async def unload_model(key: Annotated[str, PathParameter(max_length=200)]) -> RunList:
        """Unload a version that gets no requests; answers when what it had in hand is done."""
        await to_its_end(arms.retire_version(key))
        return await read_runs()

    @router.post("/arms")
    async def change_arms(asked: ArmsChange) -> list[ArmSetState]:
        """Split a name's requests over versions, and let another draw in their shadow."""
        arms.set_arms(asked.name, asked.weights, asked.shadow)
        return arms.arms_state()

    return router


def _loaded(card: ModelCard) -> LoadedModel:
    return LoadedModel(
        model=card.key,
        name=card.name,
        version=card.version,
        architecture=card.architecture,
        parameters=card.parameters,
    )
