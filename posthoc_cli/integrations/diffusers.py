"""A replacement for the `EMAModel` of diffusers, with the methods that its training scripts call."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from posthoc_cli.errors import InvalidValueError, NotReadyError
from posthoc_cli.integrations import STATE_NAME, is_sharded, make_tracker, read_state, write_state
from posthoc_cli.profiles import check_sigma_rel, gamma_from_sigma_rel
from posthoc_cli.tracker import PostHocEMA

_FOLDER = "state_in"  # the key of the folder of a state that was not read yet


class PostHocEMAModel:
    """Averages of a model with the interface of `EMAModel`. In a script, replace the line that makes that by

        ema_model = PostHocEMAModel(unet, "run/ema", sigma_rel=0.15)

    As in these scripts, the main process alone saves and copies averages; for a sharded model all processes do.

    Arguments:
        model: the model in training, before or after `accelerator.prepare`; its adapter only, if it has one.
        checkpoint_dir: the directory for the snapshots.
        sigma_rel: length of the average that `copy_to` copies and `save_pretrained` saves.
        model_cls, model_config: accepted for `EMAModel`'s sake, and not used.
        options: other arguments of `PostHocEMA.from_model`; `resume` is "auto" by default.

    Attributes:
        ema: the tracker; None in an object that `from_pretrained` returned.
    """

    def __init__(
        self, model: torch.nn.Module, checkpoint_dir: str | Path, sigma_rel: float = 0.15,
        model_cls: Any = None, model_config: Any = None, **options: Any,
    ) -> None:  # fmt: skip
        if not isinstance(model, torch.nn.Module):
            raise InvalidValueError("model", "must be the model itself, not its parameters: snapshots have its names")
        self.sigma_rel = check_sigma_rel(sigma_rel)
        wrapper = torch.nn.parallel.DistributedDataParallel
        self._model: torch.nn.Module | None = model.module if isinstance(model, wrapper) else model
        self.ema: PostHocEMA | None = make_tracker(model, checkpoint_dir, options)
        self._folder: Path | None = None
        self._stored: list[torch.Tensor] | None = None

    @property
    def cur_decay_value(self) -> float | None:
        """The decay of the last step, for scripts that log it; None before the first step."""
        ema, _ = self._tracking()
        return (1 - 1 / ema.step) ** (gamma_from_sigma_rel(self.sigma_rel) + 1) if ema.step else None

    def step(self, parameters: object = None) -> None:
        """Count an optimizer step. The tracker knows the model; `parameters` is not used."""
        ema, model = self._tracking()
        ema.update_(model)

    def store(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Keep the values of parameters in host memory, for `restore`."""
        self._stored = [parameter.detach().to("cpu", copy=True) for parameter in parameters]

    @torch.no_grad()
    def restore(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Copy the values that `store` has kept back into parameters."""
        if self._stored is None:
            raise NotReadyError("restore", "nothing was stored", "call store(parameters) before copy_to(parameters)")
        for parameter, value in zip(parameters, self._stored, strict=True):
            parameter.copy_(value)
        self._stored = None

    @torch.no_grad()
    def copy_to(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Copy the average into the parameters of a model of this architecture: all of them, or the trainable ones.

        Before the first update, copy the raw weights.

        Raises:
            InvalidValueError: the parameters are those of another model.
            NotReadyError: another process keeps the averages.
        """
        _, model = self._tracking()
        targets = list(parameters)
        with self._averaged() as averaged:
            averages = list(averaged.parameters())
            if len(targets) != len(averages):
                averages = [average for average in averages if average.requires_grad]
            if [average.shape for average in averages] != [target.shape for target in targets]:
                reason = f"are neither those of a {type(model).__name__} nor its trainable ones"
                raise InvalidValueError("parameters", reason)
            values = [average.detach().clone() for average in averages]
        for target, value in zip(targets, values, strict=True):
            target.copy_(value)

    def save_pretrained(self, path: str | Path) -> None:
        """Save the averaged model for its `from_pretrained`, with the tracker's exact state in the same folder.

        A process that keeps no averages does nothing.
        """
        ema, model = self._tracking()
        if not ema.keeps_averages:
            return
        with self._averaged() as averaged:
            averaged.save_pretrained(path)
        write_state(ema, path, model)

    @classmethod
    def from_pretrained(cls, path: str | Path, model_cls: Any = None, foreach: bool = False) -> PostHocEMAModel:
        """Return an object whose `state_dict()` is the state that `save_pretrained` saved, for `load_state_dict`."""
        if not any(Path(path).glob(f"{STATE_NAME}*")):
            raise InvalidValueError("path", f"holds no {STATE_NAME}; not a folder of save_pretrained", value=path)
        loaded = cls.__new__(cls)
        loaded._folder, loaded.ema, loaded._model, loaded._stored = Path(path), None, None, None
        return loaded

    def state_dict(self) -> dict[str, Any]:
        """Return the tracker's own state."""
        return {_FOLDER: str(self._folder)} if self.ema is None else self.ema.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue exactly from a tracker's own state."""
        ema, _ = self._tracking()
        if _FOLDER in state_dict:
            read_state(ema, state_dict[_FOLDER])
        else:
            ema.load_state_dict(state_dict)

    def to(self, device: Any = None, dtype: Any = None, non_blocking: bool = False) -> None:
        """Do nothing: the argument `device` of `from_model` places the averages, which are float32 or wider."""

    def pin_memory(self) -> None:
        """Do nothing: host copies of a model on an accelerator are in pinned memory anyway."""

    def close(self) -> None:
        """Write a last snapshot, as the end of the process does."""
        if self.ema is not None:
            self.ema.close()

    def _averaged(self) -> AbstractContextManager[Any]:
        ema, model = self._tracking()
        if not ema.keeps_averages:
            hint = f"call it in that process; or in all processes: with ema_model.ema.model(unet, {self.sigma_rel:g})"
            raise NotReadyError("copy_to", "the main process keeps the averages, not this one", hint)
        return ema.model(model, self.sigma_rel, alone=not is_sharded(model))

    def _tracking(self) -> tuple[PostHocEMA, torch.nn.Module]:
        if self.ema is None or self._model is None:
            hint = "pass its state_dict() to load_state_dict of the one that tracks"
            raise NotReadyError("PostHocEMAModel", "this one was loaded, and tracks no model", hint)
        return self.ema, self._model
