"""Checkpoints appear whole or not at all; the last few and the best stay."""

import os
import shutil
import stat
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_networks import FEATURE_DIM, IMAGE_SIZE, tiny_batch, tiny_networks, tiny_step
from torch.testing import assert_close

import m2d.training.saving as saving
from m2d.errors import CheckpointError, TrainingError
from m2d.models.checkpoint import CheckpointInfo, hold_checkpoint, load_checkpoint, read_info
from m2d.training.saving import (
    CheckpointKeeper,
    Snapshot,
    complete_checkpoints,
    load_training_state,
    read_best,
    take_snapshot,
    write_snapshot,
)
from m2d.training.step import JointStep


def snapshot_of(step: JointStep, number: int) -> Snapshot:
    info = CheckpointInfo(
        step=number, stage="joint", image_size=IMAGE_SIZE, feature_extractor="tiny", feature_dim=FEATURE_DIM,
        num_patches=4, conditioning={"context_dim": 16, "feature_tokens": 2}, config={},
    )  # fmt: skip
    state = step.state_dict() | {"position": {"step": number}}
    return take_snapshot(info, step.networks, state, {"val/psnr_db": 20.0})


def save(keeper: CheckpointKeeper, step: JointStep, number: int, score: float) -> list[int]:
    """Save one and wait for it; the steps of all complete ones."""
    keeper.save(snapshot_of(step, number), score)
    keeper.wait()
    return [int(path.name.removeprefix("step_")) for path in complete_checkpoints(keeper.directory)]


@pytest.fixture(scope="module")
def step() -> JointStep:
    made = tiny_step(tiny_networks(discriminator=True))
    made([tiny_batch()], 0)
    return made


def test_the_last_ones_and_the_best_are_kept(step: JointStep, tmp_path: Path) -> None:
    keeper = CheckpointKeeper(tmp_path, keep_last=2)
    for number, score in enumerate([0.9, 0.1, 0.5, 0.4], start=1):
        keeper.save(snapshot_of(step, number), score)
    assert save(keeper, step, 5, 0.3) == [2, 4, 5]
    assert read_best(tmp_path) == ("step_00000002", 0.1)
    assert (tmp_path / "best").resolve().name == "step_00000002"


def test_a_checkpoint_that_is_being_read_goes_after_the_next_save(step: JointStep, tmp_path: Path) -> None:
    """A generation holds what `best` meant when it began, and `best` moves on."""
    keeper = CheckpointKeeper(tmp_path, keep_last=1)
    assert save(keeper, step, 1, 0.5) == [1]
    with hold_checkpoint(str(tmp_path / "best")) as held:
        assert save(keeper, step, 2, 0.4) == [1, 2]
        assert load_checkpoint(held).step == 1
        assert load_checkpoint(tmp_path / "best").step == 2
    assert save(keeper, step, 3, 0.3) == [3]


def test_a_snapshot_does_not_follow_the_training_that_goes_on(step: JointStep, tmp_path: Path) -> None:
    snapshot = snapshot_of(step, 1)
    before = snapshot.state["networks"]["denoiser"]["unet.conv_in.weight"].clone()
    step([tiny_batch(seed=5)], 1)
    assert torch.equal(snapshot.state["networks"]["denoiser"]["unet.conv_in.weight"], before)
    assert not torch.equal(step.networks.denoiser.unet.conv_in.weight, before)


