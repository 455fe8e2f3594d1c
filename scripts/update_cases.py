"""What `bench_update.py` measures: who keeps two averages of a model, a plain pass over the bytes, training."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from synthesis_cases import TRACKED, without_noise

from posthoc_cli import PostHocEMA
from posthoc_cli.tracker.layout import FlatTensors, TileReader, lay_out

LATE = 1e6
"""Time in a long run, when averages take in means of many updates; at the beginning these are of one."""

NEVER = 10**9
"""A checkpoint interval that is never reached."""

DECAY = 0.9999
"""Of those who know classical averages only; the time of an update does not depend on it."""


def nothing() -> None:
    """Nothing to wait for."""


@dataclass(frozen=True)
class Updates:
    """Averages that were begun: one update; waiting until what updates have begun is done; the end."""

    update: Callable[[], object]
    settle: Callable[[], None] = nothing
    close: Callable[[], None] = nothing


@dataclass(frozen=True)
class Contender:
    """One who keeps two averages of a model.

    Attributes:
        label: the name in the table.
        start: begins averages of (model, folder).
        average_dtype: of the averages; None for the parameters'.
        role: "ours", "PyPI peer", "other", "lerp" for plain float32 averages, or "plain" for the pass over the bytes.
        module: what must be installed.
    """

    label: str
    start: Callable[[torch.nn.Module, Path], Updates]
    average_dtype: torch.dtype | None = None
    role: str = "other"
    module: str = "torch"

    @property
    def installed(self) -> bool:
        """Whether it can be measured here."""
        return importlib.util.find_spec(self.module) is not None


def contenders(dtype: torch.dtype, device: str) -> list[Contender]:
    """All who are compared on a model of `dtype` on `device`; ours first."""
    full = torch.float32
    field = [
        Contender(our_label(where, begin), partial(_start_ours, where=where, begin=begin), full, "ours")
        for begin in (0.0, LATE)
        for where in our_places(device)
    ]
    field += [
        Contender("ema_pytorch", start_ema_pytorch, role="PyPI peer", module="ema_pytorch"),
        Contender("posthoc_ema", start_posthoc_ema, role="PyPI peer", module="posthoc_ema"),
        Contender("swa_utils x 2", start_swa_utils),
        Contender("diffusers x 2", start_diffusers, module="diffusers"),
        Contender("diffusers x 2, foreach", partial(start_diffusers, foreach=True), module="diffusers"),
    ]
    if dtype != full:
        field += [
            Contender("swa_utils x 2, avg_fn", partial(start_swa_utils, average_dtype=full), full),
            Contender(
                "diffusers x 2, foreach",
                partial(start_diffusers, foreach=True, average_dtype=full),
                full,
                module="diffusers",
            ),
        ]
    return [
        *field,
        Contender("plain float32 lerp", start_plain_lerp, full, "lerp"),
        Contender("the bytes once", start_plain_pass, full, "plain"),
    ]


# --- ours ------------------------------------------------------------------------------------------


def our_places(device: str) -> list[str | None]:
    """Where our averages may be kept; None where this version has no choice. The default comes first."""
    knows_places = "device" in inspect.signature(PostHocEMA.from_model).parameters
    return ["cpu", "model"] if knows_places and device != "cpu" else [None]


def our_label(where: str | None, begin: float = 0.0) -> str:
    """How a table calls ours."""
    place = "ours" if where is None else f"ours, averages on device={where!r}"
    return f"{place}, t = {begin:,.0f}" if begin else place


def start_tracker(model: torch.nn.Module, folder: Path, where: str | None, every: int, checkpoint: int) -> PostHocEMA:
    """A tracker of ours with two profiles, float16 snapshots and all its checks."""
    options: dict[str, Any] = {} if where is None else {"device": where}
    return PostHocEMA.from_model(
        model, folder, sigma_rels=TRACKED, update_every=every, checkpoint_every=checkpoint, **options
    )


def settle(tracker: PostHocEMA, device: str) -> None:
    """Wait until everything that the tracker has begun is done, and durable."""
    getattr(tracker, "flush", nothing)()
    wait_for_device(device)


def wait_for_device(device: str) -> None:
    """Wait until an accelerator has done what it was given."""
    if device != "cpu":
        torch.cuda.synchronize(device)


def device_of(model: torch.nn.Module) -> str:
    """Where the parameters are."""
    return str(next(model.parameters()).device)


def our_updates(model: torch.nn.Module, folder: Path, where: str | None, clock: Iterator[float]) -> Updates:
    """Updates of ours at these times."""
    tracker = start_tracker(model, folder, where, 1, NEVER)
    return Updates(
        lambda: tracker.update_(model, t=next(clock)), partial(settle, tracker, device_of(model)), tracker.close
    )


def _start_ours(model: torch.nn.Module, folder: Path, where: str | None, begin: float) -> Updates:
    return our_updates(model, folder, where, count(begin + 1))


# --- the others ------------------------------------------------------------------------------------


def start_ema_pytorch(model: torch.nn.Module, folder: Path) -> Updates:
    """`ema_pytorch`; its averages have the parameters' dtype and device."""
    from ema_pytorch import PostHocEMA as EmaPytorch

    with without_noise():
        tracker = EmaPytorch(
            model,
            sigma_rels=TRACKED,
            update_every=1,
            checkpoint_every_num_steps=NEVER,
            checkpoint_folder=str(folder),
        )
    return Updates(tracker.update, partial(wait_for_device, device_of(model)))


