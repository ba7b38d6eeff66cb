"""`python -m cache_proxy` is `cache-proxy`."""

from .cli import app

app()