def test_the_training_state_comes_back_as_it_was(step: JointStep, tmp_path: Path) -> None:
    write_snapshot(snapshot_of(step, 7), tmp_path / "step_00000007")
    fresh = tiny_step(tiny_networks(discriminator=True))
    with pytest.raises(CheckpointError, match="holds no training state"):
        load_training_state(tmp_path, fresh.state_dict())
    state, document = load_training_state(tmp_path / "step_00000007", fresh.state_dict())
    fresh.load_state_dict(state)
    assert document["position"] == {"step": 7}
    assert document["metrics"] == {"val/psnr_db": 20.0}
    expected, found = step.state_dict(), fresh.state_dict()
    for optimizer in (*expected["optimizers"].values(), *found["optimizers"].values()):
        optimizer.pop("param_groups")  # settings of the run, not of its past
    assert_close(found, expected, rtol=0, atol=0)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 32 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_disk_that_is_full_costs_the_checkpoint_that_did_not_fit_and_nothing_else(
    step: JointStep, small_disk: Path
) -> None:
    keeper = CheckpointKeeper(small_disk, keep_last=9)
    save(keeper, step, 1, 0.5)
    size = sum(path.stat().st_size for path in (small_disk / "step_00000001").rglob("*") if path.is_file())
    (small_disk / "others").write_bytes(bytes(32 * 2**20 - size * 3 // 2))
    before = load_training_state(small_disk / "step_00000001", step.state_dict())
    keeper.save(snapshot_of(step, 2), 0.4)
    with pytest.raises(TrainingError, match=r"could not be written to .*No space left on device"):
        keeper.wait()
    assert complete_checkpoints(small_disk) == [small_disk / "step_00000001"]
    assert read_best(small_disk) == ("step_00000001", 0.5)
    assert_close(load_training_state(small_disk / "step_00000001", step.state_dict()), before, rtol=0, atol=0)
    assert not list(small_disk.glob(".*partial")), "what did not fit takes room"
    (small_disk / "others").unlink()
    keeper.save(snapshot_of(step, 2), 0.4)
    assert keeper.wait() == small_disk / "step_00000002"


def test_a_write_that_fails_leaves_the_checkpoint_before_it(
    step: JointStep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeper = CheckpointKeeper(tmp_path, keep_last=2)
    save(keeper, step, 1, 0.5)

    def full_disk(tensors: object, path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving, "save_tensors", full_disk)
    keeper.save(snapshot_of(step, 2), 0.4)
    with pytest.raises(TrainingError, match="No space left on device"):
        keeper.wait()
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step_00000001"]


def test_what_a_crash_left_half_written_is_no_checkpoint_and_is_written_anew(step: JointStep, tmp_path: Path) -> None:
    (tmp_path / ".step_00000003.partial" / "training").mkdir(parents=True)
    (tmp_path / "step_00000003").mkdir()
    assert complete_checkpoints(tmp_path) == []
    write_snapshot(snapshot_of(step, 3), tmp_path / "step_00000003")
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step_00000003"]
    assert not list(tmp_path.glob(".*partial"))


def test_a_whole_checkpoint_is_never_replaced(step: JointStep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between its removal and the renaming of the new one, a crash would cost both."""
    directory = tmp_path / "step_00000003"
    write_snapshot(snapshot_of(step, 3), directory)

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "rename", crash)
    with suppress(KeyboardInterrupt):
        write_snapshot(snapshot_of(step, 3), directory)
    assert complete_checkpoints(tmp_path) == [directory]


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(
    step: JointStep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files and folders before the list of them, the list before the name, the name before older ones are deleted."""
    made, synced = tmp_path / "step_00000003", list[str]()

    def fsync(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        listed = any(path.glob("complete.json")) or (path.parent / "complete.json").exists()
        synced.append("the name" if path == tmp_path and made.exists() else "the list" if listed else path.name)

    monkeypatch.setattr(os, "fsync", fsync)
    write_snapshot(snapshot_of(step, 3), made)
    contents = [path.name for path in made.rglob("*") if path.name != "complete.json"]
    hidden, marker = synced[len(contents)], synced[len(contents) + 1]
    assert sorted(synced[: len(contents)]) == sorted(contents)
    assert hidden.startswith(".step_00000003.")
    assert marker.startswith(".complete.json.")
    assert synced[len(contents) + 2 :] == ["the list", "the name"]


def test_a_folder_that_stays_is_no_checkpoint_and_goes_with_the_next_one(
    step: JointStep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS keeps a deleted file that is open, as .nfs0001, and so its folder."""
    remove = shutil.rmtree
    keeper = CheckpointKeeper(tmp_path, keep_last=1)
    (tmp_path / "step_00000001").mkdir()  # half of a deletion
    monkeypatch.setattr(shutil, "rmtree", lambda path, **_: None)
    for number in (1, 2):
        save(keeper, step, number, 1 / number)
    assert [path.name for path in tmp_path.glob("step_*")] == ["step_00000002"]
    assert len(list(tmp_path.glob(".step_00000001.*"))) == 2
    monkeypatch.setattr(shutil, "rmtree", remove)
    save(keeper, step, 3, 0.1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "best.json", "step_00000003"]


def test_no_links_and_an_empty_record_of_the_best_cost_no_checkpoint(
    step: JointStep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "symlink", refuse)
    monkeypatch.setattr(Path, "symlink_to", refuse)
    keeper = CheckpointKeeper(tmp_path, keep_last=1)
    for number, perceptual in ((1, 0.1), (2, 0.5)):
        keeper.save(replace(snapshot_of(step, number), metrics={"val/perceptual": perceptual}), perceptual)
        keeper.wait()
    (tmp_path / "best.json").write_text("")  # as a power cut leaves it
    assert read_best(tmp_path) == ("step_00000001", 0.1)
    save(keeper, step, 3, 0.3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.json", "step_00000001", "step_00000003"]
    assert read_info(tmp_path / "best").step == 1


def test_every_file_follows_the_umask(step: JointStep, tmp_path: Path) -> None:
    before = os.umask(0o002)
    try:
        write_snapshot(snapshot_of(step, 3), tmp_path / "step_00000003")
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*") if path.is_file()}
    assert modes == {0o664}


def test_a_refusal_that_is_not_of_a_full_disk_does_not_ask_for_room(step: JointStep, tmp_path: Path) -> None:
    keeper = CheckpointKeeper(tmp_path / "checkpoints", keep_last=1)
    (tmp_path / "checkpoints").rmdir()
    (tmp_path / "checkpoints").touch()
    keeper.save(snapshot_of(step, 1), 0.5)
    with pytest.raises(TrainingError, match="Not a directory") as refusal:
        keeper.wait()
    assert "make room" not in str(refusal.value)


def test_a_training_state_that_cannot_be_read_is_refused_in_one_line(step: JointStep, tmp_path: Path) -> None:
    write_snapshot(snapshot_of(step, 3), tmp_path / "step_00000003")
    for name in ("counters.safetensors", "state.json"):
        file = tmp_path / "step_00000003" / "training" / name
        file.write_bytes(bytes(file.stat().st_size))  # what some file systems leave of what was not on the disk
        with pytest.raises(CheckpointError, match=r"cannot be resumed from [^\n]*$"):
            load_training_state(tmp_path / "step_00000003", step.state_dict())


def test_a_crash_between_the_record_of_the_best_and_its_link_is_made_good(step: JointStep, tmp_path: Path) -> None:
    keeper = CheckpointKeeper(tmp_path, keep_last=1)
    for number, score in ((1, 0.5), (2, 0.1)):
        save(keeper, step, number, score)
    (tmp_path / "best").unlink()
    (tmp_path / "best").symlink_to("step_00000001")  # deleted by now
    save(keeper, step, 3, 0.9)
    assert (tmp_path / "best").resolve() == tmp_path / "step_00000002"
