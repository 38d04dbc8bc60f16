"""Makes a request whose task fails, and prints what Sentry would be sent, as JSON.

A program, as Sentry patches whatever it finds in its process.
"""

import json

import sentry_sdk
from observed import serve
from sentry_sdk.envelope import Envelope
from sentry_sdk.transport import Transport
from test_observability import adding, doing, evaluated_page, fail


class Printing(Transport):
    def capture_envelope(self, envelope: Envelope) -> None:
        for item in envelope.items:
            print(json.dumps(item.payload.json))


def fail_with_a_tag() -> None:
    sentry_sdk.set_tag("order", "7")
    fail()


if __name__ == "__main__":
    monitored = evaluated_page()["monitored"]
    sentry_sdk.init("http://key@localhost/1", transport=Printing, traces_sample_rate=1)
    for kind in "sync", "async":
        task = doing(kind, fail_with_a_tag)
        serve(adding(task), ("asyncio", {}), monitored, detach=True)
