"""The errors of the package that are not errors of Python or PyTorch."""


class BackendUnavailableError(RuntimeError):
    """A backend was named that cannot run this call."""
