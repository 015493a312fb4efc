"""The compiled operators; csrc/bindings/streaming.cpp."""

import torch

import fastkm._runtime.schema  # noqa: F401  defines the operators

stream_patterns = torch.ops.fastkm.stream_patterns.default
refresh_streams = torch.ops.fastkm.refresh_streams.default
