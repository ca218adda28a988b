"""A run of stage two is resumed from its newest checkpoint, or refused in one line that says how to go on."""

import pytest

from align.common.errors import FingerprintError
from mllm.loop.run import converted


def test_a_checkpoint_of_other_deepspeed_processes_is_refused_with_the_command_that_converts_it(tmp_path):
    (tmp_path / "latest").write_text("global_step3\n")
    assert not converted(tmp_path, {"processes": 2}, 2) and not converted(tmp_path, {}, 2)
    with pytest.raises(FingerprintError) as refused:
        converted(tmp_path, {"processes": 2}, 1)
    said, state = str(refused.value), tmp_path / "global_step3"
    assert refused.value.exit_code == 5 and "\n" not in said and "processes: 2 there, 1 now" in said
    assert f"ds_to_universal --inject_missing_state --input_folder {state} --output_folder {state}_universal" in said
    (tmp_path / "latest_universal").write_text("global_step3_universal")  # which the command leaves behind
    assert converted(tmp_path, {"processes": 2}, 1)
