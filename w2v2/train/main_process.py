"""What the main process alone does, and all ranks have to know the outcome of."""

from collections.abc import Callable
from typing import TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from w2v2.errors import UserError, as_user_error

T = TypeVar("T")


def on_main_process(accelerator: Accelerator, action: Callable[[], T]) -> T:
    """What `action` returns on the main process, on every rank. Call on all ranks; it holds them like a barrier.

    A `UserError` or an error of the disk on the main process is a `UserError` on every rank, so that none is left waiting. Anything
    else is a bug: it ends the main process, and with it the launch.
    """
    outcome = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = action()
        except UserError as error:
            outcome[1] = str(error)
        except OSError as error:
            if (of_the_disk := as_user_error(error)) is None:
                raise
            outcome[1] = str(of_the_disk)
    result, complaint = broadcast_object_list(outcome)
    if complaint is not None:
        raise UserError(complaint)
    return result
