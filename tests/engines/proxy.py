"""Stands before a broker, so that it can be stopped: ``proxy.py PORT HOST PORT``."""

import asyncio
import sys
from asyncio import StreamReader, StreamWriter


async def pump(reader: StreamReader, writer: StreamWriter) -> None:
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    except OSError:
        pass
    finally:
        writer.close()


async def join(reader: StreamReader, writer: StreamWriter) -> None:
    _, _, host, port = sys.argv
    far_reader, far_writer = await asyncio.open_connection(host, int(port))
    await asyncio.gather(pump(reader, far_writer), pump(far_reader, writer))


async def main() -> None:
    server = await asyncio.start_server(join, "127.0.0.1", int(sys.argv[1]))
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
