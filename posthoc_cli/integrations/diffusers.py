"""A stand-in for the `EMAModel` of diffusers, with the methods that its training scripts call."""

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

_FOLDER = "state_in"  # the key of a state that is in a folder still


class PostHocEMAModel:
    """Averages of a model under the names of `EMAModel`, whose line in a script becomes

        ema_model = PostHocEMAModel(unet, "run/ema", sigma_rel=0.15)

    As in these scripts, the main process alone saves and copies averages; those that share averages do so together.

    Arguments:
        model: the one that is trained, before or after `accelerator.prepare`; its adapter only, if it has one.
        checkpoint_dir: the directory for the snapshots.
        sigma_rel: length of the average that `copy_to` and `save_pretrained` give.
        model_cls, model_config: taken as `EMAModel` takes them; the model itself says what it is.
        options: others of `PostHocEMA.from_model`; `resume` is "auto" by default.

    Attributes:
        ema: the tracker; None of what `from_pretrained` gives.
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
        """What a step leaves of the average at the last one, for scripts that log it; None before the first step."""
        ema, _ = self._tracking()
        return (1 - 1 / ema.step) ** (gamma_from_sigma_rel(self.sigma_rel) + 1) if ema.step else None

    def step(self, parameters: object = None) -> None:
        """Count an optimizer step. The model is known; what is given is not looked at."""
        ema, model = self._tracking()
        ema.update_(model)

    def store(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Keep the values of parameters, for `restore`, in host memory."""
        self._stored = [parameter.detach().to("cpu", copy=True) for parameter in parameters]

    @torch.no_grad()
    def restore(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Give parameters the values that `store` has kept."""
        if self._stored is None:
            raise NotReadyError("restore", "nothing was stored", "call store(parameters) before copy_to(parameters)")
        for parameter, value in zip(parameters, self._stored, strict=True):
            parameter.copy_(value)
        self._stored = None

    @torch.no_grad()
    def copy_to(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Copy the average into the parameters of a model of this kind: all of them, or the trainable ones.

        Before the first update these are the weights as they are.

        Raises:
            InvalidValueError: parameters of another model.
            NotReadyError: another process keeps the averages.
        """
        _, model = self._tracking()
        given = list(parameters)
        with self._averaged() as filled:
            own = list(filled.parameters())
            trained = [one for one in own if one.requires_grad]
            chosen = own if len(given) == len(own) else trained
            if [one.shape for one in chosen] != [one.shape for one in given]:
                reason = f"are neither those of a {type(model).__name__} nor its trainable ones"
                raise InvalidValueError("parameters", reason)
            values = [one.detach().clone() for one in chosen]
        for parameter, value in zip(given, values, strict=True):
            parameter.copy_(value)

    def save_pretrained(self, path: str | Path) -> None:
        """Save the averaged model for its own `from_pretrained`, with the tracker's exact state beside it.

        A process that keeps no averages does nothing.
        """
        ema, model = self._tracking()
        if not ema.keeps_averages:
            return
        with self._averaged() as filled:
            filled.save_pretrained(path)
        write_state(ema, path, model)

    @classmethod
    def from_pretrained(cls, path: str | Path, model_cls: Any = None, foreach: bool = False) -> PostHocEMAModel:
        """What `save_pretrained` saved, for `load_state_dict` of a tracking one."""
        if not any(Path(path).glob(f"{STATE_NAME}*")):
            raise InvalidValueError("path", f"holds no {STATE_NAME}; not a folder of save_pretrained", value=path)
        loaded = cls.__new__(cls)
        loaded._folder, loaded.ema, loaded._model, loaded._stored = Path(path), None, None, None
        return loaded

    def state_dict(self) -> dict[str, Any]:
        """The tracker's own state."""
        return {_FOLDER: str(self._folder)} if self.ema is None else self.ema.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue exactly from a state."""
        ema, _ = self._tracking()
        if _FOLDER in state_dict:
            read_state(ema, state_dict[_FOLDER])
        else:
            ema.load_state_dict(state_dict)

    def to(self, device: Any = None, dtype: Any = None, non_blocking: bool = False) -> None:
        """Nothing: `device` of `from_model` says where the averages are; they are float32 or wider."""

    def pin_memory(self) -> None:
        """Nothing: host copies of a model on an accelerator are in pinned memory."""

    def close(self) -> None:
        """Write a last snapshot, as the end of the process does."""
        if self.ema is not None:
            self.ema.close()

    def _averaged(self) -> AbstractContextManager[Any]:
        ema, model = self._tracking()
        if not ema.keeps_averages:
            hint = f"copy them there; or in all processes: with ema_model.ema.model(unet, {self.sigma_rel:g})"
            raise NotReadyError("copy_to", "the main process keeps the averages, not this one", hint)
        return ema.model(model, self.sigma_rel, alone=not is_sharded(model))

    def _tracking(self) -> tuple[PostHocEMA, torch.nn.Module]:
        if self.ema is None or self._model is None:
            raise NotReadyError(
                "PostHocEMAModel", "this one was loaded", "give its state_dict() to the one that tracks"
            )
        return self.ema, self._model
