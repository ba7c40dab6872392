"""Images on demand: an engine that many requests share, an HTTP API, jobs, a page, and their deployment on Ray Serve.

Only `deployment` and `command` know Ray; what the parts say to each other is in `orders`.
"""
