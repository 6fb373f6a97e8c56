"""The other process of the link tests: `python -m tests.integration.actor.echo ADDRESS`."""

from __future__ import annotations

import os
import sys

import msgspec
import uvloop

from ndif_actor.actor.handshake import Address, serve
from ndif_actor.actor.link import Link

SECRET = b"of this test"


class Call(msgspec.Struct, frozen=True, tag="call"):
    """What to do, and a number to do it with."""

    what: str
    number: int


async def answer(link: Link[Call]) -> None:
    async for received in link:
        call = received.message
        match call.what:
            case "echo":
                buffers = [bytes(buffer) for buffer in received.buffers]
                await received.reply(Call("echo", call.number + 1), buffers)
            case "allocate":
                memory = link.allocate(call.number)
                memory[:8] = b"allotted"
                await received.reply(call, [memory])
            case "count_descriptors":
                await received.reply(Call("count", len(os.listdir("/proc/self/fd"))))
        received.release()
    await link.close()


async def main() -> None:
    server, address = await serve(Address.parse(sys.argv[1]), SECRET, Call, answer)
    print(address, flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main())
