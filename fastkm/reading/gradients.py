"""What the backward of a read takes, on every backend."""


def backward_arguments(*known_and_cotangents):
    """The arguments of a backward: ``values_type`` is none of them, and cotangents have the dtype of the memory."""
    *inputs, _, grad_values, grad_weights = known_and_cotangents
    if grad_values is not None:
        grad_values = grad_values.to(inputs[0].dtype)
    return (*inputs, grad_values, grad_weights)