def start_posthoc_ema(model: torch.nn.Module, folder: Path) -> Updates:
    """`posthoc_ema`; its averages have the parameters' dtype and are on the CPU."""
    from posthoc_ema import PostHocEMA as PosthocEma

    with without_noise():
        tracker = PosthocEma.from_model(
            model, str(folder), sigma_rels=TRACKED, update_every=1, checkpoint_every=NEVER, update_after_step=0
        )
    return Updates(lambda: tracker.update_(model), partial(wait_for_device, device_of(model)))


def start_swa_utils(model: torch.nn.Module, _: Path, average_dtype: torch.dtype | None = None) -> Updates:
    """`torch.optim.swa_utils.AveragedModel` twice, by its foreach function; of another dtype, by the one that can."""
    from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

    function = (
        {"multi_avg_fn": get_ema_multi_avg_fn(DECAY)} if average_dtype is None else {"avg_fn": get_ema_avg_fn(DECAY)}
    )
    averaged = [AveragedModel(model, **function).to(average_dtype) for _ in TRACKED]

    @torch.no_grad()
    def update() -> None:
        for average in averaged:
            average.update_parameters(model)

    return Updates(update, partial(wait_for_device, device_of(model)))


def start_diffusers(
    model: torch.nn.Module, _: Path, foreach: bool = False, average_dtype: torch.dtype | None = None
) -> Updates:
    """diffusers' `EMAModel` twice; its averages have the parameters' dtype unless they are converted."""
    with without_noise():
        from diffusers.training_utils import EMAModel

        averaged = [EMAModel(model.parameters(), decay=DECAY, foreach=foreach) for _ in TRACKED]
    for average in averaged:
        average.to(dtype=average_dtype)

    def update() -> None:
        for average in averaged:
            average.step(model.parameters())

    return Updates(update, partial(wait_for_device, device_of(model)))


def start_plain_lerp(model: torch.nn.Module, _: Path) -> Updates:
    """Float32 averages block by block, each changed in place by every update: what ours did, and what stops moving."""
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    reader = TileReader.of_tensors(lay_out(parameters), parameters)
    averages = [FlatTensors(reader.layout, [bucket.wide for bucket in reader.layout]) for _ in TRACKED]
    for average in averages:
        for name, view in average.views.items():
            view.copy_(parameters[name])

    @torch.no_grad()
    def update() -> None:
        assert reader.surely_finite()
        for tile in reader.tiles:
            own = reader.values(tile)
            for average in averages:
                kept = average.flats[tile.bucket][tile.where]
                torch.lerp(kept, own, 1 - DECAY, out=kept)

    return Updates(update, partial(wait_for_device, device_of(model)))


def start_plain_pass(model: torch.nn.Module, _: Path) -> Updates:
    """What no update can do without: read the parameters; read and write two float32 averages."""
    flat = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    averages = [flat.to(torch.float32, copy=True) for _ in TRACKED]

    def run() -> None:
        torch.linalg.vector_norm(flat)
        for average in averages:
            average.mul_(DECAY)

    return Updates(run, partial(wait_for_device, device_of(model)))


# --- training --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TransformerSize:
    """A transformer, its batch, and the steps of one run."""

    width: int
    layers: int
    batch: int
    tokens: int
    steps: int


class Training:
    """Training steps of a `torch.nn.TransformerEncoder` with AdamW: in bfloat16 autocast on an accelerator."""

    def __init__(self, size: TransformerSize, device: str) -> None:
        layer = torch.nn.TransformerEncoderLayer(
            size.width, max(1, size.width // 64), 4 * size.width, dropout=0.0, batch_first=True, device=device
        )
        self.device = device
        self.model = torch.nn.TransformerEncoder(layer, size.layers, enable_nested_tensor=False)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self._batch = torch.randn(size.batch, size.tokens, size.width, device=device)
        self._aim = torch.randn_like(self._batch)

    @property
    def parameters(self) -> int:
        """How many."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def step(self) -> None:
        """Forward, backward, optimizer."""
        with torch.autocast(self.device.partition(":")[0], torch.bfloat16, enabled=self.device != "cpu"):
            loss = torch.nn.functional.mse_loss(self.model(self._batch), self._aim)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def steps(self, count: int, after_each: Callable[[], object] = nothing) -> None:
        """Several, until the accelerator has done them."""
        for _ in range(count):
            self.step()
            after_each()
        wait_for_device(self.device)
