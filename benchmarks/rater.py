"""Local rating against ``generate()`` a row, and what computing a group's question once saves.

All ways read the same prompts with the same weights on one thread, warm. ``generate()`` is greedy
and stops at the end of the turn or after 16 new tokens, as a server is asked to: fewer would cut
replies such as "Rating: 7 out of 10" before their number. ``vs_generate_4_tokens`` in the details
says what is left if it stops after four, whatever it was about to say.
"""

from __future__ import annotations

from pathlib import Path

import polars as pl

from benchmarks.harness import Figure, Result, interleaved, main

EXAMPLE = Path("examples/seven_voices")
NEW_TOKENS = 16


def measure(quick: bool, data: Path | None) -> Result:
    """Rate some groups of ``train.csv`` in three ways, in turns."""
    import torch

    from stackllm.llm.backbone import load_backbone
    from stackllm.llm.prompts import Prompt
    from stackllm.llm.scoring import score_answers
    from stackllm.rating.local import ChatForm, RaterParams, make_prompts, rate_cases
    from stackllm.rating.question import Case, read_asked

    torch.set_num_threads(1)
    notes: list[str] = []
    loaded = load_backbone(echo=notes.append)
    model, tokenizer, params = loaded.model, loaded.tokenizer, RaterParams()
    asked = read_asked(Path("features/gpt_rating.toml"))
    rows = pl.read_csv((data or EXAMPLE) / "train.csv")
    questions = rows["Question"].unique(maintain_order=True).head(2 if quick else 12)
    cases = [
        Case(question, (response,))
        for question in questions
        for response in rows.filter(pl.col("Question") == question)["Response"]
    ]
    prompts = make_prompts(tokenizer, asked, cases, params)
    whole = [[*prompt.prefix, *tail] for prompt in prompts for tail in prompt.responses]
    answers = [ChatForm.of(tokenizer).answer_ids(tokenizer, answer) for answer in asked.answers]

    def shared() -> None:
        rate_cases(model, tokenizer, asked, cases, params)

    def together() -> None:
        score_answers(model, prompts, answers)

    def apart() -> None:
        score_answers(model, [Prompt([], whole)], answers)

    lengths: list[int] = []

    def generate(most: int = NEW_TOKENS) -> None:
        for ids in whole:
            made = model.generate(
                torch.tensor([ids]),
                max_new_tokens=most,
                do_sample=False,
                pad_token_id=tokenizer.eos_token_id,
            )
            lengths.append(made.shape[1] - len(ids))

    def generate_few() -> None:
        generate(4)

    shared()  # warm
    rated, grouped, ungrouped, generated, few = interleaved(
        1 if quick else 3, shared, together, apart, generate, generate_few
    )
    return Result(
        {
            "vs_generate": Figure(generated / rated, 6.0, "higher"),
            "prefix_saving": Figure(ungrouped / grouped, 1.2, "higher"),
        },
        {
            "rows": len(cases),
            "rows_per_second": len(cases) / rated,
            "generate_rows_per_second": len(cases) / generated,
            "vs_generate_4_tokens": few / rated,
            "mean_new_tokens": sum(lengths[: len(whole)]) / len(whole),
            "prompt_tokens": sum(map(len, whole)),
            "backbone": notes[0],
        },
    )


if __name__ == "__main__":
    main("rater", measure)
