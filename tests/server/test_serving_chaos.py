"""`smalti chaos` on a real server: the scenarios that CI has time for, and a short soak."""

import asyncio
import json
import sys
from collections import Counter

import pytest

from smalti.cli import main
from smalti.cli_chaos import as_row
from smalti.serving.chaos import Account, run_chaos, scenario_names
from smalti.serving.messages import PictureOrder
from smalti.serving.receipts import receipt_of, stamp
from smalti.serving.rehearsal_server import without_receipt
from smalti.serving.soak import SoakAccount, run_soak

pytestmark = pytest.mark.alone
linux = pytest.mark.skipif(sys.platform != "linux", reason="looks at processes as Linux shows them")
IN_CI = (
    "killed-worker",
    "nan-row",
    "disconnect",
    "bad-requests",
    "full-disk",
    "corrupt-swap",
    "sigterm",
    "killed-parent",
)


@linux
@pytest.mark.slow
def test_every_accepted_request_reaches_its_end(trained_run):
    accounts = asyncio.run(run_chaos(trained_run, IN_CI, lambda account: None, pictures=6, steps=900))
    assert len(accounts) == len(IN_CI)
    assert {a.scenario: (a.lost, [c for c, held in a.checks.items() if not held]) for a in accounts} == {
        a.scenario: (0, []) for a in accounts
    }


@linux
@pytest.mark.slow
def test_a_short_soak_loses_nothing(trained_run):
    account = asyncio.run(run_soak(trained_run, 20.0, load=0.5, kill_every=5.0, steps=(50, 400)))
    assert account.kills >= 2
    assert account.asked > 20
    assert account.lost == 0
    assert account.shared_memory == []
    # Each restart opens the pipes and memory that the last one closed.
    assert account.open_files[1] <= account.open_files[0] + 8


def test_an_unknown_scenario_lists_the_known(trained_run, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["chaos", str(trained_run), "--only", "killed-wroker"])
    assert stop.value.code == 2
    assert "killed-worker" in capsys.readouterr().err
    assert {"poison-request", "full-queue", "restart-storm"} <= set(scenario_names())


def test_a_soaks_account_sees_growth_and_loss():
    flat = SoakAccount(100.0, 1.0, asked=3, resident=[(t, 1000) for t in range(100)])
    flat.ends.update(ok=2)
    assert (flat.lost, flat.passed) == (1, False)
    flat.refused = 1
    assert flat.passed
    grown = SoakAccount(100.0, 1.0, resident=[(t, 1000 + t) for t in range(100)])
    assert grown.growth == pytest.approx((1087 / 1037) - 1, rel=0.01)


def test_accounts_are_json():
    """dataclasses.asdict makes a Counter of a Counter's pairs."""
    soak = SoakAccount(10.0, 1.0)
    soak.ends.update(ok=2)
    assert json.loads(json.dumps(as_row(soak)))["ends"] == {"ok": 2}
    assert json.loads(json.dumps(as_row(Account("name", ends=Counter(ok=1)))))["ends"] == {"ok": 1}


def test_a_png_without_its_receipt_is_the_png():
    from server.double_service import picture

    order = PictureOrder(seed=3, request_id="req_1")
    png = picture(order, "v")
    stamped = stamp(png, receipt_of(order, model="m", version="v", smalti="1", torch="2"))
    assert stamped != png
    assert without_receipt(stamped) == without_receipt(png) == png


def test_replay_draws_the_same_bytes(trained_run, tmp_path, capsys):
    from server.drawing_engine import DrawingEngine

    order = PictureOrder(seed=5, class_label=2, num_inference_steps=5, request_id="req_2", tenant="a")
    (end,) = DrawingEngine(trained_run).draw(order)
    file = tmp_path / "picture.png"
    file.write_bytes(end.image)
    with pytest.raises(SystemExit) as stop:
        main(["replay", str(file), "--run", str(trained_run), "--out", str(tmp_path / "again.png")])
    assert stop.value.code == 0
    assert "same bytes" in capsys.readouterr().out
    assert (tmp_path / "again.png").read_bytes() == end.image


def test_replay_refuses_other_weights(trained_run, tmp_path, capsys):
    from server.drawing_engine import DrawingEngine

    engine = DrawingEngine(trained_run)
    (end,) = engine.draw(PictureOrder(seed=5, class_label=2, num_inference_steps=2))
    other = receipt_of(PictureOrder(class_label=2), model="digits", version="0" * 12, smalti="1", torch="2")
    file = tmp_path / "picture.png"
    file.write_bytes(stamp(without_receipt(end.image), other))
    with pytest.raises(SystemExit) as stop:
        main(["replay", str(file), "--run", str(trained_run)])
    assert stop.value.code == 2
    assert "0" * 12 in capsys.readouterr().err


def test_serve_says_what_is_wrong_before_it_loads(trained_run, tmp_path, capsys):
    for arguments, says in (
        ([str(tmp_path / "none")], "there is no run"),
        ([str(trained_run), "--host", "0.0.0.0"], "keys"),
        ([str(trained_run), "--workers", "0"], "--workers"),
        ([f"a={trained_run}:0"], "weight"),
        ([str(trained_run), "--store", "no-such://x"], "store"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["serve", *arguments, "--port", "0", "--no-ui"])
        assert stop.value.code == 2
        assert says in capsys.readouterr().err, json.dumps(arguments)
