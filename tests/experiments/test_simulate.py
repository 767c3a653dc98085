"""The simulator from the command line, on a small trace of its own."""

TRACE = "TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(
    f"2023-11-16 18:15:{second:02d}.5,{200 + 40 * second},{10 + second}\n" for second in range(50)
)
