"""Definition of mlp in plain PyTorch. Legend: x [B, Q, D], hidden [B, Q, F]."""

from torch import Tensor

from bt_kernels._added_rows import (
    add_rows,
    gradient_of_rows,
    gradient_of_stream,
    product,
    product_grads,
    widest,
)
from bt_kernels.ops.bias_gelu import reference as activation


def forward(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, stream, scale, act, keep) -> tuple[Tensor, Tensor]:
    """Return the result and, if it is to be kept, the argument of the activation, else a tensor of size 0."""
    hidden = product(x, fc1_weight, fc1_bias)
    activated = activation.forward(hidden, None, act).to(x.dtype)
    out = add_rows(product(activated, fc2_weight, fc2_bias), stream, scale, x.dtype)
    return out, hidden.to(x.dtype).contiguous() if keep else x.new_empty(0)


def hidden_grad(grad, fc2_weight, hidden, act) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradient of the activation's argument from that of the second product's result.

    Returns:
        That gradient, the activation, both like ``hidden``, and the gradient's sum over rows in float32 or wider.
    """
    acc = widest(hidden)
    of_activated = grad.to(acc) @ fc2_weight.to(acc)
    grad_hidden = activation.backward(of_activated, hidden.to(acc), None, act, (True, False))[0]
    assert grad_hidden is not None
    sums = grad_hidden.flatten(0, -2).sum(0)
    return grad_hidden.to(hidden.dtype), activation.forward(hidden, None, act), sums


def backward(*args) -> tuple[Tensor | None, ...]:
    return backward_by(hidden_grad, *args)


def backward_by(
    hidden_grad, grad, x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, stream, scale, act, keep, hidden, needs
) -> tuple[Tensor | None, ...]:
    """Compute all gradients, with a :func:`hidden_grad` of one backend."""
    of_rows = gradient_of_rows(grad, scale, x)
    grads: list[Tensor | None] = [None] * 3
    activated = of_rows.new_empty(0)
    if any(needs[:4]):
        grad_hidden, activated, sums = hidden_grad(of_rows, fc2_weight, hidden, act)
        grads[:2] = product_grads(grad_hidden, x, fc1_weight, None, (*needs[:2], False))[:2]
        grads[2] = sums.to(fc1_bias.dtype) if needs[2] and fc1_bias is not None else None
    _, of_weight, of_bias = product_grads(of_rows, activated, fc2_weight, fc2_bias, (False, *needs[3:5]))
    return *grads, of_weight, of_bias, gradient_of_stream(grad, stream) if needs[5] and stream is not None else None
