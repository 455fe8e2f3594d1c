"""A replica that makes its tracker late: at a call, the first argument."""

import time

from groups import SETTINGS, Net, close, process, train

from posthoc_cli import PostHocEMA
from posthoc_cli.tracker.processes import Notes

rank, _, folder, arguments = process()

has_note = Notes._has_note


def noted(notes, other):
    is_there = has_note(notes, other)
    if not is_there:
        (folder / f"{rank} waits").touch()
    return is_there


Notes._has_note = noted
model = Net()
waiting = [folder / f"{other} waits" for other in range(int(arguments[1]), rank)]
while not all(path.exists() for path in waiting):
    time.sleep(0.01)
ema = PostHocEMA.from_model(model, folder / "run", **SETTINGS)
exec(arguments[0])
train(model, ema.step + 1, 8, ema)
with ema.model(model, 0.2):
    close(model, folder / "truth-8.pt")
ema.close()
