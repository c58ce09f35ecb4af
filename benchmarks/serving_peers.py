"""The servers that serving.py compares with: a diffusers pipeline behind FastAPI, and behind LitServe's batches.

    python benchmarks/serving_peers.py one-at-a-time FOLDER PORT
    python benchmarks/serving_peers.py batched FOLDER PORT

FOLDER is what `smalti export RUN FOLDER --to diffusers` wrote. Both are written as their documentation writes them.
What differs from it makes them faster or comparable: the pipeline runs in one thread of its own in place of the default
pool's many, whose torch threads would fight for the cores; its start noise is smalti's, so that the pictures can be
compared.
"""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import litserve
import tyro
import uvicorn
from fastapi import FastAPI, Response
from pydantic import BaseModel
from tyro.conf import Positional


class PictureRequest(BaseModel):
    """The fields of smalti's requests that are used here."""

    class_label: int
    seed: int
    num_inference_steps: int
    guidance_scale: float


def one_at_a_time(folder: Path, threads: int, keep_memory: bool) -> FastAPI:
    """An app whose requests wait for each other."""
    import torch
    from serving_pipeline import draw, load_pipeline

    pipeline = load_pipeline(folder, keep_memory)
    executor = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(threads,))
    app = FastAPI()

    @app.get("/health")
    async def health() -> str:
        return "ok"

    @app.post("/predict")
    async def predict(request: PictureRequest) -> Response:
        arguments = [request.class_label], [request.seed], request.num_inference_steps, request.guidance_scale
        (picture,) = await asyncio.get_running_loop().run_in_executor(executor, draw, pipeline, *arguments)
        return Response(picture, media_type="image/png")

    return app


class BatchedPictures(litserve.LitAPI):
    """Whole runs in batches: of what LitServe has gathered, requests of equal steps and guidance share a run."""

    def __init__(
        self, folder: Path, threads: int, keep_memory: bool, max_batch_size: int, batch_timeout: float
    ) -> None:
        super().__init__(max_batch_size=max_batch_size, batch_timeout=batch_timeout)
        self.folder, self.threads, self.keep_memory = folder, threads, keep_memory

    def setup(self, device: str) -> None:
        import torch
        from serving_pipeline import draw, load_pipeline

        torch.set_num_threads(self.threads)
        self.pipeline, self.draw = load_pipeline(self.folder, self.keep_memory), draw

    def decode_request(self, request: PictureRequest) -> PictureRequest:
        return request

    def batch(self, inputs: list[PictureRequest]) -> list[PictureRequest]:
        return inputs

    def predict(self, x: list[PictureRequest]) -> list[bytes]:
        groups: dict[tuple[int, float], list[int]] = {}
        for place, request in enumerate(x):
            groups.setdefault((request.num_inference_steps, request.guidance_scale), []).append(place)
        pictures = [b""] * len(x)
        for (steps, scale), places in groups.items():
            labels, seeds = [x[i].class_label for i in places], [x[i].seed for i in places]
            for place, picture in zip(places, self.draw(self.pipeline, labels, seeds, steps, scale), strict=True):
                pictures[place] = picture
        return pictures

    def unbatch(self, output: list[bytes]) -> list[bytes]:
        return output

    def encode_response(self, output: bytes) -> Response:
        return Response(output, media_type="image/png")


def main(
    kind: Positional[Literal["one-at-a-time", "batched"]],
    folder: Positional[Path],
    port: Positional[int],
    threads: int = 2,
    workers: int = 1,
    max_batch_size: int = 16,
    batch_timeout: float = 0.01,
    keep_memory: bool = False,
) -> None:
    """Serve until ended. workers, max_batch_size, batch_timeout: of "batched". keep_memory: as smalti's workers do."""
    if kind == "one-at-a-time":
        uvicorn.run(one_at_a_time(folder, threads, keep_memory), host="127.0.0.1", port=port, log_level="warning")
        return
    api = BatchedPictures(folder, threads, keep_memory, max_batch_size, batch_timeout)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=workers, timeout=False)
    server.run(host="127.0.0.1", port=port, num_api_servers=1, generate_client_file=False, log_level="warning")


if __name__ == "__main__":
    tyro.cli(main)
