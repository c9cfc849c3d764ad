"""What the folder of a run says of it."""

from pathlib import Path

import pytest

from megatron_rl.config.errors import SettingsError
from megatron_rl.config.settings import Settings
from megatron_rl.train.folder import REINFORCEMENT, SUPERVISED_RUN, begin, require_fresh, require_kind


def test_a_run_is_gone_on_with_as_what_it_is(tmp_path: Path) -> None:
    settings = Settings.model_validate({"policy": {"config": tmp_path}, "run": {"directory": tmp_path / "run"}})
    for kind in (REINFORCEMENT, SUPERVISED_RUN):
        require_kind(settings, kind)  # nothing is there
    begin(settings, SUPERVISED_RUN)
    require_kind(settings, SUPERVISED_RUN)
    with pytest.raises(
        SettingsError, match=r"begun by megatron-rl sft, not by train\. Go on with it by `megatron-rl sft CONFIG"
    ):
        require_kind(settings, REINFORCEMENT)
    with pytest.raises(SettingsError, match="a run is there already"):
        require_fresh(settings)
    begin(settings, REINFORCEMENT)
    with pytest.raises(
        SettingsError, match=r"by megatron-rl train, not by sft\. Go on with it by `megatron-rl train --resume /"
    ):
        require_kind(settings, SUPERVISED_RUN)
    (settings.run.directory / "kind").unlink()  # as runs of before leave it
    require_kind(settings, SUPERVISED_RUN)
