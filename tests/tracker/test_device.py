"""Updates on an accelerator."""

import pytest
import torch
from torch import nn
from tracker.runs import track, update

from posthoc_cli.errors import RefusedCallError


@pytest.mark.cuda(simulated=False)
def test_a_captured_step_is_refused_on_a_device(tmp_path):
    model = nn.Linear(2, 2, device="cuda")
    ema = track(model, tmp_path)
    ema.update_(model)
    ema.flush()
    with pytest.raises(RefusedCallError, match="graph"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        ema.update_(model)


@pytest.mark.cuda(simulated=False)
def test_an_update_by_copy_never_waits_for_the_device(tmp_path):
    """Nor one with snapshots due, whose averages are on the host; torch names a call that waits."""
    model = nn.Sequential(nn.Linear(300, 300), nn.BatchNorm1d(300)).cuda()
    ema = track(model, tmp_path, checkpoint_every=4)
    update(ema, model, 6)
    ema.flush()
    torch.cuda.set_sync_debug_mode("error")
    try:
        update(ema, model, 6)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    ema.close()
