# SPDX-License-Identifier: Apache-2.0
"""What the header of a JPEG file says, read without decoding it.

Source: ITU-T T.81, annex B (markers); Exif 2.3, section 4.6.2 (the orientation tag in an APP1
segment); Adobe's technical note 5116 (the APP14 segment).
"""

import re
import struct

from trtdet.images.files import SOI, is_frame, segments

EOI = b"\xff\xd9"
APP1, APP14 = 0xE1, 0xEE
SOS = 0xDA
#: The first marker behind the pixels of a scan, where 0xFF may be stuffed, filled or a restart.
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
ORIENTATION = 0x0112
#: Sampling of luma beside chroma of 1x1, horizontal in the upper four bits: 4:4:4, 4:2:2, 4:4:0 and
#: 4:2:0.
SAMPLINGS = (0x11, 0x21, 0x12, 0x22)


def plain_size(data: bytes | memoryview) -> tuple[int, int] | None:
    """Height and width of a JPEG that every decoder shows alike: whole, 8 bits, YCbCr in a usual
    sampling, upright.

    None for all others: grey and CMYK, RGB, rotated by EXIF, truncated, and what is no JPEG.
    """
    if data[-2:] != EOI:
        return None
    for marker, at, end in segments(data):
        if is_frame(marker):
            return _frame(data, at)
        if marker == APP1 and not _is_upright(data[at + 4 : end]):
            return None
        is_adobe = marker == APP14 and bytes(data[at + 4 : at + 9]) == b"Adobe"
        if is_adobe and data[at + 15 : at + 16] != b"\x01":
            return None
    return None


def without_trailer(data: bytes) -> bytes:
    """A JPEG up to its end: telephones append previews, depth maps and videos.

    All of `data` where no end is found.
    """
    at = len(SOI)
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != EOI[1]:
        is_scan = data[at + 1] == SOS
        at += 2 + (data[at + 2] << 8) + data[at + 3]
        if is_scan:
            found = _MARKER.search(data, at)
            at = found.start() if found else len(data)
    return data[: at + 2] if data[at : at + 2] == EOI else data


def _frame(data: bytes | memoryview, at: int) -> tuple[int, int] | None:
    """The size, where the frame header at `at` is that of 8-bit YCbCr."""
    if at + 19 > len(data):
        return None
    bits, height, width, channels = struct.unpack_from(">BHHB", data, at + 4)
    if bits != 8 or channels != 3 or not height or not width:
        return None
    ids, samplings = bytes(data[at + 10 : at + 19 : 3]), bytes(data[at + 11 : at + 19 : 3])
    if ids == b"RGB" or samplings[0] not in SAMPLINGS or samplings[1:] != b"\x11\x11":
        return None
    return height, width


def _is_upright(segment: bytes | memoryview) -> bool:
    """Whether an APP1 segment rotates nothing. One that cannot be read counts as if it did."""
    segment = bytes(segment)
    if not segment.startswith(b"Exif\0\0"):
        return True  # XMP
    tiff = segment[6:]
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return False
    try:
        (start,) = struct.unpack_from(order + "I", tiff, 4)
        (count,) = struct.unpack_from(order + "H", tiff, start)
        for entry in range(start + 2, start + 2 + 12 * count, 12):
            tag, _, _, value = struct.unpack_from(order + "HHIH", tiff, entry)
            if tag == ORIENTATION:
                return bool(value == 1)
    except struct.error:
        return False
    return True
