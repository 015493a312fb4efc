"""The generative model of the paper: any encoder and decoder around the memory."""

from fastkm.models.convolutional import ConvDecoder, ConvEncoder
from fastkm.models.dynamic_kanerva_machine import DynamicKanervaMachine, EpisodeLoss, PatternRead

__all__ = ["ConvDecoder", "ConvEncoder", "DynamicKanervaMachine", "EpisodeLoss", "PatternRead"]
