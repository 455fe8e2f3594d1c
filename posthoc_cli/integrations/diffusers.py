"""A replacement for the `EMAModel` of diffusers, with the methods that its training scripts
call."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from posthoc_cli.errors import InvalidValueError, NotReadyError
from posthoc_cli.integrations import (
    STATE_NAME,
    average_blocks,
    is_sharded,
    make_tracker,
    read_state,
    write_state,
)
from posthoc_cli.profiles import check_sigma_rel
from posthoc_cli.targets import as_target
from posthoc_cli.tracker import PostHocEMA

_FOLDER = "state_in"  # the key of the folder of a state that was not read yet


class PostHocEMAModel:
    """Averages of a model with the interface of `EMAModel`. In a script, replace the line that
    makes that by

        ema_model = PostHocEMAModel(unet, "run/ema", sigma_rel=0.15)

    As in these scripts, the first process alone keeps, saves and copies averages; for a sharded
    model all processes do. `ema` is the tracker, None in other processes, and in an object that
    `from_pretrained` returned.

    Arguments:
        model: the model in training, before or after `accelerator.prepare`; its adapter only, if it
            has one.
        checkpoint_dir: the directory for the snapshots.
        sigma_rel: length of the average that `copy_to` copies and `save_pretrained` saves.
        model_cls, model_config: not used.
        options: other arguments of `PostHocEMA.from_model`; `resume` is "auto" by default.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        checkpoint_dir: str | Path,
        sigma_rel: float = 0.15,
        model_cls: Any = None,
        model_config: Any = None,
        **options: Any,
    ) -> None:
        if not isinstance(model, torch.nn.Module):
            raise InvalidValueError(
                "model", "must be the model itself, not its parameters: snapshots have its names"
            )
        self.sigma_rel = check_sigma_rel(sigma_rel)
        wrapper = torch.nn.parallel.DistributedDataParallel
        self._model: torch.nn.Module | None = model.module if isinstance(model, wrapper) else model
        self.ema: PostHocEMA | None = None
        if is_sharded(model) or not dist.is_initialized():
            self.ema = make_tracker(model, checkpoint_dir, options)
        elif dist.get_rank() == 0:
            alone = dist.new_group([0], use_local_synchronization=True)
            self.ema = make_tracker(model, checkpoint_dir, {"group": alone} | options)
        self.temp_stored_params: list[torch.Tensor] | None = None
        self._folder: Path | None = None

    @property
    def optimization_step(self) -> int:
        """The number of steps so far; 0 in processes that keep no averages."""
        return self.ema.step if self.ema is not None else 0

    @property
    def shadow_params(self) -> list[torch.Tensor]:
        """Copies of the average's parameters, on the host, in the order of the model's."""
        with self._average() as averaged:
            return [parameter.detach().to("cpu", copy=True) for parameter in averaged.parameters()]

    def step(self, parameters: object = None) -> None:
        """Count an optimizer step. The tracker knows the model; `parameters` is not used."""
        if not self._is_kept_elsewhere:
            ema, model = self._tracking()
            ema.update_(model)

    def store(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Keep the values of parameters in host memory, for `restore`."""
        self.temp_stored_params = [
            parameter.detach().to("cpu", copy=True) for parameter in parameters
        ]

    @torch.no_grad()
    def restore(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Copy the values that `store` has kept back into parameters."""
        if self.temp_stored_params is None:
            raise NotReadyError(
                "restore", "nothing was stored", "call store(parameters) before copy_to(parameters)"
            )
        for parameter, value in zip(parameters, self.temp_stored_params, strict=True):
            parameter.copy_(value)
        self.temp_stored_params = None

    @torch.no_grad()
    def copy_to(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Copy the average into all, or all trainable, parameters of a model of this
        architecture."""
        targets = list(parameters)
        with self._average() as averaged:
            averages = list(averaged.parameters())
            if len(targets) != len(averages):
                averages = [average for average in averages if average.requires_grad]
            if [average.shape for average in averages] != [target.shape for target in targets]:
                reason = "are neither the model's parameters nor its trainable ones"
                raise InvalidValueError("parameters", reason)
            values = [average.detach().clone() for average in averages]
        for target, value in zip(targets, values, strict=True):
            target.copy_(value)

    def save_pretrained(self, path: str | Path) -> None:
        """Save the averaged model for its `from_pretrained`, with the tracker's exact state in the
        same folder."""
        if not self._is_kept_elsewhere:
            ema, model = self._tracking()
            with self._average() as averaged:
                averaged.save_pretrained(path)  # type: ignore[operator]
            write_state(ema, path, model, averages={"": as_target(self.sigma_rel)})

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        model_cls: Any = None,
        foreach: bool = False,
    ) -> PostHocEMAModel:
        """Make an object whose `state_dict()` is the state that `save_pretrained` saved, for
        `load_state_dict`."""
        if not any(Path(path).glob(f"{STATE_NAME}*")):
            raise InvalidValueError(
                "path", f"holds no {STATE_NAME}; not a folder of save_pretrained", value=path
            )
        loaded = cls.__new__(cls)
        loaded._folder = Path(path)
        loaded.ema = None
        loaded._model = None
        loaded.temp_stored_params = None
        return loaded

    def state_dict(self) -> dict[str, Any]:
        """Return the tracker's own state; it is empty in processes that keep no averages."""
        if self.ema is not None:
            return self.ema.state_dict()
        return {} if self._folder is None else {_FOLDER: str(self._folder)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._is_kept_elsewhere:
            return
        ema, _ = self._tracking()
        if _FOLDER in state_dict:
            read_state(ema, state_dict[_FOLDER])
        else:
            ema.load_state_dict(state_dict)

    def to(
        self,
        device: Any = None,
        dtype: Any = None,
        non_blocking: bool = False,
    ) -> None:
        """Do nothing: the argument `device` of `from_model` places the averages, which are float32
        or wider."""

    def pin_memory(self) -> None:
        """Do nothing: host copies of a model on an accelerator are in pinned memory anyway."""

    def close(self) -> None:
        """Write a last snapshot, as the end of the process does."""
        if self.ema is not None:
            self.ema.close()

    @property
    def _is_kept_elsewhere(self) -> bool:
        return self.ema is None and self._model is not None

    def _average(self) -> AbstractContextManager[torch.nn.Module]:
        """Make a block with the average of the present step."""
        ema, model = self._tracking()
        blocks = average_blocks(ema, model, [as_target(self.sigma_rel)])
        return next(iter(blocks.values()), ema.model(model, self.sigma_rel))

    def _tracking(self) -> tuple[PostHocEMA, torch.nn.Module]:
        if self.ema is None or self._model is None:
            reason = (
                "tracks no model: it was loaded, or the first process keeps the averages, "
                "not this one"
            )
            hint = "pass a loaded one's state_dict() to load_state_dict of the one that tracks"
            raise NotReadyError("PostHocEMAModel", reason, hint)
        return self.ema, self._model
