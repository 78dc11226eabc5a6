"""What is known of GPUs by their names: speed, memory, price. One table, for the MFU of a run and for planning one."""

import re
from dataclasses import dataclass

# fp8 in all linear layers: +17 % tokens/s at depth 26 on an H100, slower than bf16 at depth 12 (both measured by the
# public project); between the two it is taken to pay in full.
FP8_GAIN, FP8_PAYS_ABOVE = 1.17, 12


@dataclass(frozen=True)
class Device:
    part: str  # of the device's name, lower case; a digit may not follow
    title: str
    peak_flops: float  # dense bf16 FLOP/s; NVIDIA's and AMD's data sheets
    memory_gb: float
    reached: float  # share of the peak at which a whole training step runs, in bf16
    fp8: bool  # compute capability 8.9 and later: it multiplies what fp8.py gives it
    dollars: float  # an hour, on demand: rough, of 2026, and different everywhere; --price overrides it

    def flops_per_second(self, depth: int, in_fp8: bool) -> float:
        """What training reaches on one."""
        gain = FP8_GAIN if in_fp8 and self.fp8 and depth > FP8_PAYS_ABOVE else 1
        return self.peak_flops * self.reached * gain


# The first whole word that matches counts, so longer names come first. Known: 590 TFLOP/s an H100 in fp8 at depth 24,
# which is 504 in bf16; the other shares are guesses after it.
DEVICES = (
    Device("gb200", "GB200", 2.5e15, 186, 0.45, True, 6.50),
    Device("b200", "B200", 2.25e15, 180, 0.45, True, 5.50),
    Device("b100", "B100", 1.8e15, 180, 0.45, True, 4.50),
    Device("gh200", "GH200", 989e12, 96, 0.51, True, 3.00),
    Device("h200 nvl", "H200 NVL", 836e12, 141, 0.51, True, 3.20),
    Device("h200", "H200", 989e12, 141, 0.51, True, 3.50),
    Device("h100 nvl", "H100 NVL", 835e12, 94, 0.51, True, 2.60),
    Device("h100 pcie", "H100 PCIe", 756e12, 80, 0.51, True, 2.40),
    Device("h100", "H100", 989e12, 80, 0.51, True, 3.00),
    Device("h800", "H800", 989e12, 80, 0.51, True, 3.00),
    Device("mi325", "MI325X", 1307e12, 256, 0.35, False, 3.00),
    Device("mi300x", "MI300X", 1307e12, 192, 0.35, False, 2.50),
    Device("a100-sxm4-40gb", "A100 SXM 40 GB", 312e12, 40, 0.45, False, 1.30),
    Device("a100-pcie-40gb", "A100 PCIe 40 GB", 312e12, 40, 0.45, False, 1.30),
    Device("a100", "A100", 312e12, 80, 0.45, False, 1.80),
    Device("a800", "A800", 312e12, 80, 0.45, False, 1.80),
    Device("l40s", "L40S", 362e12, 48, 0.42, True, 1.20),
    Device("l40", "L40", 181e12, 48, 0.45, True, 1.00),
    Device("l4", "L4", 121e12, 24, 0.42, True, 0.70),
    Device("a6000", "RTX A6000", 155e12, 48, 0.45, False, 0.60),
    Device("a40", "A40", 150e12, 48, 0.45, False, 0.50),
    Device("a10", "A10", 125e12, 24, 0.42, False, 0.75),
    Device("rtx 5090", "RTX 5090", 209e12, 32, 0.42, True, 0.70),
    Device("rtx 4090", "RTX 4090", 165e12, 24, 0.42, True, 0.45),
    Device("rtx 4080", "RTX 4080", 97e12, 16, 0.42, True, 0.30),
    Device("rtx 3090", "RTX 3090", 71e12, 24, 0.42, False, 0.25),
)


def find(name: str) -> Device | None:
    """The device that calls itself so, NVIDIA GeForce RTX 4090 for example."""
    return next(
        (device for device in DEVICES if re.search(rf"(?<![a-z0-9]){device.part}(?![0-9])", name.lower())), None
    )


def asked(name: str) -> Device:
    """The device that somebody calls so, 4090 for example. ValueError with all names where there is none."""
    found = find(name) or next((device for device in DEVICES if name.lower() in device.part.split()), None)
    if not found:
        known = ", ".join(device.part for device in DEVICES)
        raise ValueError(f"nothing is known of a GPU called {name!r}; known are: {known}")
    return found
