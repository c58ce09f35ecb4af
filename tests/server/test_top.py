"""`smalti top`: what it shows, and that it outlives the server."""

import io
import socket
import threading
from contextlib import contextmanager
from dataclasses import replace

import pytest
from rich.console import Console
from server.double_service import DoubleService

from smalti.cli import main
from smalti.cli_serve_arguments import Top
from smalti.cli_top import top_command
from smalti.errors import UserError
from smalti.serving.service import ServiceState, WorkerState
from smalti.serving.top import HISTORY, Reading, frame, rate, rows_per_tick, sparkline, with_reading

WORKER = WorkerState(0, "digits@0123456789ab", "ready", 4711, 2, 0.3, 0.0125, 5, 7, 8)
STATE = ServiceState((WORKER,), 250_000.0, 1_000_000.0, 50_000.0, 100, 400, 500, False, 20)


def text(history, trouble="", width=100) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(frame("http://here", history, trouble, width))
    return console.file.getvalue()


def test_a_frame_tells_everything():
    later = replace(STATE, ticks=110, rows=460, finished=25)
    shown = text([Reading(0.0, STATE), Reading(2.0, later)])
    for part in ("25% of 1M", "5.0 s of work", "2.50 pictures/s, 5.0 ticks/s", "6.0 now", "25 pictures", "8% padding"):
        assert part in shown
    row = next(line for line in shown.splitlines() if "4711" in line).split()
    assert row == ["0", WORKER.model, "ready", "4711", "2", "0.3", "s", "12.5", "ms", "5", "7", "8"]


@pytest.mark.parametrize("width", [72, 80, 200])
def test_frames_fit(width):
    shown = text([Reading(float(i), replace(STATE, ticks=i, rows=i * i)) for i in range(99)], "late", width)
    assert max(map(len, shown.splitlines())) <= width


def test_before_anything_was_read():
    assert "no answer" in text([], "no answer")
    idle = ServiceState((), 0.0, 0.0, 0.0, 0, 0, 0, True)
    assert "draining" in text([Reading(0.0, idle)])


def test_history_is_bounded_and_begins_anew_with_the_server():
    history = ()
    for i in range(HISTORY + 5):
        history = with_reading(history, Reading(float(i), replace(STATE, ticks=i)))
    assert len(history) == HISTORY
    assert with_reading(history, Reading(999.0, replace(STATE, ticks=0))) == (Reading(999.0, replace(STATE, ticks=0)),)


def test_rates_are_of_the_last_seconds():
    history = [Reading(float(i), replace(STATE, finished=i * i, ticks=2 * i, rows=6 * i)) for i in range(30)]
    pictures, ticks = rate(history)
    assert pictures == pytest.approx((29**2 - 19**2) / 10)
    assert ticks == pytest.approx(2.0)
    assert rows_per_tick(history) == [3.0] * 29
    assert rate(history[:1]) is None


def test_sparkline():
    assert sparkline([0, 1, 2, 4], 10) == "▁▃▅█"
    assert sparkline([0.0, 0.0], 10) == "▁▁"
    assert sparkline([4, 1, 2], 2) == "▅█"


# --- on a server


@contextmanager
def server(port=0):
    uvicorn = pytest.importorskip("uvicorn")
    fastapi = pytest.importorskip("fastapi")
    from smalti.serving.state_router import state_router

    app = fastapi.FastAPI()
    app.include_router(state_router(DoubleService()))
    listener = socket.create_server(("127.0.0.1", port))
    running = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=running.run, args=([listener],), daemon=True)
    thread.start()
    while not running.started:
        threading.Event().wait(0.01)
    yield listener.getsockname()[1]
    running.should_exit = True
    thread.join(5)


def test_one_frame_of_a_server(capsys):
    with server() as port, pytest.raises(SystemExit) as end:
        main(["top", f"http://127.0.0.1:{port}", "--once", "--every", "0.05"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert "digits@0123456789ab" in shown
    assert "10 ticks" in shown


def test_no_server(capsys):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    assert top_command(Top(f"http://127.0.0.1:{port}", once=True)) == 1
    assert "no answer" in capsys.readouterr().out
    with pytest.raises(UserError, match="http"):
        top_command(Top("127.0.0.1"))


def test_it_goes_on_when_the_server_restarts(monkeypatch, capsys):
    frames = []

    def sleep(seconds):
        frames.append(capsys.readouterr().out)
        if len(frames) == 2:
            first.__exit__(None, None, None)
        if len(frames) == 4:
            second.__enter__()
        if len(frames) == 6:
            second.__exit__(None, None, None)
            raise KeyboardInterrupt

    first = server()
    port = first.__enter__()
    second = server(port)
    monkeypatch.setattr("smalti.cli_top.time.sleep", sleep)
    assert top_command(Top(f"http://127.0.0.1:{port}")) == 0
    assert ["no answer" in text for text in frames] == [False, False, True, True, False, False]
