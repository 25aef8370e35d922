"""What all tests share: Hypothesis judges laws, not seconds, which a busy machine makes many of; Ctrl-C is heard."""

import contextlib
import signal

from hypothesis import settings

# A shell makes what it starts in the background deaf to it, and so all that the tests start and interrupt.
with contextlib.suppress(ValueError):  # no main thread
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("laws", deadline=None)
settings.load_profile("laws")
