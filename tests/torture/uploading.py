"""Trainings that write to an object store and are killed while they upload, on a server of the loopback interface."""

from __future__ import annotations

import logging
import os
import random
from functools import partial
from pathlib import Path

from posthoc_cli import PostHocEMA
from torture import Tally
from torture.processes import Nursery
from torture.training import SIGMA_RELS, Network, damaged_files, weights_up_to, wrong_snapshots

STEPS, EVERY, ROWS = 60, 4, 7500
BUCKET = "bucket"
URL = f"s3://{BUCKET}/some/run"


def killed_uploads(folder: Path, count: int, chance: random.Random) -> Tally:
    """Kill a training `count` times in all, and let it go on by its own script each time."""
    from moto.s3.models import s3_backends
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server.start()  # and never stopped: children leave through here, too
    host, port = server.get_host_and_port()
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_REGION": "us-east-1", "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
    }  # fmt: skip
    tally, nursery = Tally(), Nursery(folder / "stderr")
    weights_up_to(STEPS, 4 * ROWS)  # no child takes time for them
    backend = s3_backends["123456789012"]["aws"]
    backend.create_bucket(BUCKET, "us-east-1")
    seconds = 0.0
    for number in range(1000):
        spool, told = folder / f"spool-{number}", folder / f"told-{number}"
        os.environ["EMA_SPOOL"] = str(spool)
        work = partial(train, told)
        if not seconds:
            seconds = nursery.run_whole(work)
        for name, _ in nursery.kills(tally, count, chance, seconds, work):
            there = _downloaded(backend, folder / "there")
            tally.lost += [f"{name}: {line}" for line in (*damaged_files(there), *damaged_files(spool))]
            names = {path.name for place in (there, spool) for path in place.rglob("*.safetensors")}
            durable = set(told.read_text().split()) if told.exists() else set()
            tally.lost += [f"{name}: {one} was durable and is gone" for one in durable - names]
        there = _downloaded(backend, folder / "there") / "some/run"
        due = {f"{step:016d}-{s!r}.safetensors" for step in range(EVERY, STEPS + 1, EVERY) for s in SIGMA_RELS}
        tally.lost += [f"{name}: {one} is not in the store" for one in due - {path.name for path in there.iterdir()}]
        tally.lost += [f"{name}: {line}" for line in wrong_snapshots(there)]
        tally.lost += [f"{name}: {path.name} stays in the spool" for path in spool.rglob("*.safetensors")]
        for key in [*backend.buckets[BUCKET].keys]:
            backend.delete_object(BUCKET, key)
        if tally.tried >= count:
            return tally
    return tally


def train(told: Path) -> None:
    """The user's script: to the end, from where the run is."""
    notes = os.open(told, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    log = logging.getLogger("posthoc_cli.tracker.snapshotter")
    log.setLevel(logging.INFO)
    log.addFilter(lambda record: bool(os.write(notes, f"{_written(record)} ".encode())))
    network = Network(ROWS)
    settings = {"update_every": 2, "checkpoint_every": EVERY, "max_checkpoints": None, "checkpoint_dtype": "float32"}
    with PostHocEMA.from_model(network, URL, SIGMA_RELS, resume="auto", **settings) as tracker:  # type: ignore[arg-type]
        for step in range(tracker.step + 1, STEPS + 1):
            network.go_to(step)
            tracker.update_(network)


def _written(record: logging.LogRecord) -> str:
    """The name of the file that has become durable."""
    text = record.getMessage()
    return text.rpartition("/")[2] if text.startswith("wrote ") else ""


def _downloaded(backend: object, folder: Path) -> Path:
    """What is in the bucket, in a folder; what was there before goes."""
    for path in folder.rglob("*.safetensors"):
        path.unlink()
    for key, found in backend.buckets[BUCKET].keys.items():  # type: ignore[attr-defined]
        (folder / key).parent.mkdir(parents=True, exist_ok=True)
        (folder / key).write_bytes(found.value)
    return folder
