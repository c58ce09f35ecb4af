"""The command `smalti chaos`."""

import asyncio
import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smalti.cli_serve_arguments import Chaos
from smalti.errors import UserError, unknown_name

if TYPE_CHECKING:
    from smalti.serving.chaos import Account
    from smalti.serving.soak import SoakAccount


def chaos_command(command: Chaos) -> int:
    """Run scenarios, or a soak."""
    try:
        from smalti.serving.chaos import run_chaos, scenario_names
        from smalti.serving.soak import run_soak
    except ImportError as error:
        raise UserError(f"chaos needs packages that are not here ({error.name}): pip install 'smalti[serve]'") from None
    from smalti.run_folder import read_config

    if sys.platform != "linux":
        raise UserError("chaos looks at processes as Linux shows them: run it there")
    read_config(command.run)
    if command.soak is not None:
        if not command.soak > 0 or not 0 < command.load <= 1:
            raise UserError(f"--soak {command.soak} must be above 0 and --load {command.load} in (0, 1]")
        soak = asyncio.run(run_soak(command.run, command.soak, command.load, command.kill_every, told=_tell_soak))
        _print_soak(soak)
        _append(command.out, {"soak": as_row(soak) | {"lost": soak.lost, "growth": soak.growth}})
        return 0 if soak.passed else 1
    for name in command.only:
        if name not in scenario_names():
            raise unknown_name("scenario", name, scenario_names())
    accounts = asyncio.run(run_chaos(command.run, command.only or scenario_names(), _tell))
    _append(command.out, {"chaos": [as_row(a) | {"passed": a.passed} for a in accounts]})
    failed = [a.scenario for a in accounts if not a.passed]
    print(f"{len(accounts) - len(failed)} of {len(accounts)} scenarios held" + (f"; not: {failed}" if failed else ""))
    return 1 if failed else 0


def _tell(account: "Account") -> None:
    ends = ", ".join(f"{count} {code}" for code, count in sorted(account.ends.items()))
    print(
        f"{'held' if account.passed else 'FAILED':7}{account.scenario}: accepted {account.accepted}: {ends}", flush=True
    )
    if account.lost:
        print(f"       LOST {account.lost}")
    for what, held in account.checks.items():
        print(f"       {'yes' if held else 'NO '} {what}")
    for note in account.notes:
        print(f"       {note}")


def _tell_soak(account: "SoakAccount") -> None:
    at, size = account.resident[-1]
    print(
        f"{at:5.0f} s: {account.asked} asked, {account.ends['ok']} drawn, {account.refused} refused, "
        f"{account.kills} kills, parent {size / 2**20:.0f} MiB",
        flush=True,
    )


def _print_soak(account: "SoakAccount") -> None:
    slowest = sorted(account.latencies)
    middle, late = slowest[len(slowest) // 2], slowest[int(0.99 * (len(slowest) - 1))]
    print(f"{account.seconds:.0f} s at {account.rate:.1f} requests a second, {account.kills} workers killed")
    print(f"asked {account.asked}, refused {account.refused}, ends {dict(account.ends)}: lost {account.lost}")
    print(
        f"went on from checkpoints: {account.resumed}; seconds a request: median {middle:.2f}, 99th in 100 {late:.2f}"
    )
    print(f"parent's memory, last quarter against the second: {account.growth:+.1%}; open files {account.open_files}")
    print(f"shared memory left behind: {account.shared_memory or 'none'}")


def as_row(account: "Account | SoakAccount") -> dict[str, Any]:
    """An account as JSON takes it."""
    fields = {field.name: getattr(account, field.name) for field in dataclasses.fields(account)}
    return fields | {"ends": dict(account.ends)}


def _append(path: Path | None, row: dict[str, Any]) -> None:
    if path is not None:
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
