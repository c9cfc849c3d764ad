"""Rules about packs and sequences."""

from collections.abc import Iterator

from megatron_rl.config.layout_map import alignment
from megatron_rl.config.rules.case import Case, Rule, problem


def pack_is_aligned(case: Case) -> Iterator[str]:
    tokens, multiple = case.settings.batch.max_tokens, alignment(case.settings).pack
    if tokens % multiple:
        down, up = tokens // multiple * multiple, -(-tokens // multiple) * multiple
        yield problem(
            f"batch.max_tokens = {tokens}",
            f"packs are cut into equal parts by layout.context = {case.layout.context}, by sequence parallelism over "
            f"layout.tensor = {case.layout.tensor} and for precision.fp8 = {case.settings.precision.fp8}: their length is a "
            f"multiple of {multiple}",
            f"Set batch.max_tokens={up}" + (f" or {down}" if down else ""),
        )


def sequence_is_aligned(case: Case) -> Iterator[str]:
    longest, multiple = case.settings.batch.max_sequence, alignment(case.settings).sequence
    if longest is not None and case.layout.context > 1 and longest % multiple:
        yield problem(
            f"batch.max_sequence = {longest} with layout.context = {case.layout.context}",
            f"context parallelism cuts every sequence into equal pieces, its padded length is a multiple of {multiple}",
            f"Set batch.max_sequence={-(-longest // multiple) * multiple}",
        )


def sequence_fits_a_pack(case: Case) -> Iterator[str]:
    batch = case.settings.batch
    if batch.max_sequence is not None and batch.max_sequence > batch.max_tokens:
        yield problem(
            f"batch.max_sequence = {batch.max_sequence} with batch.max_tokens = {batch.max_tokens}",
            "a sequence is never cut, it has to fit into one pack",
            f"Set batch.max_tokens to at least {batch.max_sequence}, or batch.max_sequence to at most {batch.max_tokens}",
        )


def sequence_fits_the_model(case: Case) -> Iterator[str]:
    longest, positions = case.settings.batch.max_sequence, case.architecture.max_positions
    if longest is not None and longest > positions:
        yield problem(
            f"batch.max_sequence = {longest}",
            f"the model knows {positions} positions (max_position_embeddings)",
            f"Set batch.max_sequence={positions} or less, or extend the model's rope_scaling in its config.json",
        )


RULES: tuple[Rule, ...] = (pack_is_aligned, sequence_is_aligned, sequence_fits_a_pack, sequence_fits_the_model)
