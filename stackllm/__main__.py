"""``python -m stackllm`` is ``stackllm``."""

from stackllm.cli import main

if __name__ == "__main__":
    main()
