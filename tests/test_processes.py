import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

SCRIPT = """
import sys
import torch
from torch import nn
from crdnd import ThreatModel, distill

torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
images, labels = torch.rand(96, 1, 5, 6), torch.randint(0, 3, (96,))

def network(width):
    return nn.Sequential(nn.Conv2d(1, width, 3), nn.ReLU(), nn.Flatten(), nn.Linear(width * 12, 3))

distill(
    network(4),
    (images, labels),
    teacher=network(8),
    objective="rslad",
    threat=ThreatModel(norm="linf", eps=0.1),
    epochs=2,
    batch_size=16,
    optimizer={"learning_rate": 0.05},
    out=sys.argv[1],
)
"""


@pytest.mark.slow
def test_two_processes_equal_one_process_on_the_joined_batch(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for name, command in {"one": [sys.executable], "two": launcher}.items():
        done = subprocess.run(
            [*command, str(script), name], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    one, two = (load_file(tmp_path / name / "last" / "model.safetensors") for name in ("one", "two"))
    for key, value in one.items():
        assert (two[key] - value).abs().max() <= 1e-12 * value.abs().max(), key
    losses = [
        [epoch["loss"] for epoch in json.loads((tmp_path / name / "checkpoint.json").read_text())["history"]]
        for name in ("one", "two")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-12)
