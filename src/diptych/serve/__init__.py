"""`diptych serve`: one student behind an HTTP API in OpenAI's format, and a web app on the same server.

    service = Service(ServerSettings(...))        # jobs: what was asked, by whom, and what came of it
    app = server.create(service)              # FastAPI: /v1/…, /healthz, /metrics, and the web app at /app

A request becomes a job in SQLite before it is answered, so that it outlives the process. One worker a device draws the
queued pictures, those whose settings agree together. The HTTP routes and the web app call the same `Service`.
"""
