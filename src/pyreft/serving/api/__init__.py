"""The OpenAI API over HTTP, for an engine in this process.

`app` has the routes, `guard` stands before them, `bodies` says what a request may hold, `service` makes requests for
the engine of it and takes in what comes back; `completing` and `responding` write that as the API has it.
"""
