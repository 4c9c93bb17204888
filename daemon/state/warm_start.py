"""Before the loop starts: what was learned before, from files, or from Redis where there is none.

Everything that may wait or fail happens here, once; the loop then only looks things up.
"""

from __future__ import annotations

import logging
from pathlib import Path

from smartspec.daemon.config import Settings
from smartspec.daemon.redis_url import redacted
from smartspec.daemon.state.learned import RefusedState, check, decode
from smartspec.daemon.state.library import Library
from smartspec.daemon.state.state_directory import StateDirectory

log = logging.getLogger(__name__)

REDIS_TIMEOUT_S = 1.0


def state_directory(settings: Settings) -> StateDirectory:
    """Where checkpoints are kept, as configured."""
    return StateDirectory(Path(settings.state.directory), settings.state.max_kept)


def load(settings: Settings) -> Library:
    """All that can be used. Never raises: what cannot be read or used is logged, and noted."""
    library = Library(settings.state.max_kept)
    if not settings.state.enabled:
        return library
    found: set[str] = set()
    try:
        stored = state_directory(settings).load()
    except OSError as error:
        log.error(
            "state.directory: %s cannot be read (%s): engines start cold; name a directory that "
            "the daemon may use, or set state.enabled = false",
            settings.state.directory,
            error.strerror,
        )
        stored = []
    for one in reversed(stored):  # the newest last: it is the last to be forgotten
        if one.checkpoint is not None:
            library.put(one.checkpoint)
            found.add(one.key_id)
        else:
            library.note_refused(one.key_id, one.why_not)
            log.warning("learned state refused, kept as %s: %s", one.path, one.why_not)
    # An embedded server has just begun, and is empty.
    num_remote = _load_redis(settings, library, found) if settings.redis.url else 0
    if len(library):
        log.info(
            "learned state of %d kinds of engines: %d from %s, %d from Redis",
            len(library),
            len(library) - num_remote,
            settings.state.directory,
            num_remote,
        )
    return library


def _load_redis(settings: Settings, library: Library, found: set[str]) -> int:
    """Take from Redis what no file has; returns how many."""
    from redis.exceptions import RedisError

    from smartspec.daemon.telemetry.redis_store import (
        Keys,
        connect_as,
        put_learned_aside,
        read_learned,
    )

    num_taken = 0
    client = connect_as(settings, timeout_s=REDIS_TIMEOUT_S)
    keys = Keys(settings.redis.key_prefix)
    try:
        for key_id, frame in read_learned(client, keys, settings.state.max_kept).items():
            if key_id in found:
                continue
            try:
                checkpoint = decode(frame, key_id)
                check(checkpoint)
            except RefusedState as error:
                aside = put_learned_aside(client, keys, key_id)
                library.note_refused(key_id, str(error))
                log.warning("learned state in Redis refused, kept as %s: %s", aside, error)
                continue
            if len(library) < library.max_kept:
                library.put(checkpoint)
                num_taken += 1
    except (RedisError, OSError) as error:
        log.warning(
            "redis.url: %s cannot be read (%s): engines without a file start cold",
            redacted(settings.redis_url),
            error,
        )
    finally:
        client.close()
    return num_taken
