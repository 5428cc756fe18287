"""What goes to stdout: one JSON object alone where `--json` asks for it, whatever a library prints."""

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any


@contextlib.contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """Sends file descriptor 1, and all that children and libraries print, to stderr; put back at the end."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def show(result: Mapping[str, Any], *, as_json: bool) -> None:
    """Prints a result as one JSON object, or as one `name value` line each."""
    if as_json:
        print(json.dumps(result))
        return
    width = max(map(len, result), default=0)
    for name, value in result.items():
        print(f"{name:<{width}}  {json.dumps(value) if isinstance(value, dict | list) else value}")
