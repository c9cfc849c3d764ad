"""Rules about new weights on their way to servers."""

from collections.abc import Iterator

from megatron_rl.config.rules.case import Case, Rule, problem


def files_are_kept_of_files(case: Case) -> Iterator[str]:
    publish = case.settings.publish
    if publish.keep_files and publish.transport in ("broadcast", "tensor"):
        yield problem(
            f"publish.keep_files = true with publish.transport = {publish.transport}",
            "weights that travel so leave no files",
            "Set publish.transport=disk, or publish.keep_files=false",
        )


def the_folder_is_a_folder(case: Case) -> Iterator[str]:
    folder = case.settings.publish.folder
    if folder is not None and folder.exists() and not folder.is_dir():
        yield problem(f"publish.folder = {folder}", "this is a file", "Name a folder that all ranks and servers see")


def probes_fit_a_pack(case: Case) -> Iterator[str]:
    publish, batch = case.settings.publish, case.settings.batch
    longest = min(batch.max_sequence or batch.max_tokens, batch.max_tokens)
    if publish.probe and publish.probe_tokens is not None and publish.probe_tokens > longest:
        yield problem(
            f"publish.probe_tokens = {publish.probe_tokens}",
            f"the policy takes sequences of {longest} tokens at most (batch.max_sequence, batch.max_tokens)",
            f"Set publish.probe_tokens to at most {longest}",
        )


RULES: tuple[Rule, ...] = (files_are_kept_of_files, the_folder_is_a_folder, probes_fit_a_pack)
