"""Programs that answer over HTTP."""
