"""`diptych serve`: one student behind an HTTP API in OpenAI's format, and a web app on the same server.

    service = Service(ServerSettings(...))    # jobs: their requests, owners and results
    app = server.create(service)              # FastAPI: /v1/…, /healthz, /metrics, and the web app at /app

A request is stored as a job in SQLite before it is answered, so it survives a crash. One worker per device generates
the queued images, in batches of equal settings. The HTTP routes and the web app call the same `Service`.
"""
