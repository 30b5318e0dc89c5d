"""A device that stands in for a GPU: its tensors lie in this machine's memory, and mixing them with others fails.

``install()`` makes ``standin`` a device of torch, so that ``pytest --device standin`` runs on it what ``--device cuda``
runs on a GPU. Where a GPU refuses tensors of two devices, it does; `Counted` counts what a GPU spends time on beside
computing: kernels that are started, and transfers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

NAME = "standin"
CPU = torch.device("cpu")
aten = torch.ops.aten

# Their indices may be on the CPU, as for a GPU, which is handed them every time.
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
COPIES = {aten.copy_.default, aten._to_copy.default, aten._copy_from.default}
# What they say, or how large their result is, depends on values.
SIZED_BY_VALUES = {
    aten._local_scalar_dense.default,
    aten._unique2.default,
    aten.bincount.default,
    aten.equal.default,
    aten.masked_select.default,
    aten.nonzero.default,
    aten.repeat_interleave.Tensor,
    aten.unique_dim.default,
}
# Made of an empty tensor that is made larger, which these cannot be.
RESIZING = ("arange", "arange.start", "arange.start_step", "eye", "eye.m", "linspace", "randperm", "randperm.generator")


class MixedDevicesError(RuntimeError):
    """An operation over tensors of both devices, as it fails on a GPU."""


class Counted:
    """What happened on the device while it is open.

    Attributes:
        kernels: Operations that compute something or move it on the device; views are none.
        to_device: Transfers to it.
        waits: How often the CPU waited until all that was started was done: for a value, for a tensor that it took from
            the device, or for one that it handed over and did not say need not be waited for.
    """

    _open: ClassVar[list[Counted]] = []

    def __init__(self) -> None:
        self.kernels = self.to_device = self.waits = 0

    def __enter__(self) -> Counted:
        self._open.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._open.remove(self)

    @classmethod
    def note(cls, *, kernels: int = 0, to_device: int = 0, waits: int = 0) -> None:
        """Something happened."""
        for each in cls._open:
            each.kernels += kernels
            each.to_device += to_device
            each.waits += waits


class StandinTensor(torch.Tensor):
    """A tensor of the device; what is on the CPU in ``here`` is its memory."""

    here: Tensor
    without: ClassVar[frozenset[torch.dtype]] = frozenset()
    """Dtypes that the device does not have."""

    @staticmethod
    def __new__(cls, here: Tensor) -> Any:
        if here.dtype in cls.without:
            raise TypeError(f"{NAME} has no {here.dtype}")
        make: Any = torch.Tensor._make_wrapper_subclass
        made = make(
            cls, here.shape, here.stride(), here.storage_offset(), dtype=here.dtype, device=torch.device(NAME, 0)
        )
        made.here = here
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return _run(func, args, kwargs or {})

    def tolist(self) -> Any:
        return aten._to_copy.default(self, device=CPU).tolist()

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"{NAME}({self.here!r})"

    def __format__(self, spec: str) -> str:
        return format(self.item() if spec else repr(self), spec)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        made = self.detach().clone().requires_grad_(self.requires_grad)
        if isinstance(self, torch.nn.Parameter):
            made = torch.nn.Parameter(made, self.requires_grad)
        memo[id(self)] = made
        return made


def _is_there(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operation on memory here, with what a GPU would say to its tensors."""
    with torch.inference_mode(False), torch.no_grad():  # views of other tensors may not be those of inference
        if func._can_decompose():  # while there is inference, those come too that are made of others
            return func.decompose(*args, **kwargs)
        if func is aten._fused_sdp_choice.default:
            return 0  # the CPU's own fused attention has other operations than a GPU's
        if func is aten.histc.default and not args[0].is_floating_point():
            return _run(func, (args[0].double(), *args[1:]), kwargs).to(args[0].dtype)
        if func is aten._copy_from.default:  # of what C++ makes of lists and numbers
            func, args = aten.copy_.default, (args[1], args[0], *args[2:])
        _check(func, args, kwargs)
        given = {**kwargs, "device": CPU} if _is_there(kwargs.get("device")) else kwargs
        args_here, given = tree_map_only(StandinTensor, lambda each: each.here, (args, given))
        found = func(*args_here, **given)
        if not _leaves(func, args, kwargs):
            _count(func, args, kwargs)
            return _wrapped(func, args, kwargs, found)
        Counted.note(waits=1)
        return args[0] if func is aten.copy_.default else found


def _check(func: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """Refuse what mixes devices; tensors of one number may be anywhere."""
    tensors = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, Tensor)]
    if func in COPIES or not any(isinstance(each, StandinTensor) for each in tensors):
        return
    if func in INDEXED and isinstance(args[0], StandinTensor):
        Counted.note(waits=sum(isinstance(each, Tensor) and not isinstance(each, StandinTensor) for each in args[1]))
        tensors = [args[0], *args[2:3]]
    if elsewhere := [each for each in tensors if not isinstance(each, StandinTensor) and each.ndim]:
        shapes = ", ".join(str(list(each.shape)) for each in elsewhere)
        raise MixedDevicesError(f"{func} is given tensors of {NAME} and of the CPU, the latter {shapes}")


def _leaves(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether it brings a tensor from the device to the CPU."""
    if func is aten.copy_.default:
        return not isinstance(args[0], StandinTensor)
    target = kwargs.get("device")
    return func is aten._to_copy.default and target is not None and not _is_there(target)


def _count(func: Any, args: Any, kwargs: dict[str, Any]) -> None:
    source = args[1] if func is aten.copy_.default else args[0] if args else None
    if func in COPIES and not isinstance(source, StandinTensor):
        if source is None or not source.numel():
            return
        quick = kwargs.get("non_blocking") or (func is aten.copy_.default and len(args) > 2 and args[2])
        Counted.note(to_device=1, waits=int(not quick))
    elif func in SIZED_BY_VALUES:
        Counted.note(waits=1)
    elif not func.is_view and "empty" not in func.name():
        Counted.note(kernels=1)


def _wrapped(func: Any, args: Any, kwargs: dict[str, Any], found: Any) -> Any:
    """A result as tensors of the device: those that were written to are those that were given."""
    written = [each.name for each in func._schema.arguments if each.alias_info and each.alias_info.is_write]
    if written and len(func._schema.returns) == 1:
        given: Any = kwargs.get(written[0], args[0] if args else None)
        if given.shape != given.here.shape:
            raise NotImplementedError(f"{func} changes the shape of a tensor of {NAME}")
        return given
    flat, form = tree_flatten(found)
    return tree_unflatten([StandinTensor(each) if isinstance(each, Tensor) else each for each in flat], form)


class _Generator(torch.Generator):
    """A source of noise, on the device too."""

    def __new__(cls, device: Any = "cpu") -> Any:
        make: Any = super().__new__
        return make(cls, CPU if _is_there(device) else device)


def _kernel(func: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: _run(func, args, kwargs)


_libraries: list[Any] = []


def install() -> None:
    """Make it a device of this process, for as long as that lasts."""
    if _libraries:
        return
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend(NAME)
    library: Any = torch.library.Library
    everything, own = library("_", "IMPL"), library("aten", "IMPL")
    everything.fallback(lambda op, *args, **kwargs: _run(op, args, kwargs), "PrivateUse1")
    for name in ("_copy_from", *RESIZING):
        packet, _, overload = name.partition(".")
        own.impl(name, _kernel(getattr(getattr(aten, packet), overload or "default")), "PrivateUse1")
    _libraries.extend((everything, own))
    torch.Generator = _Generator  # type: ignore[misc]
