"""The drill at its smallest: five kills."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_five_kills_lose_nothing():
    command = [sys.executable, "dev/drill.py", "--kills", "5", "--steps", "60", "--seed", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["kills"] == 5 and found["lost"] == found["corrupt"] == 0
    assert found["equal"] and found["final_loss_equal"]
