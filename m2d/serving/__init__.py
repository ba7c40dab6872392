"""Images on demand: an engine that many requests share, an HTTP API, jobs, a page, and their deployment on Ray Serve.

Upper may import lower: deployment > app > jobs, access > engine > orders, settings. Only the deployment knows Ray.
"""
