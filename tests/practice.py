"""Practice in float64 for test_rl.py: torchrun ... tests/practice.py TAG FLAGS."""

import sys

import pytest
import torch
from small_runs import practise

from nanochat import runtime
from scripts import chat_rl


def main(tag, *flags):
    build_model = chat_rl.build_model
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(runtime.DTYPES, "float64", torch.float64)
        patch.setenv("NANOCHAT_DTYPE", "float64")
        patch.setattr(chat_rl, "build_model", lambda *args, **options: build_model(*args, **options).double())
        practise(tag, " ".join(flags))


if __name__ == "__main__":
    main(*sys.argv[1:])
