"""Read TensorBoard event files back, as TensorBoard shows them."""

import os
import struct

from tensorboardX.proto.event_pb2 import Event, SessionLog


def scalars(folder):
    """(tag, step, value) of the TensorBoard scalars, in the order they were written."""
    return [
        (tag, step, v.simple_value) for tag, step, v in shown(folder) if v.HasField("simple_value")
    ]


def shown(folder):
    """(tag, step, value) of all that the TensorBoard files hold, in the order of writing."""
    found = []
    for path in sorted(folder.glob("events.*"), key=os.path.getmtime):
        content, start = path.read_bytes(), 0
        while start < len(content):
            # A record: length (8 bytes), its checksum (4), the event, its checksum (4).
            (length,) = struct.unpack_from("<Q", content, start)
            event = Event.FromString(content[start + 12 : start + 12 + length])
            if event.session_log.status == SessionLog.START:  # what comes again is hidden
                found = [entry for entry in found if entry[1] < event.step]
            found += [(v.tag, event.step, v) for v in event.summary.value]
            start += 12 + length + 4
    return found


def texts(folder):
    """(tag, step, text) of the TensorBoard texts."""
    return [
        (tag, step, v.tensor.string_val[0].decode())
        for tag, step, v in shown(folder)
        if v.HasField("tensor")
    ]


def pictures(folder):
    """(tag, step, PNG) of the TensorBoard pictures."""
    return [
        (tag, step, v.image.encoded_image_string)
        for tag, step, v in shown(folder)
        if v.HasField("image")
    ]
