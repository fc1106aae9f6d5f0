"""Launcher for a clone: ``python cli.py run ...`` is ``stackllm run ...``."""

from stackllm.cli import main

if __name__ == "__main__":
    main()
