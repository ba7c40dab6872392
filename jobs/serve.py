"""Images on demand over HTTP, and a page: python jobs/serve.py --checkpoint NAME/checkpoints/best

API keys: python jobs/serve.py keys add NAME --keys FILE
"""

from m2d.cli import main

if __name__ == "__main__":
    main("serve")
