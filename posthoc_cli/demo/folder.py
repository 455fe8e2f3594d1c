"""The folder of a demo: its files, and which of them a new demo may replace."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from posthoc_cli import files
from posthoc_cli.errors import InvalidValueError, OutputExistsError

_MARKER = "made-by-ema-demo.txt"
_MARKER_TEXT = """\
`ema demo` made this folder.

snapshots/        what the hook wrote during training: give it to ema synthesize, ema error-plot, ema info
averages/         averages of many lengths, synthesized from the snapshots after training
tracked/          averages of a few lengths, tracked during training in float64, to compare with
raw.safetensors   the weights as the last step of training left them
best.pt           the best average, as a state dict for torch.load
*.png             pictures

`ema demo --force` removes these files and makes them again. It leaves other files alone.
"""
_MADE = (
    "snapshots/*.safetensors",
    "snapshots/.ema*",
    "averages/sigma_rel-*.safetensors",
    "tracked/sigma_rel-*.safetensors",
    "raw.safetensors",
    "best.pt",
    "loss.png",
    "error.png",
)


@dataclass(frozen=True)
class Folder:
    """The files of a demo."""

    root: Path

    @property
    def snapshots(self) -> Path:
        """The snapshots of the hook."""
        return self.root / "snapshots"

    @property
    def averages(self) -> Path:
        """The averages of `ema synthesize`."""
        return self.root / "averages"

    @property
    def raw(self) -> Path:
        """The last weights of training."""
        return self.root / "raw.safetensors"

    @property
    def best(self) -> Path:
        """The best average, exported."""
        return self.root / "best.pt"

    def average(self, sigma_rel: float) -> Path:
        """One of the averages, as named by `ema synthesize`."""
        return self.averages / f"sigma_rel-{sigma_rel!r}.safetensors"

    def tracked(self, sigma_rel: float) -> Path:
        """An average that was tracked directly."""
        return self.root / "tracked" / f"sigma_rel-{sigma_rel!r}.safetensors"

    def picture(self, name: str) -> Path:
        """`name`.png."""
        return self.root / f"{name}.png"

    def prepare(self, force: bool) -> None:
        """Make the folder, or delete the files of an earlier demo in it.

        Raises:
            InvalidValueError: the parent folder does not exist.
            OutputExistsError: it is not empty, and not an earlier demo or `force` is False.
            WriteError: the system refused.
        """
        if not self.root.parent.is_dir():
            raise InvalidValueError("out", "its parent folder does not exist", value=self.root)
        if self.root.exists() and not self.root.is_dir():
            raise OutputExistsError(self.root, "is a file", "name a folder")
        marker = self.root / _MARKER
        if self.root.is_dir() and any(self.root.iterdir()):
            if not marker.is_file():
                raise OutputExistsError(self.root, "is not empty, and no earlier demo made it", "name another folder")
            if not force:
                raise OutputExistsError(self.root, "holds an earlier demo", "name another folder, or force=True")
        for folder in (self.snapshots, self.averages, self.root / "tracked"):
            if folder.is_symlink():
                raise OutputExistsError(folder, "is a symbolic link, and no demo made it", "remove it")
        with files.reported_as_write_error(self.root):
            for pattern in _MADE:
                for path in self.root.glob(pattern):
                    files.system.unlink(path)
            for folder in (self.root, self.averages, self.root / "tracked"):
                files.make_directory(folder)
        files.write_whole(marker, _MARKER_TEXT.encode(), overwrite=True)

    def made(self) -> list[Path]:
        """The files and folders in it."""
        return sorted(self.root.iterdir())
