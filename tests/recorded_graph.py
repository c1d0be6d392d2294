"""What a CUDA graph does, on a CPU: records the operations of a pass with their memory, and runs them again there.

A value that is read on the host ends the recording, as it ends a capture. So does whatever depends on it.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

READS_ON_HOST = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "item")


class Recorder(TorchDispatchMode):
    """Runs operations, and keeps each with its arguments and what it returned."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.split("::")[1]
        if any(name.startswith(read) for read in READS_ON_HOST):
            raise AssertionError(f"a CUDA graph cannot hold {name}: it reads a value on the host")
        out = function(*args, **(kwargs or {}))
        self.operations.append((function, args, kwargs or {}, out))
        return out


def record(step):
    """In place of `w2v2.train.capture.record`: the same memory at each replay. `replay.launches` counts what is launched."""
    with Recorder() as recorder:
        sums = step()
    # What shares the memory of an argument, a view or a change in place, needs no copy.
    launches = [(call, *_shares_memory(call)) for call in recorder.operations]

    def replay():
        with torch.no_grad():
            for (function, args, kwargs, out), is_view, is_own in launches:
                if is_view:
                    continue
                again = function(*args, **kwargs)
                if not is_own:
                    for old, new in zip(_tensors(out), _tensors(again), strict=True):
                        old.copy_(new)

    replay.launches = sum(not is_view for _, is_view, _ in launches)
    return replay, sums


def _tensors(tree):
    return [x for x in tree_iter(tree) if torch.is_tensor(x)]


def _shares_memory(call) -> tuple[bool, bool]:
    """Whether an operation is a view, which launches nothing, and whether it writes into its own arguments."""
    function, args, kwargs, out = call
    given = {x.untyped_storage().data_ptr() for x in _tensors((args, kwargs)) if x.numel()}
    shares = any(x.untyped_storage().data_ptr() in given for x in _tensors(out) if x.numel())
    changes = function._schema.is_mutable
    return shares and not changes, changes
