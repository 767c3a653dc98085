"""The names of the types that caches are stored in."""

FLOATS = ("bfloat16", "float32", "float16")
EIGHT_BITS = ("int8", "float8_e4m3fn", "float8_e5m2")
STORAGE_TYPES = (*FLOATS, *EIGHT_BITS, "int4")
