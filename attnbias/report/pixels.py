"""Small pictures as PNG in data URIs, and the colour scale of values."""

from __future__ import annotations

import base64
import struct
import zlib

import torch
from torch import Tensor

# Viridis at nine even steps: ordered in lightness, for any colour vision and in grey.
SHADES = (
    (68, 1, 84), (71, 44, 122), (59, 81, 139), (44, 113, 142), (33, 144, 141),
    (39, 173, 129), (92, 200, 99), (170, 220, 50), (253, 231, 37),
)  # fmt: skip


def thumbnail(values: Tensor, top: float) -> str:
    """A data URI: values ``(rows, columns)`` as a picture with a pixel for each patch."""
    scaled = (values / max(top, 1e-12)).nan_to_num(0.0).clamp(0, 1)
    table = torch.tensor(SHADES, dtype=torch.float32)
    at = scaled.float() * (len(SHADES) - 1)
    low = at.floor().long().clamp_max(len(SHADES) - 2)
    mixed = torch.lerp(table[low], table[low + 1], (at - low)[..., None])
    return data_uri(mixed.round().byte())


def shade(part: float) -> str:
    """A colour for 0 to 1."""
    at = min(max(part, 0.0), 1.0) * (len(SHADES) - 1)
    low = min(int(at), len(SHADES) - 2)
    mixed = [a + (b - a) * (at - low) for a, b in zip(SHADES[low], SHADES[low + 1], strict=True)]
    return "#" + "".join(f"{round(value):02x}" for value in mixed)


def data_uri(pixels: Tensor) -> str:
    """``(height, width, 3)`` uint8 as the data URI of a PNG."""
    return "data:image/png;base64," + base64.b64encode(encoded(pixels)).decode()


def encoded(pixels: Tensor) -> bytes:
    """``(height, width, 3)`` uint8 as PNG: 8-bit RGB, no filter; the same bytes everywhere."""
    height, width = pixels.shape[:2]
    lines = torch.cat([pixels.new_zeros(height, 1), pixels.reshape(height, -1)], 1)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(
            ">I", zlib.crc32(kind + data)
        )  # fmt: skip

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(lines.contiguous().cpu().numpy().tobytes(), 9)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    )
