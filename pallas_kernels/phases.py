"""What a call waits for: arithmetic ("sequence"), or the memory of its keys ("decode", "paged")."""

SEQUENCE, DECODE, PAGED = "sequence", "decode", "paged"
# Query rows of one KV head, T * G, up to which reading a key costs more than using it. A key of H
# numbers in 16 bits is 2 * H bytes and costs a row 2 * H FLOPs; in the time of reading a byte a TPU
# v5e does 240 FLOPs and an H100 295. That many rows would balance the two: 64 are well below.
DECODE_ROWS = 64


def phase(rows: int, queries: int, keys: int) -> str:
    """The phase of a call with T queries over S keys, and `rows` = T * G query rows for a KV head.

    The one definition that the choice of an implementation, and of a kernel in it, go by. A kernel
    may have limits of its own beside it; then the one for sequences serves the call.
    """
    return DECODE if rows <= DECODE_ROWS and keys > queries else SEQUENCE
