"""Random inputs that are like given ones."""

from __future__ import annotations

from typing import Any

import torch

from ..module_utils.nested import mapped


def random_inputs(like: Any, *, seed: int = 0) -> Any:
    """Inputs of the same structure, shapes, dtypes, devices and memory formats, drawn at random.

    >>> made = random_inputs({"image": (1, 3, 8, 8), "words": torch.tensor([[1, 9]])})
    >>> made["image"].shape, made["words"].dtype
    (torch.Size([1, 3, 8, 8]), torch.int64)

    Args:
        like: tensors in any nested structure. A shape, which is a tuple of whole numbers or a
            `torch.Size`, stands for a tensor of torch's default dtype on its default device.
            What else is in there stays as it is.
        seed: the same seed gives the same inputs. Torch's own random numbers go on as before.

    Returns:
        The same structure. Floating-point and complex numbers are normally distributed with the
        mean and spread of the tensor that they stand for (0 and 1 for a shape), integers are drawn
        from the range seen there, and booleans are drawn evenly.
    """
    make = torch.Generator().manual_seed(seed)

    def drawn(value: Any) -> Any:
        if _is_shape(value):
            dtype = torch.get_default_dtype()
            return torch.randn(value, generator=make, dtype=dtype).to(torch.get_default_device())
        return _like(value, make) if isinstance(value, torch.Tensor) else value

    return mapped(drawn, like, _is_shape)


def _is_shape(value: Any) -> bool:
    if isinstance(value, torch.Size):
        return True
    return type(value) is tuple and bool(value) and all(type(each) is int for each in value)


def _like(tensor: torch.Tensor, make: torch.Generator) -> torch.Tensor:
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested or tensor.is_meta:
        return tensor
    shape = tensor.shape
    if tensor.dtype == torch.bool:
        made = torch.rand(shape, generator=make) < 0.5
    elif tensor.is_floating_point() or tensor.is_complex():
        dtype = torch.complex128 if tensor.is_complex() else torch.float64
        seen = tensor.detach()[torch.isfinite(tensor)].to("cpu", dtype)
        spread = float(seen.std(correction=0)) if seen.numel() else 0.0
        mean = seen.mean() if spread else torch.zeros((), dtype=dtype)
        # A constant, such as zeros for a shape, is nothing to draw like.
        made = torch.randn(shape, generator=make, dtype=dtype) * (spread or 1.0) + mean
    else:
        low, high = (int(each) for each in tensor.aminmax()) if tensor.numel() else (0, 0)
        made = torch.randint(low, high + 1, shape, generator=make)
    like = torch.empty_like(tensor, requires_grad=False)
    return like.copy_(made).requires_grad_(tensor.requires_grad)
