"""``python -m gateway`` is ``ai-gateway``."""

from gateway.cli import main

if __name__ == "__main__":
    main(prog_name="ai-gateway")
