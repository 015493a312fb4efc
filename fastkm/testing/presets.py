"""Shapes in use, from small to large."""

from typing import NamedTuple


class Preset(NamedTuple):
    name: str
    K: int  # rows of the memory
    C: int  # size of a code
    T: int  # patterns written


PRESETS = {
    preset.name: preset
    for preset in (
        Preset("S", 32, 100, 32),  # Dynamic Kanerva Machine, Omniglot
        Preset("M", 64, 200, 64),  # Dynamic Kanerva Machine, DMLab frames
        Preset("L", 128, 200, 64),  # Kanerva Machine, CIFAR
        Preset("XL", 256, 512, 128),  # scaling
        Preset("LLM", 512, 768, 16),  # Larimar
    )
}
LARGE = ("XL", "LLM")  # presets at which the literal loop takes seconds and a batch gigabytes
