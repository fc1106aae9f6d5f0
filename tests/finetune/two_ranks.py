"""Trains one decoder in each of several processes, and leaves what each has; a program of its own."""

import pickle
import sys
from pathlib import Path

from stackllm.engine import ranks
from stackllm.members import decoder


def main(given: Path, folder: Path) -> None:
    """Fit what the test put into ``given``."""
    inputs, targets, params = pickle.loads(given.read_bytes())
    if ranks.size() > 1:
        ranks.join()
    own = folder / f"rank{ranks.rank()}-of-{ranks.size()}"
    own.mkdir(parents=True)
    decoder.fit(inputs, targets, params, 0, own)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
