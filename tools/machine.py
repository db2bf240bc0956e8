"""The machine that a command computes on: its device, its threads, and its memory when there is too little.

Like every command, this module imports torch inside its functions.
"""

OUT = ("out of memory", "can't allocate memory")  # CUDA, ROCm and MPS; the CPU


def set_up(given):
    """The device that --device names, with --threads threads; a GPU multiplies float32 in TensorFloat-32.

    Raises ValueError naming the devices that are present.
    """
    import torch

    from gptcore import device

    place = device.pick(given["device"])
    torch.set_num_threads(given["threads"] or torch.get_num_threads())
    if place.type == "cuda":
        torch.set_float32_matmul_precision("high")
    return place


def out_of_memory(error) -> bool:
    """Is this torch's or Python's way of saying that memory is full? MPS and the CPU have no exception of their own."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in OUT)
    )
