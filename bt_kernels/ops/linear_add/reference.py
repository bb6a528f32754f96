"""Definition of linear_add in plain PyTorch."""

from torch import Tensor

from bt_kernels._added_rows import add_rows, gradient_of_rows, gradient_of_stream, product, product_grads, widest


def forward(x, weight, bias, stream, scale, offset) -> Tensor:
    return add_rows(product(x, weight, bias), stream, scale, stream.dtype, offset)


def backward(grad, x, weight, bias, stream, scale, offset, needs) -> tuple[Tensor | None, ...]:
    grads = product_grads(gradient_of_rows(grad, scale, x), x, weight, bias, needs)
    grad_offset = None
    if needs[4] and offset is not None:
        rows = grad[:, grad.shape[1] - x.shape[1] :]
        grad_offset = rows.sum((0, 1), dtype=widest(grad)).to(offset.dtype)
    return *grads, gradient_of_stream(grad, stream) if needs[3] else None, grad_offset
