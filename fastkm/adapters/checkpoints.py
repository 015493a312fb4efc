"""Loading that changes all of a module or nothing of it."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


class WholeLoading(nn.Module):
    """A module whose :meth:`load_state_dict` looks at every entry before it copies the first."""

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As PyTorch's, but after an error the module is as it was.

        Raises:
            RuntimeError: an entry is missing or foreign and ``strict`` is set, or an entry is no tensor of the right
                shape. It names all of them.
        """
        if faults := find_faults(self, state_dict, strict):
            name = type(self).__name__
            raise RuntimeError(f"the state_dict does not fit {name}, and nothing was loaded: {'; '.join(faults)}")
        return super().load_state_dict(state_dict, strict, assign)


def find_faults(module: nn.Module, state_dict: Mapping[str, Any], strict: bool) -> list[str]:
    """What is wrong with the entries of ``state_dict`` for ``module``, in words."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict must be a dict, got {type(state_dict).__name__}")
    wanted = module.state_dict(keep_vars=True)
    faults = [
        f"{name} must be a tensor of shape {list(wanted[name].shape)}, got {_kind(x)}"
        for name, x in state_dict.items()
        if name in wanted and not (isinstance(x, Tensor) and x.shape == wanted[name].shape)
    ]
    if strict:
        faults += [f"{name} is missing" for name in wanted if name not in state_dict]
        faults += [f"{name} is foreign" for name in state_dict if name not in wanted]
    return faults


def _kind(x: object) -> str:
    return str(list(x.shape)) if isinstance(x, Tensor) else type(x).__name__
