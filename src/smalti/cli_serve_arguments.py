"""The arguments of the commands about serving."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg


@dataclass(frozen=True)
class Top:
    """Show the engine of a running server, live: workers, queue, rows that share a forward, pictures a second.

    Examples: smalti top
              smalti top https://pictures.example.org --once

    Reads GET /v1/state twice a second and goes on when the server restarts; Ctrl-C ends it. Where the server wants an
    API key, it is taken from $SMALTI_API_KEY.
    """

    url: Annotated[Positional[str], arg(metavar="URL")] = "http://127.0.0.1:8000"
    """The server's address."""
    once: bool = False
    """Print one frame and end; exits with 1 where the server does not answer."""
    every: float = 0.5
    """Seconds between readings."""


@dataclass(frozen=True)
class Serve:
    """Serve trained runs over HTTP: OpenAI's images API, jobs, a page at /ui, metrics.

    Examples: smalti serve runs/mnist
              smalti serve digits=runs/a:9 digits=runs/b:1       two arms of one model, nine requests to one
              smalti serve runs/mnist --workers 2 --port 8080 --keys keys.txt --host 0.0.0.0

    Then: curl http://127.0.0.1:8000/v1/images/generations -H 'content-type: application/json' -d '{"prompt": "7"}'
    Pictures do not depend on what they are drawn beside, to the bit; --compile gives that up for speed. Ctrl-C or
    SIGTERM finishes what was accepted and ends. docs/serving.md has the rest.
    """

    runs: Annotated[Positional[tuple[str, ...]], arg(metavar="[NAME=]RUN[:WEIGHT]")]
    """Run directories; NAME is what requests call it by, the folder's name by default."""
    host: str = "127.0.0.1"
    """Address to listen at; another than loopback needs --keys or --open."""
    port: int = 8000
    """Port to listen at; 0 takes a free one."""
    keys: Path | None = None
    """File of API keys, a line each: KEY TENANT [WEIGHT]. Or in $SMALTI_API_KEYS."""
    open: bool = False
    """Let whoever reaches the server use it without a key."""
    rate_limit: str | None = None
    """Requests to draw that a key may make, such as 60/minute."""
    workers: int = 1
    """Worker processes of each run: one a device; on a CPU one a core, each with one thread."""
    balancing: Literal["least_loaded", "round_robin"] = "least_loaded"
    """Which worker draws a picture next: the one with the least left to do, or each in its turn."""
    devices: tuple[str, ...] = ("cpu",)
    """Devices that the workers take in turn: cpu, or cuda:0 cuda:1 ..."""
    threads: int = 1
    """Threads of a worker on a CPU; with more than 1 pictures may share no forward, to stay the same to the bit."""
    compile: bool = False
    """Compile the network: faster after a slow start; pictures then are the same to rounding only."""
    max_rows: int = 16
    """Rows of a forward at most; a guided picture takes two. On a GPU more is faster; on a CPU short requests would
    wait longer for nothing."""
    queue_cost: float = 2e6
    """How much may be accepted and not done: rows x tokens x network calls."""
    store: str = "smalti-jobs.sqlite"
    """Where jobs are kept: a SQLite file, or postgresql://user@host/database."""
    models: Path | None = None
    """A folder of runs that an administrator may load or swap in while the server runs."""
    ray: bool = False
    """Serve on Ray: the cluster of $RAY_ADDRESS, or this machine; --workers replicas a run, without jobs and page."""
    ui: bool = True
    """The page at /ui (needs the extra `ui`)."""
    drain_seconds: float = 30.0
    """How long accepted requests may take to finish when the server is told to end."""
    hang_seconds: float = 10.0
    """A worker that does not tick for so long (or 20 mean steps) is killed and its pictures go on elsewhere."""
    deadline: float | None = None
    """Seconds after which requests fail that give no deadline of their own."""
    cors: tuple[str, ...] = ()
    """Origins of other pages whose scripts may ask, such as https://example.org."""
    webhook_hosts: tuple[str, ...] = ()
    """Hosts that webhooks may reach by plain http."""
    webhook_private: bool = False
    """Let webhooks reach addresses of private networks."""
    traces: bool = False
    """Send OpenTelemetry spans (configure the exporter by its OTEL_ variables)."""
    faults: bool = False
    """Obey the header x-smalti-fault: for tests and `smalti chaos` alone."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """How much the log says."""


@dataclass(frozen=True)
class Replay:
    """Draw a served picture again from the receipt in its file, and compare the bytes.

    Examples: smalti replay picture.png --run runs/mnist
              smalti replay edited.png --run runs/mnist --source before.png

    Exits with 0 where the bytes (or at least the pixels, as told) are the same, else with 1.
    """

    picture: Annotated[Positional[Path], arg(metavar="FILE")]
    """A PNG, JPEG or WebP that smalti served."""
    run: Path
    """The run that it was drawn with; other weights than the receipt names are refused."""
    source: Path | None = None
    """The picture that an edit began from."""
    mask: Path | None = None
    """Its mask."""
    out: Path | None = None
    """Where to write the picture drawn again."""
    threads: int = 1
    """As the server's workers had."""


@dataclass(frozen=True)
class Chaos:
    """Break a server of a run on purpose, and account for every request that it had accepted.

    Examples: smalti chaos runs/mnist
              smalti chaos runs/mnist --only killed-worker poison-request
              smalti chaos runs/mnist --soak 600          ten minutes at 80 % load, a worker killed every 20 s

    Starts real servers on loopback and kills real processes of theirs (Linux). Exits with 1 where something did not
    hold.
    """

    run: Annotated[Positional[Path], arg(metavar="RUN")]
    """The run to serve."""
    only: tuple[str, ...] = ()
    """These scenarios alone; a wrong name lists them."""
    soak: float | None = None
    """Instead of the scenarios: seconds of load with kills."""
    load: float = 0.8
    """Of the soak: share of what the server can draw."""
    kill_every: float = 20.0
    """Of the soak: seconds between kills."""
    out: Path | None = None
    """Append the account as a line of JSON."""
