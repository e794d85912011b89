"""A tensor for each of P parameters, worked on as if it were one."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn


class Each(list[Tensor]):
    """P tensors with the methods of one that update rules need; the arguments are P tensors each.

    For small tensors a call takes longer than its arithmetic, so there is one for all of them. The compiler, which
    traces with tensors of another class, gets them one by one, as it knows them.
    """

    __slots__ = ()

    @property
    def dtype(self) -> torch.dtype:
        """That of all of them."""
        return self[0].dtype

    def to(self, dtype: torch.dtype) -> Each:
        """Return them in another dtype, or themselves."""
        return self if self.dtype == dtype else Each(tensor.to(dtype) for tensor in self)


def _methods() -> Iterator[tuple[str, Callable[..., Each]]]:
    many = (
        torch._foreach_add_, torch._foreach_addcdiv_, torch._foreach_addcmul_, torch._foreach_div, torch._foreach_div_,
        torch._foreach_lerp_, torch._foreach_mul, torch._foreach_mul_, torch._foreach_sqrt,
    )  # fmt: skip
    calls = {function.__name__.removeprefix("_foreach_"): function for function in many}
    for name in {*calls, *"abs addcmul clone copy_ maximum neg reciprocal_ sqrt_ sub_ where".split()}:

        def method(self: Each, *others: Each, name: str = name) -> Each:
            if name in calls and type(self[0]) in (Tensor, nn.Parameter):
                made = calls[name](self, *others)
            else:
                made = [getattr(Tensor, name)(*own) for own in zip(self, *others, strict=True)]
            return self if name.endswith("_") else Each(made)

        yield name, method


for _name, _method in _methods():
    setattr(Each, _name, _method)
Each.__mul__, Each.__truediv__, Each.__neg__ = Each.mul, Each.div, Each.neg
