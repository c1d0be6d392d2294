"""What to tell of a `DataLoader` whose worker was lost, in one line."""

import re

TIMEOUT_SECONDS = (
    1_800  # without a micro-batch from a worker: storage that no longer answers, or a decoder that never ends
)


def explain_loss(error: BaseException) -> str | None:
    """What happened to a worker, the likely cause and the remedy; None for any other error.

    torch raises a bare RuntimeError, from wherever the main process happens to be when the signal of a child's death reaches it.
    """
    text = " ".join(str(error).split())
    if found := re.search(r"DataLoader timed out after ([\d.]+)", text):
        return (
            f"no audio came for {float(found[1]):,.0f} s from a process that decodes it: storage that does not answer, or a file that "
            "the decoder never ends with; look at the disk, or find the file with --dataloader_num_workers 0"
        )
    if not (
        found := re.search(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (?:is killed by signal: (\w[\w ]*))?", text)
    ):
        return None
    pid, signal = found[1], found[2]
    if signal and "egmentation" in signal:
        cause = "a damaged file that crashes the decoder (find it with --dataloader_num_workers 0)"
    elif signal and "us error" in signal:
        cause = "shared memory ran out (in a container: --shm-size=2g)"
    else:
        cause = "out of memory, or of shared memory (in a container: --shm-size=2g), or killed by hand; fewer --dataloader_num_workers take less"
    return (
        f"a process that decodes audio (pid {pid}) was lost ({signal or 'it ended by itself'}): probably {cause}; "
        "--resume_from_checkpoint auto goes on from the last checkpoint"
    )
