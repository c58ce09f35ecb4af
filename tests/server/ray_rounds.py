"""Rounds on a real Ray cluster: python ray_rounds.py ROUND RUN [RUN]. In a process and network namespace of their own.

Each prints one line of JSON, of what became of the requests.
"""

import base64
import io
import json
import os
import signal
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ray
from PIL import Image
from ray import serve

from smalti.serving.ray_app import API, RaySettings, deploy_on_ray
from smalti.serving.server import ServedRun
from smalti.serving.server_settings import ServerSettings

PORT = 8123
ORDERS = 10  # of which all requests are
MEMORY = 100 * 2**20


def answer(path, body=None):
    headers = {"content-type": "application/json"}
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(
        urllib.request.Request(f"http://127.0.0.1:{PORT}{path}", data, headers), timeout=90
    ) as got:
        return json.loads(got.read())


def draw(i, steps=150):
    """The picture's pixels, or what went wrong. Its file has a receipt, which names the request."""
    body = {"model": "digits", "prompt": str(i % ORDERS), "seed": i % ORDERS, "num_inference_steps": steps}
    try:
        answered = answer("/v1/images/generations", body | {"response_format": "b64_json"})
        with Image.open(io.BytesIO(base64.b64decode(answered["data"][0]["b64_json"]))) as picture:
            return picture.tobytes()
    except (urllib.error.HTTPError, OSError) as error:
        return f"{error}: {error.read() if isinstance(error, urllib.error.HTTPError) else ''}"


def pids():
    return {worker["pid"] for worker in answer("/v1/state")["workers"]}


def until(true, seconds=45.0):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, true
        time.sleep(0.1)


def under_load(disturb, requests=100):
    """Draw all orders undisturbed, then many at once, and disturb when a fifth is done."""
    alone = [draw(i) for i in range(ORDERS)]
    done = threading.Semaphore(0)
    with ThreadPoolExecutor(16) as pool:
        futures = [pool.submit(draw, i) for i in range(requests)]
        for future in futures:
            future.add_done_callback(lambda _: done.release())
        for _ in range(requests // 5):
            done.acquire()
        open_ = sum(not future.done() for future in futures)
        cost = answer("/v1/state")["cost_left"]
        begun = time.monotonic()
        disturb()
        pictures = [future.result() for future in futures]
    return {
        "failed": [picture for picture in pictures if isinstance(picture, str)],
        "different": sum(picture != alone[i % ORDERS] for i, picture in enumerate(pictures)),
        "open": open_,
        "cost": cost,
        "seconds": round(time.monotonic() - begun, 1),
    }


def killed_replica(run):
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False, object_store_memory=MEMORY)
    deploy_on_ray([ServedRun("digits", run)], RaySettings(replicas=2, health_seconds=1.0), ServerSettings(port=PORT))
    until(lambda: len(pids()) == 2)
    before = pids()
    told = under_load(lambda: os.kill(min(before), signal.SIGKILL))
    until(lambda: len(pids() - {min(before)}) == 2)  # another has taken its place
    return told | {"replaced": len(pids() - before)}


def killed_node(run):
    from ray.cluster_utils import Cluster

    # The head has no room for an engine, which takes two CPUs.
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 1, "include_dashboard": False, "object_store_memory": MEMORY},
    )
    nodes = [cluster.add_node(num_cpus=2, object_store_memory=MEMORY) for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False)
    # These nodes share one address, so that proxies of all of them would share its port.
    settings = RaySettings(replicas=2, cpus=2, health_seconds=1.0, proxies="HeadOnly")
    deploy_on_ray([ServedRun("digits", run)], settings, ServerSettings(port=PORT))
    until(lambda: len(pids()) == 2)
    before = pids()
    told = under_load(lambda: cluster.remove_node(nodes[0], allow_graceful=False))
    cluster.add_node(num_cpus=2, object_store_memory=MEMORY)
    until(lambda: len(pids() - before) == 1)
    return told | {"replaced": len(pids() - before)}


def arms(first, second, requests=1000):
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False, object_store_memory=MEMORY)
    runs = [ServedRun("digits", first, 19), ServedRun("digits", second, 1)]
    deploy_on_ray(runs, RaySettings(), ServerSettings(port=PORT))

    def drawn_by(i):
        body = {
            "model": "digits",
            "prompt": "1",
            "seed": 1,
            "num_inference_steps": 2,
            "guidance_scale": 1,
            "user": f"u{i}",
        }
        with Image.open(
            io.BytesIO(base64.b64decode(answer("/v1/images/generations", body)["data"][0]["b64_json"]))
        ) as p:
            return p.tobytes()

    with ThreadPoolExecutor(16) as pool:
        counts = Counter(pool.map(drawn_by, range(requests)))
    # A version is taken away: those who are left get all of it.
    deploy_on_ray(runs[1:], RaySettings(), ServerSettings(port=PORT))
    applications = [name for name in serve.status().applications if name != API]
    return {
        "shares": sorted(n / requests for n in counts.values()),
        "left": len(applications),
        "still": isinstance(draw(1, 2), bytes),
    }


if __name__ == "__main__":
    rounds = {"replica": killed_replica, "node": killed_node, "arms": arms}
    result = rounds[sys.argv[1]](*map(Path, sys.argv[2:]))
    serve.shutdown()
    ray.shutdown()
    print(json.dumps(result))
