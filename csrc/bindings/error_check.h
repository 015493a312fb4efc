// The check of a status from PyTorch's C functions, on every PyTorch this builds with.
#pragma once

#include <torch/csrc/stable/ops.h>

// The headers of PyTorch 2.13 renamed the check. Those of 2.10 to 2.12 have it under the first name only.
#ifndef STABLE_TORCH_ERROR_CODE_CHECK
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif
