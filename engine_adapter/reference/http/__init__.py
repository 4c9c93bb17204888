"""The reference worker over HTTP, with OpenAI's endpoints.

A process of its own, which starts the decode process as a child and is a client of its line
protocol: the event loop can never hold the decode loop up. Reading order: `service` (the process),
`app` (the endpoints), `schemas` and `responses` (the bodies), `answers` and `dialects` (from the
engine's replies to a response), `engine_client` (the child), `tokenization`; and what guards them:
`limits`, `authorization`, `errors`. `metrics` is what a scrape sees.
"""
