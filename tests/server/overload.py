"""Clients that ask more than a server can do: python -m tests.server.overload URL RATE SECONDS.

So many requests a second come, whatever becomes of those before. The last line is a JSON document:
seconds to the first token of each that was accepted, Retry-After of each that was refused, and how
many had no answer.
"""

import asyncio
import json
import sys
import time

BODY = json.dumps({"prompt": [3] * 40, "max_tokens": 16, "stream": True, "ignore_eos": True})
REQUEST = (
    "POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    f"Content-Type: application/json\r\nContent-Length: {len(BODY)}\r\n\r\n{BODY}"
).encode()


async def ask(port: int, accepted: list[float], refused: list[float]) -> None:
    start = time.monotonic()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(REQUEST)
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    if " 503 " in head:
        refused.append(float(head.partition("retry-after: ")[2].split()[0]))
    else:
        assert " 200 " in head, head
        await reader.readuntil(b"data: ")
        accepted.append(time.monotonic() - start)
    await reader.read()
    writer.close()


async def main(url: str, rate: float, seconds: float) -> None:
    port, start = int(url.rpartition(":")[2]), time.monotonic()
    accepted: list[float] = []
    refused: list[float] = []
    tasks = []
    for number in range(int(rate * seconds)):
        await asyncio.sleep(start + number / rate - time.monotonic())
        tasks.append(asyncio.create_task(ask(port, accepted, refused)))
    ends = await asyncio.gather(*tasks, return_exceptions=True)
    lost = [end for end in ends if end is not None]
    if not all(isinstance(end, ConnectionError | asyncio.IncompleteReadError) for end in lost):
        raise ExceptionGroup("answers that cannot be", lost)
    print(json.dumps({"accepted": accepted, "refused": refused, "lost": len(lost)}))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], float(sys.argv[2]), float(sys.argv[3])))
