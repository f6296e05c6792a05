"""Rules on what a configuration has at a URL: a kind of store that is known, a data set that is there.

What is asked of a store is tried twice at most: a person waits for the answer.
"""

from __future__ import annotations

import importlib.util
import os
from contextlib import closing

from pipeline.errors import DataError
from pipeline.object_store import Absent, open_store
from pipeline.problems import Problem, nearest

AGAIN = (0.3,)  # seconds before the second try


def kind(place: str, url: str) -> list[Problem]:
    """It must be a kind of store that fsspec knows, and its package installed; whether it answers is seen later."""
    from fsspec.registry import known_implementations

    protocol, colon, _ = url.partition("://")
    if not colon:
        mend = f"such as s3://bucket/folder, or file://{os.path.abspath(url)} for another disk"
        return [Problem(place, f"{url!r} is not a URL", suggestion=mend)]
    if protocol not in known_implementations:
        mend = nearest(protocol, known_implementations) or "s3, gs, az and file are the usual ones"
        return [Problem(place, f"{protocol}:// is no kind of store that fsspec knows", suggestion=mend)]
    package = known_implementations[protocol]["class"].partition(".")[0]
    if importlib.util.find_spec(package) is None:
        extra = "'millstream[s3]'" if package == "s3fs" else package
        return [Problem(place, f"{protocol}:// needs {package}", suggestion=f"pip install {extra}")]
    return []


def data_set(place: str, url: str) -> list[Problem]:
    """A data set at a URL must be there now, with its index."""
    problems = kind(place, url)
    if problems:
        return problems
    try:
        with closing(open_store(url, pauses=AGAIN)) as store:
            store.info("shards.idx")
    except Absent:
        mend = f"send a data set there with `millstream data send FOLDER {url}`, or index tars that are there with "
        mend += f"`millstream data index {url}`"
        return [Problem(place, f"{url} holds no shards.idx", suggestion=mend)]
    except DataError as error:
        said, _, mend = str(error).partition("; ")
        return [Problem(place, said, suggestion=mend or "check the URL")]
    return []
