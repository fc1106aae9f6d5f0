"""Mutations of good files: whatever comes in, a table of probabilities comes out or one sentence.

``STACKLLM_FUZZ_CASES=20000 python -m pytest tests/cli/test_optim_fuzz.py`` runs the full number.
"""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from stackllm.errors import StackllmError
from stackllm.optim.improve import Request, improve
from stackllm.tables.files import write_frame

CASES = int(os.environ.get("STACKLLM_FUZZ_CASES", "600"))
PIECES = (
    b",", b'"', b"\n", b"\r\n", b"\r", b"\0", b";", b"\t", b"nan", b"-inf", b"1e400", b"1e-320", b"-",
    b"\xff\xfe", b"\xef\xbb\xbf", b"\xc3", "ü".encode(), b"0", b"1", b"0x1", b"1_0", b"id", b"group",
    b"PAR1", b"'", b"\\", b"#", b" ", b"\x1a", b"\xf0\x9f\x98\x80", b"9" * 400, b"," * 50, b'"' * 3,
)  # fmt: skip


def good(rng: random.Random) -> bytes:
    n_classes, n_groups = rng.randint(2, 5), rng.randint(1, 6)
    lines = ["id,group," + ",".join(f"target_{j}" for j in range(n_classes))]
    for group in range(n_groups):
        for row in range(rng.randint(1, n_classes + 1)):
            p = np.random.default_rng(rng.getrandbits(32)).dirichlet(np.ones(n_classes))
            name = f'"q ""{group}"", or so"' if group % 2 else f"q{group}"
            lines.append(f"{group:02d}{row},{name}," + ",".join(map(repr, p.tolist())))
    return (rng.choice(["\n", "\r\n"]).join(lines) + rng.choice(["", "\n"])).encode()


def mutated(content: bytes, rng: random.Random) -> bytes:
    data = bytearray(content)
    for _ in range(rng.randint(0, 4)):
        at = rng.randrange(len(data) + 1) if data else 0
        match rng.randrange(7):
            case 0:
                data[at:at] = rng.choice(PIECES)
            case 1:
                del data[at : at + rng.randint(1, 40)]
            case 2:
                data[at : at + 1] = bytes([rng.randrange(256)])
            case 3:
                data[at : at + rng.randint(1, 20)] = rng.choice(PIECES)
            case 4:
                lines = bytes(data).split(b"\n")
                rng.shuffle(lines)
                data = bytearray(b"\n".join(lines))
            case 5:
                lines = bytes(data).split(b"\n")
                lines.insert(rng.randrange(len(lines) + 1), rng.choice(lines))
                data = bytearray(b"\n".join(lines))
            case _:
                data = data[:at]
    return bytes(data)


@pytest.mark.slow
def test_mutated_files_give_a_result_or_a_sentence(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    source, target = Path("sub.csv"), Path("out.csv")
    done = refused = 0
    for seed in range(CASES):
        rng = random.Random(seed)
        content = mutated(good(rng), rng)
        source.write_bytes(content)
        start = time.monotonic()
        try:
            outcome = improve(Request(source, method=rng.choice(["posterior", "sinkhorn"])))
            write_frame(outcome.frame, target)
        except StackllmError as error:
            refused += 1
            said = str(error)
            assert said.startswith("sub.csv: "), (seed, said)
            assert "\n" not in said, (seed, said)
            assert len(said) < 700, (seed, said)
            assert not target.exists(), seed
        else:
            done += 1
            after = pl.read_csv(target, infer_schema=False, empty_string_is_null=False)
            classes = outcome.account["classes"]
            sums = outcome.frame.select(classes).to_numpy().sum(axis=1)
            assert np.abs(sums - 1).max() < 1e-9, seed
            assert after.height == outcome.account["rows"], seed
            target.unlink()
        assert time.monotonic() - start < 10, seed
    assert done > CASES / 20
    assert refused > CASES / 4
