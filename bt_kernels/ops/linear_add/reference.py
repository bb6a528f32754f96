"""Definition of linear_add in plain PyTorch."""

from torch import Tensor

from bt_kernels._added_rows import add_rows, gradient_of_rows, gradient_of_stream, product, product_grads


def forward(x, weight, bias, stream, scale) -> Tensor:
    return add_rows(product(x, weight, bias), stream, scale, stream.dtype)


def backward(grad, x, weight, bias, stream, scale, needs) -> tuple[Tensor | None, ...]:
    grads = product_grads(gradient_of_rows(grad, scale, x), x, weight, bias, needs)
    return *grads, gradient_of_stream(grad, stream) if needs[3] else None
