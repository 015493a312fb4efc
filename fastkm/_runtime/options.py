"""The words and dtypes a caller may choose from, and what the operators take in their place."""

import torch

# How the weights of a query are solved: with R Rᵀ + λI, or with (R Rᵀ)² + λI as in the released DeepMind code.
SQUARED_GRAM = {"ridge": False, "deepmind": True}

# How a GPU rounds products with codes. The integer is the precision code of the operators.
PRECISIONS = ("ieee", "tf32x3", "tf32")
PRECISION_CODES = {name: code for code, name in enumerate(PRECISIONS)}

# The dtypes of codes beside a float32 memory. The index is the Element of csrc/kernel_args.h.
CODE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Whether a step of a filter reads before it writes.
READ_BEFORE = {"after": False, "before": True}
