"""A tensor for each of P parameters, worked on as if it were one."""

from __future__ import annotations

from collections.abc import Callable

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


_AT_ONCE = {
    function.__name__.removeprefix("_foreach_"): function
    for function in (
        torch._foreach_add_, torch._foreach_addcdiv_, torch._foreach_addcmul_, torch._foreach_div, torch._foreach_div_,
        torch._foreach_lerp_, torch._foreach_mul, torch._foreach_mul_, torch._foreach_sqrt,
    )
}  # fmt: skip


def _method(name: str) -> Callable[..., Each]:
    of_one, at_once = getattr(Tensor, name), _AT_ONCE.get(name)

    def method(self: Each, *others: Each) -> Each:
        if at_once is not None and type(self[0]) in (Tensor, nn.Parameter):
            made = at_once(self, *others)
        else:
            made = [of_one(*own) for own in zip(self, *others, strict=True)]
        return self if name.endswith("_") else Each(made)

    return method


for _name in {*_AT_ONCE, *"abs addcmul clone copy_ maximum neg reciprocal_ sqrt_ sub_ where".split()}:
    setattr(Each, _name, _method(_name))
Each.__mul__, Each.__truediv__, Each.__neg__ = Each.mul, Each.div, Each.neg
