"""Choice of the device, and of the precision it is good at."""

from __future__ import annotations

import torch

from synthseg.errors import DeviceError

DEVICES = ("auto", "cpu", "cuda", "mps")


def resolve_device(name: str = "auto") -> torch.device:
    """The device of that name, ``cuda:1`` included; ``auto`` takes CUDA, then MPS, then the CPU.

    A device that was asked for by name and is not there raises DeviceError; it is never replaced.
    """
    has_cuda = torch.cuda.is_available()
    has_mps = torch.backends.mps.is_available()
    if name == "auto":
        return torch.device("cuda" if has_cuda else "mps" if has_mps else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in DEVICES:
        raise DeviceError(f"there is no device '{name}'; choose one of {', '.join(DEVICES)}")
    if device.type == "cuda" and not has_cuda:
        why = "this PyTorch was built without CUDA" if torch.version.cuda is None else "no working CUDA device found"
        raise DeviceError(f"device '{name}' was asked for, but {why}; use --device cpu, or install CUDA PyTorch")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DeviceError(f"device '{name}' was asked for, but there are only {torch.cuda.device_count()} CUDA devices")
    if device.type == "mps" and not has_mps:
        raise DeviceError(f"device '{name}' was asked for, but this computer has no Apple MPS; use --device cpu")
    return device


def device_name(device: torch.device) -> str:
    """What a device is called: "CPU", "MPS", or the name of the CUDA device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()


def has_native_bf16(device: torch.device) -> bool:
    """Whether bfloat16 is faster than float32 there (hardware instructions, not emulation)."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    if device.type == "cpu":
        checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(bool(getattr(torch.cpu, check, lambda: False)()) for check in checks)
    return False
