"""Two make-believe GPUs that hold CPU tensors: what meets on both, or reaches NumPy from one, is refused as on real ones.

Every storage has a tag, the device that it is said to be on; views and parameters share it. Functions
of torch are seen before they run, so ``.device`` and ``.to`` tell and do what they would on such a
machine, and all tensors of a function must be on one device.
"""

from __future__ import annotations

import pytest
import torch
from machines import T4
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode, _pop_mode_temporarily
from torch.utils._pytree import tree_flatten

HOST = torch.device("cpu")
FIRST, SECOND = torch.device("cpu:0"), torch.device("cpu:1")

_ACROSS = {
    "_has_compatible_shallow_copy_type",
    "copy_",
    "backward",
    "grad",
    "set_",
    "is_set_to",
    "__set__",
    "clip_grad_norm_",
}
"""What torch itself does across devices; its ``_foreach`` functions get tensors sorted by device."""
_LIKE_ITSELF = {"new_zeros", "new_ones", "new_empty", "new_full", "new_tensor"}


class TwoDevices(TorchFunctionMode):
    """The machine; ``moved`` counts tensors that were copied from one device to another."""

    def __init__(self):
        super().__init__()
        self.moved = 0
        self._tags = {}

    def device(self, tensor):
        storage = tensor.untyped_storage()
        reference, device = self._tags.get(storage._cdata, (None, HOST))
        return HOST if reference is None or reference.expired() else device

    def put(self, tensor, device):
        storage = tensor.untyped_storage()
        self._tags[storage._cdata] = (StorageWeakRef(storage), device)
        return tensor

    def move(self, tensor, device, dtype=None):
        if device == self.device(tensor):
            return tensor if dtype is None else self.put(tensor.to(dtype), device)
        self.moved += 1
        copy = tensor.to(dtype or tensor.dtype)
        return self.put(copy.clone() if copy is tensor else copy, device)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = getattr(function, "__name__", "")
        owner = getattr(getattr(function, "__self__", None), "__name__", "")
        if name == "__get__" and owner == "device":
            return self.device(args[0])
        if name in ("to", "cpu", "cuda"):
            return self._to(name, args, kwargs)
        if name in ("numpy", "__array__") and self.device(args[0]) != HOST:
            raise TypeError(f"can't convert {self.device(args[0])} device type tensor to numpy.")
        device = kwargs.get("device")
        if device is not None:
            kwargs["device"] = HOST
        given = [it for it in tree_flatten((args, kwargs))[0] if isinstance(it, torch.Tensor)]
        place = self._common(function, name, given)
        result = function(*args, **kwargs)
        if name == "__set__" and owner == "data":
            return result
        made = [it for it in tree_flatten(result)[0] if isinstance(it, torch.Tensor)]
        before = {it.untyped_storage()._cdata for it in given}
        if name.startswith("_foreach") or name == "grad":
            places = [self.device(it) for it in given[: len(made)]]
        else:
            places = [torch.device(device) if device is not None else place] * len(made)
        for tensor, where in zip(made, places, strict=False):
            if tensor.untyped_storage()._cdata not in before:
                self.put(tensor, where)
        return result

    def _common(self, function, name, given):
        """The device of all tensors; numbers on the host may stand beside any."""
        if name in _LIKE_ITSELF:
            return self.device(given[0])
        placed = [(self.device(it), it) for it in given]
        if name.startswith("_foreach") or name in _ACROSS:
            return placed[0][0] if placed else HOST
        if name in ("__getitem__", "__setitem__"):  # indices may stand on the host
            placed = placed[:1] + [
                (device, it) for device, it in placed[1:] if device != HOST and it.ndim
            ]
        matter = {device for device, it in placed if it.ndim or device != HOST}
        if len(matter) > 1:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found {sorted(map(str, matter))} in {name}"
            )
        return matter.pop() if matter else HOST

    def _to(self, name, args, kwargs):
        tensor = args[0]
        if name == "cpu":
            return self.move(tensor, HOST)
        rest = args[1:]
        if rest and isinstance(rest[0], torch.Tensor):
            return self.move(tensor, self.device(rest[0]), rest[0].dtype)
        device, dtype, *_ = torch._C._nn._parse_to(
            *rest, **{k: v for k, v in kwargs.items() if k != "copy"}
        )
        return self.move(tensor, self.device(tensor) if device is None else device, dtype)


@pytest.fixture
def two_devices(monkeypatch, pretend_gpus):
    """``devices = "all"`` means two make-believe ones, on which accelerate deals out a model as on real ones."""
    import accelerate
    from transformers import PreTrainedModel

    load = PreTrainedModel.from_pretrained.__func__
    machine = TwoDevices()
    pretend_gpus(T4, T4)

    def dealt(cls, *args, device_map=None, **options):
        with _pop_mode_temporarily():
            given = load(cls, *args, **options)
        model = given[0] if isinstance(given, tuple) else given
        if device_map == "auto":
            deal(model, accelerate)
        return given

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(dealt))
    with machine:
        yield machine


def deal(model, accelerate):
    """Half of the layers on either device, what comes before on the first, behind on the second."""
    sizes = accelerate.utils.compute_module_sizes(model)
    numbers = accelerate.infer_auto_device_map(
        model, {0: int(sizes[""] * 0.55), 1: sizes[""]}, model._no_split_modules
    )
    device_map = {name: ("cpu:0", "cpu:1")[number] for name, number in numbers.items()}
    accelerate.dispatch_model(
        model, device_map, main_device="cpu:0", skip_keys=model._skip_keys_device_placement
    )
