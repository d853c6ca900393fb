"""Run with `uvicorn clt_server.main:app` or `python -m clt_server.main`.

Environment: STORAGE_BASE_DIR (./server_data), HOST (127.0.0.1), PORT (8000), LOG_LEVEL (info), CLT_SERVER_TOKEN.
`uvicorn --host` off loopback without CLT_SERVER_TOKEN is up to you; `clt serve` and this module refuse it.
"""

import os

from clt.serve.activation_server import create_app, require_token_off_loopback

app = create_app(os.environ.get("STORAGE_BASE_DIR", "./server_data"), token=os.environ.get("CLT_SERVER_TOKEN"))


def main() -> None:
    """Serve until interrupted."""
    import uvicorn

    host = os.environ.get("HOST", "127.0.0.1")
    require_token_off_loopback(host, os.environ.get("CLT_SERVER_TOKEN"))
    uvicorn.run(
        app,
        host=host,
        port=int(os.environ.get("PORT", "8000")),
        log_level=os.environ.get("LOG_LEVEL", "info").lower(),
    )


if __name__ == "__main__":
    main()
