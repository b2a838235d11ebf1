"""The page at `/`: a chat with the served models, one file without a build step, and what it may do in a browser."""

import base64
import hashlib
import re
from functools import cache
from pathlib import Path

_FILE = Path(__file__).with_name("playground.html")


@cache
def page() -> str:
    return _FILE.read_text(encoding="utf-8")


@cache
def content_security_policy() -> str:
    """The page's own script and style run, and nothing else; it talks to this server alone."""
    return "; ".join(
        [
            "default-src 'none'",
            f"script-src {_hash('script')}",
            f"style-src {_hash('style')} 'unsafe-hashes'",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        ]
    )


def _hash(tag: str) -> str:
    found = re.search(rf"<{tag}>(.*?)</{tag}>", page(), re.DOTALL)
    assert found is not None
    return f"'sha256-{base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode()}'"
