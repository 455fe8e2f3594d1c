"""A typed program of a user, which `make types` checks and nothing runs."""

from pathlib import Path

import torch

from posthoc_cli import Beta, PostHocEMA, Run, Window, synthesize


def train(
    model: torch.nn.Module,
    directory: Path,
) -> dict[str, torch.Tensor]:
    ema = PostHocEMA.from_model(
        model, directory, sigma_rels=(0.05, 0.28), update_every=1, resume="auto"
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema.attach(optimizer)
    with ema:
        optimizer.step()
    with ema.model(model, sigma_rel=0.15) as averaged:
        averaged.eval()
    state = ema.state_dict(sigma_rel=0.15)
    error: float | None = state.predicted_error
    print(error)
    return dict(state)


def choose(directory: Path) -> dict[str, torch.Tensor]:
    run = Run(directory)
    for target in (0.15, Beta(0.999), Window(1000)):
        plan = run.plan(target)
        print(plan.predicted_error(0), run.profiles, run.t)
        for name, tensors in synthesize(plan):
            print(name, tensors[0].shape)
    report = run.write([0.05, 0.10], directory / "out", max_error=0.01)
    if report is not None:
        print(report.to_dict())
    print(run.error_curve((0.05, 0.28), t=1000).worst)
    found = run.sweep(lambda tensors: float(tensors["w"].mean()), minimize=True, budget=12)
    return run.average(found.best or 0.15, dtype="bfloat16")
