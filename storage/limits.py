"""What a file may cost before it is decoded: the memory that its header claims, however small the file is."""

import math
import os
import zlib

DEFAULT_GB = 3.0
VARIABLE = 'MEDICAL_ANOMALY_MAX_GB'      # the environment reaches all processes that this one starts
FREE_PART = 6          # that part of the limit any file may claim; above, its size must make it believable:
MOST_RATIO = 3000      # bytes of memory for each of its own, as 30 a pixel for 100 pixels in a byte
PIECE = 1 << 17        # bytes that are unpacked at once: of each member zlib copies what follows it
MOST_UNPACKED, FREE_UNPACKED = 100, 16 << 20     # times its size, and bytes in any case: of packed data whose
                                                 # headers claim nothing


def allow(gigabytes: float) -> None:
    """Sets the limit of this process, and of those that it starts, to --max_gb."""
    os.environ[VARIABLE] = str(gigabytes)


def most_bytes() -> float:
    return float(os.environ.get(VARIABLE, DEFAULT_GB)) * 2 ** 30


def excess(claimed: float, held: float = math.inf) -> str:
    """Why a file of `held` bytes that claims `claimed` bytes of memory is not decoded, as words that go on
    from its name; '' if it may be.
    """
    most = min(most_bytes(), max(most_bytes() / FREE_PART, MOST_RATIO * held))
    if claimed <= most:
        return ''
    own = f' for {held:,} bytes of its own' if held < math.inf else ''
    return f'claims {claimed / 2 ** 30:,.2f} GB of memory{own}: it is damaged, or meant to exhaust memory. ' \
           f'Raise --max_gb if you trust it'


def unpack(data: bytes, most: float = 0, wbits: int = zlib.MAX_WBITS + 32) -> bytes:
    """Data packed by gzip or zlib, one member after the other, if they unpack to `most` bytes or fewer; 0 =
    what is usual for their size. Raises ValueError for more, and zlib.error or EOFError if they are damaged.
    """
    most = most or min(most_bytes(), max(FREE_UNPACKED, MOST_UNPACKED * len(data)))
    parts, room, place, view = [], int(most) + 1, 0, memoryview(data)
    while place < len(data) and (place == 0 or view[place] or data[place:].strip(b'\0')):   # zeros may end it
        member = zlib.decompressobj(wbits)
        while not member.eof:
            piece = view[place:place + PIECE]
            if not piece:
                raise EOFError('its packed data are cut off')
            parts.append(member.decompress(piece, room))
            place += len(piece) - len(member.unused_data)
            room -= len(parts[-1])
            if room <= 0:
                raise ValueError(f'it unpacks to more than {most:,.0f} bytes')
        if wbits < 0:                                            # without a header there is one member
            break
    return b''.join(parts)
