# SPDX-License-Identifier: Apache-2.0
"""Real streams over the network of this machine: MPEG-TS over TCP, and RTSP with RTP inside the
same connection, as cameras serve it (RFC 2326, RFC 2250). Each connection gets the next of some
programmes, and is then cut.
"""

from __future__ import annotations

import io
import socket
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import av
import numpy as np

RATE = 25
#: Bytes of a packet of MPEG-TS, and how many are sent together.
PACKET, TOGETHER = 188, 7
SDP = "v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=test\r\nc=IN IP4 0.0.0.0\r\nt=0 0\r\nm=video 0 RTP/AVP 33\r\na=control:track1\r\n"  # fmt: skip


def transport_stream(frames: int, *, first: int = 0) -> bytes:
    """So many frames of one grey each, 4 brighter with each frame, 48 x 64."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mpegts") as container:
        stream: Any = container.add_stream("mpeg2video", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(first, first + frames):
            picture = np.full((48, 64, 3), 20 + 4 * (number % 50), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def chunks(data: bytes) -> Iterator[bytes]:
    for start in range(0, len(data), PACKET * TOGETHER):
        yield data[start : start + PACKET * TOGETHER]


def send_plain(connection: socket.socket, data: bytes) -> None:
    for chunk in chunks(data):
        connection.sendall(chunk)


def send_rtsp(connection: socket.socket, data: bytes) -> None:
    """Answer until PLAY, then send RTP packets in the connection."""
    reader = connection.makefile("rb")
    while True:
        request = reader.readline().decode()
        headers: dict[str, str] = {}
        while (line := reader.readline().decode().strip()) != "":
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        if not request:
            return
        method = request.split(" ")[0]
        more, body = "", ""
        if method == "OPTIONS":
            more = "Public: OPTIONS, DESCRIBE, SETUP, PLAY, TEARDOWN\r\n"
        elif method == "DESCRIBE":
            more, body = f"Content-Type: application/sdp\r\nContent-Length: {len(SDP)}\r\n", SDP
        elif method == "SETUP":
            more = "Transport: RTP/AVP/TCP;unicast;interleaved=0-1\r\nSession: 1\r\n"
        answer = f"RTSP/1.0 200 OK\r\nCSeq: {headers.get('cseq', '0')}\r\n{more}\r\n{body}"
        connection.sendall(answer.encode())
        if method == "PLAY":
            break
    for number, chunk in enumerate(chunks(data)):
        packet = struct.pack(">BBHII", 0x80, 33, number, number * 90, 1) + chunk
        connection.sendall(b"$\0" + struct.pack(">H", len(packet)) + packet)


@contextmanager
def served(scheme: str, programmes: Sequence[bytes], pause_s: float = 0.0) -> Iterator[str]:
    """An address that has these programmes, one for each connection; then it is refused.

    Args:
        scheme: tcp or rtsp.
        pause_s: how long the end of a programme stands still before the connection is cut.
    """
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        for programme in programmes:
            try:
                connection, _ = listener.accept()
            except OSError:  # closed
                return
            with connection:
                try:
                    (send_rtsp if scheme == "rtsp" else send_plain)(connection, programme)
                    time.sleep(pause_s)
                except OSError:  # the reader has gone
                    pass
        listener.close()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"{scheme}://127.0.0.1:{listener.getsockname()[1]}" + ("/stream" * (scheme == "rtsp"))
    finally:
        listener.close()
        thread.join(10)
