"""Zero-shot evaluation: metrics against loops, features from files, their cache, several processes."""

from __future__ import annotations

import os
import pickle
import signal
from pathlib import Path

import numpy as np
import processes
import pytest
import small_models
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.fsdp import fully_shard

from bt_adapter.data import preprocess, read_video, write_video
from bt_adapter.data.clips import Clip, Member
from bt_adapter.data.workers import worker_context
from bt_adapter.errors import CommandError
from bt_adapter.eval import features as features_module
from bt_adapter.eval.cache import FeatureCache, identity
from bt_adapter.eval.features import ClipFrames, Look, embed, extract
from bt_adapter.eval.ranking import dual_softmax
from bt_adapter.eval.recognition import class_vectors, read_templates
from bt_adapter.eval.recognition import figures as recognised
from bt_adapter.eval.retrieval import figures, quick, score
from bt_adapter.eval.stack import fingerprint
from bt_adapter.training.processes import Processes

WORDS = "abcd"
ABOUT = {"model": "small"}


def one_hot(texts: list[str]) -> torch.Tensor:
    return torch.eye(len(WORDS))[[WORDS.index(text) for text in texts]] * 3


def place(own: float, wrong: list[float]) -> tuple[int, float]:
    """The place of the right answer before its equals, and its mean place over all orders of equal scores."""
    above, equal = sum(value > own for value in wrong), sum(value == own for value in wrong)
    return 1 + above, 1 + above + equal / 2


@given(st.data())
def test_both_ways_equal_brute_force(data):
    """Few levels give ties; few words give captions said twice, of one video or of several."""
    captions = data.draw(st.lists(st.lists(st.sampled_from(WORDS), min_size=1, max_size=4), min_size=1, max_size=6))
    videos = len(captions)
    levels = data.draw(st.lists(st.integers(0, 2), min_size=4 * videos, max_size=4 * videos))
    vectors = torch.tensor(levels, dtype=torch.float32).view(videos, 4)
    scores = score(vectors, captions, one_hot)
    said = [(WORDS.index(text), video) for video, texts in enumerate(captions) for text in texts]
    table = vectors.numpy()
    to_video = [place(table[v, t], [table[w, t] for w in range(videos) if w != v]) for t, v in said]
    to_text = [
        place(max(table[v, t] for t, w in said if w == v), [table[v, t] for t, w in said if w != v])
        for v in range(videos)
    ]
    for found, places in zip(scores.both_ways(), (to_video, to_text), strict=True):
        assert found.queries == len(places)
        for one, expected in zip((found, found.tie_corrected), zip(*places, strict=True), strict=True):
            assert one.mean_rank == pytest.approx(np.mean(expected))
            assert one.median_rank == pytest.approx(np.median(expected))
            for k, share in ((1, one.r1), (5, one.r5), (10, one.r10)):
                assert share == pytest.approx(np.mean(np.array(expected) <= k))
    texts_of = {text: {v for t, v in said if t == text} for text, _ in said}
    assert scores.shared() == sum(len(of) > 1 for of in texts_of.values())


def test_dual_softmax_competes_over_all_queries():
    vectors = torch.rand(5, 4, generator=torch.Generator().manual_seed(0))
    captions = [["a"], ["b", "a"], ["c"], ["d"], ["a"]]
    scores = score(vectors, captions, one_hot)
    queries = vectors[:, [0, 1, 0, 2, 3, 0]].T  # of captions, in their order
    own = torch.tensor([0, 1, 1, 2, 3, 4])[:, None] == torch.arange(5)
    to_video, to_text = scores.both_ways(0.05)
    for found, matrix, right in ((to_video, queries, own), (to_text, queries.T, own.T)):
        matrix = dual_softmax(matrix, 0.05)
        places = [place(float(row[r].max()), row[~r].tolist()) for row, r in zip(matrix, right, strict=True)]
        strict, corrected = zip(*places, strict=True)
        assert found.mean_rank == pytest.approx(np.mean(strict))
        assert found.tie_corrected.mean_rank == pytest.approx(np.mean(corrected))
    assert scores.both_ways(0.05) != scores.both_ways()


@pytest.fixture(scope="module")
def model():
    return small_models.shake(small_models.make())


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Eight clips of noise, 5 to 12 frames, some smaller than others."""
    folder = tmp_path_factory.mktemp("clips")
    for number in range(8):
        generator = torch.Generator().manual_seed(number)
        frames = torch.randint(256, (5 + number, 3, 24 + 2 * number, 32), dtype=torch.uint8, generator=generator)
        write_video(folder / f"{number}.mp4", frames)
    return folder


@pytest.fixture
def clips(folder) -> list[Clip]:
    return [Clip(f"clip {number}", str(folder / f"{number}.mp4"), (WORDS[number % 4],)) for number in range(8)]


@pytest.fixture
def decoded(monkeypatch) -> list[str]:
    """What was decoded, by this process."""
    names: list[str] = []
    read = ClipFrames._read

    def counted(self, clip):
        names.append(os.path.basename(clip.source))
        return read(self, clip)

    monkeypatch.setattr(ClipFrames, "_read", counted)
    return names


def run(model, clips, cache=None, frames=4, **options):
    return extract(model, clips, Look(frames), batch=2, workers=0, cache=cache, **options)


def pixels(clip: Clip, frames: int, sampling: str = "middle") -> torch.Tensor:
    return preprocess(read_video(clip.source, frames, sampling, repeat=True).frames, 16)


def test_vectors_are_the_models(model, clips):
    found = run(model, clips)
    assert found.kept == list(range(8)) and not found.failed and found.computed == 8
    with torch.no_grad():
        expected = model(torch.stack([pixels(clip, 4) for clip in clips])).video_embeds
    torch.testing.assert_close(found.vectors, F.normalize(expected, dim=-1))


def test_without_the_branch_it_is_the_frame_mean(model, clips):
    with torch.no_grad():
        means = torch.stack([model.image_embeds(pixels(clip, 4)).mean(0) for clip in clips])
    torch.testing.assert_close(run(model, clips, branch=False).vectors, F.normalize(means, dim=-1))


def test_views_are_interleaved_and_averaged(model, clips):
    found = extract(model, clips[3:4], Look(3, "reference", 2), batch=2, workers=0)
    frames = pixels(clips[3], 6, "reference")
    with torch.no_grad():
        views = [F.normalize(model(frames[view::2][None]).video_embeds, dim=-1) for view in range(2)]
    torch.testing.assert_close(found.vectors, (views[0] + views[1]) / 2)


def test_worker_processes_change_nothing(model, clips):
    assert torch.equal(extract(model, clips, Look(4), batch=2, workers=2).vectors, run(model, clips).vectors)


def test_a_part_of_a_file_and_a_file_in_a_shard(model, clips, tmp_path):
    content = Path(clips[5].source).read_bytes()
    (tmp_path / "shard.tar").write_bytes(b"x" * 100 + content)
    member = Clip("member", Member(str(tmp_path / "shard.tar"), 100, len(content), "5.mp4"))
    part = Clip("part", clips[5].source, start=0.5)
    found = run(model, [clips[5], member, part]).vectors
    torch.testing.assert_close(found[0], found[1])
    assert not torch.allclose(found[0], found[2])
    assert len({identity(clip) for clip in (clips[5], member, part)}) == 3


def test_one_video_twice_is_embedded_once(model, clips, decoded):
    twice = Clip("again", clips[0].source)
    found = run(model, [*clips[:3], twice])
    assert len(decoded) == 3 and torch.equal(found.vectors[0], found.vectors[3])


def test_what_processes_send_one_another_is_as_large_as_its_features(model, clips, monkeypatch):
    sizes = []

    def gather(self, value):
        sizes.append(len(pickle.dumps(value)))
        return [pickle.loads(pickle.dumps(value))]

    monkeypatch.setattr(Processes, "gather", gather)
    extract(model, clips[:1], Look(4), batch=8, workers=0)
    found = extract(model, clips, Look(4), batch=8, workers=0)
    assert sizes[3] < sizes[1] + 7 * (4 * found.vectors.shape[1] + 50)


def test_processes_with_different_clips_are_told(model, clips, monkeypatch):
    others = []
    monkeypatch.setattr(Processes, "gather", lambda self, value: others.append(value) or [value])
    run(model, clips[:1])
    monkeypatch.setattr(Processes, "gather", lambda self, value: [value, others[0]])
    with pytest.raises(CommandError, match="different clips.*2 clips of 2 videos, 1 clips of 1 videos"):
        run(model, clips[:2])
    with pytest.raises(CommandError, match="another order"):
        run(model, clips[1:2])


def test_the_second_run_decodes_nothing(model, clips, decoded, tmp_path):
    first = run(model, clips, FeatureCache(tmp_path, ABOUT))
    assert len(decoded) == 8
    second = run(model, clips, FeatureCache(tmp_path, ABOUT))
    assert len(decoded) == 8 and second.computed == 0
    assert torch.equal(first.vectors, second.vectors)


def test_stale_features_are_not_used(model, clips, decoded, tmp_path):
    own = tmp_path / "own.mp4"
    own.write_bytes(Path(clips[0].source).read_bytes())
    changing = [Clip("changing", str(own))]
    before = run(model, changing, FeatureCache(tmp_path, ABOUT)).vectors
    own.write_bytes(Path(clips[1].source).read_bytes())
    after = run(model, changing, FeatureCache(tmp_path, ABOUT)).vectors
    assert len(decoded) == 2 and not torch.equal(before, after)
    run(model, changing, FeatureCache(tmp_path, {"model": "another"}))
    assert len(decoded) == 3


def test_a_damaged_file_of_features_is_told_and_computed_again(model, clips, tmp_path):
    first = run(model, clips, FeatureCache(tmp_path, ABOUT))
    victim = next(tmp_path.glob("*/*.safetensors"))
    victim.write_bytes(victim.read_bytes()[:-40])
    cache = FeatureCache(tmp_path, ABOUT)
    second = run(model, clips, cache)
    assert cache.damaged == [victim] and second.computed == 2
    assert torch.equal(first.vectors, second.vectors)


def die_in_the_third_batch(clips, folder) -> None:
    model, batches = small_models.shake(small_models.make()), 0

    def counted(*arguments):
        nonlocal batches
        batches += 1
        if batches == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return embed(*arguments)

    features_module.embed = counted
    run(model, clips, FeatureCache(folder, ABOUT))


def test_a_killed_run_goes_on(model, clips, decoded, tmp_path):
    child = worker_context().Process(target=die_in_the_third_batch, args=(clips, tmp_path))
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    (tmp_path / next(iter(os.listdir(tmp_path))) / "cut.safetensors.writing").write_bytes(b"half a file")
    found = run(model, clips, FeatureCache(tmp_path, ABOUT))
    assert decoded == [f"{number}.mp4" for number in range(4, 8)] and found.computed == 4
    assert torch.equal(found.vectors, run(model, clips).vectors)


def test_broken_videos_are_left_out_with_their_reasons(model, clips, tmp_path):
    junk, cut = tmp_path / "junk.mp4", tmp_path / "cut.webm"
    junk.write_bytes(b"no video " * 20)
    write_video(cut, torch.zeros(40, 3, 32, 32, dtype=torch.uint8).random_(generator=torch.Generator().manual_seed(0)))
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    sources = [Clip("junk", str(junk)), clips[0], Clip("gone", str(tmp_path / "gone.mp4")), Clip("cut", str(cut))]
    found = run(model, sources)
    assert found.kept == [1, 3] and found.truncated == [3] and len(found.vectors) == 2
    assert "junk.mp4" in found.failed[0] and "No such file" in found.failed[2]
    with pytest.raises(CommandError, match="none of 2 clips can be used; the first one: .*junk.mp4"):
        run(model, [sources[0], sources[2]])


def test_more_frames_than_the_branch_was_trained_with(model, clips):
    model.trained_steps = 3
    try:
        found = run(model, clips, frames=9).vectors
        published = extract(model, clips, Look(9, long="published"), batch=2, workers=0).vectors
    finally:
        model.trained_steps = None
    with torch.no_grad():
        for number, clip in enumerate(clips):
            frames = pixels(clip, 9)[None]
            model.trained_steps = 3
            expected = F.normalize(model(frames).video_embeds[0], dim=-1)
            model.trained_steps = None
            torch.testing.assert_close(found[number], expected, rtol=1e-4, atol=1e-5)
    assert (found - published).abs().max() > 1e-3
    assert len(run(model, clips, frames=9, branch=False).vectors) == 8


def test_features_that_are_no_numbers_are_not_stored(clips, tmp_path):
    model = small_models.make()
    model.branch.time.data.fill_(torch.nan)
    with pytest.raises(CommandError, match="not finite"):
        run(model, clips, FeatureCache(tmp_path, ABOUT))
    assert not list(tmp_path.glob("*/*.safetensors"))


def test_fingerprints(model):
    other = small_models.shake(small_models.make())
    assert fingerprint(model) == fingerprint(other)
    other.recompute = "mlp"  # a choice of this run, which changes no embedding
    assert fingerprint(model) == fingerprint(other)
    with torch.no_grad():
        other.branch.cls_token[0] += 1e-3
    assert fingerprint(model) != fingerprint(other)
    assert fingerprint(model, branch=False) == fingerprint(other, branch=False) != fingerprint(other)


class Words(torch.nn.Module):
    """A text encoder of four words."""

    def forward(self, captions):
        return torch.cat([one_hot(captions), torch.zeros(len(captions), 20)], 1)

    def too_long(self, captions):
        return []


def test_quick_is_the_same_without_a_cache_and_names_what_it_leaves_out(model, clips, tmp_path):
    junk = tmp_path / "junk.mp4"
    junk.write_bytes(b"no video " * 20)
    clips.insert(2, Clip("junk", str(junk), ("a",)))
    model.train()
    state = torch.get_rng_state()
    to_video, to_text, failed, damaged = quick(model, Words(), clips, frames=4, batch=2)
    assert list(failed) == ["junk"] and "junk.mp4" in failed["junk"] and damaged == []
    assert model.training and torch.equal(state, torch.get_rng_state())
    model.eval()
    features = run(model, clips)
    captions = [clips[number].captions for number in features.kept]
    expected = figures(score(features.vectors, captions, Words()), captions, Words(), None)
    assert expected["text_to_video"] == to_video.to_dict() and expected["video_to_text"] == to_text.to_dict()
    assert expected["captions"] == 8 and expected["captions_of_several_videos"] == 4


def in_processes(rank, world, folder, out) -> None:
    model = small_models.shake(small_models.make())
    clips = [Clip(str(number), f"{folder}/{number}.mp4", (WORDS[number % 4],)) for number in range(8)]
    clips.append(Clip("gone", f"{folder}/gone.mp4", ("a",)))
    found = run(model, clips, FeatureCache(Path(out), ABOUT))
    pair = quick(model, Words(), clips, 4, batch=2)
    training = torch.nn.Sequential(model)
    fully_shard(training, ignored_params=set(model.tower.parameters()))
    training.unshard()
    assert quick(model, Words(), clips, 4, batch=2) == pair
    torch.save((found, pair), f"{out}/rank{rank}.pt")


def test_two_processes_equal_one(gloo, model, folder, clips, tmp_path):
    processes.run(tmp_path / "gloo", 2, in_processes, str(folder), str(tmp_path))
    alone = run(model, clips)
    pair = quick(model, Words(), clips, 4, batch=2)
    for rank in range(2):
        found, both = torch.load(tmp_path / f"rank{rank}.pt", weights_only=False)
        torch.testing.assert_close(found.vectors, alone.vectors)
        assert found.kept == list(range(8)) and list(found.failed) == [8] and found.computed == 8
        assert both[:2] == pair[:2] and list(both.failed) == ["gone"]
    assert run(model, clips, FeatureCache(tmp_path, ABOUT)).computed == 0


@given(st.integers(0, 2**31), st.integers(1, 9), st.integers(2, 7))
def test_recognition_equals_brute_force(seed, count, classes):
    random = np.random.default_rng(seed)
    names = [f"class {number}" for number in range(classes)]
    table = random.integers(0, 3, (count, classes)).astype(np.float32)
    labels = random.integers(0, classes, count)
    clips = [Clip(str(number), "", label=int(label)) for number, label in enumerate(labels)]
    features = features_module.Features(torch.from_numpy(table), list(range(count)), {}, [], count)

    def encode(texts):
        return torch.eye(classes)[[names.index(text) for text in texts]]

    found = recognised(features, clips, names, ["{}"], encode)
    places = [place(row[label], np.delete(row, label).tolist()) for row, label in zip(table, labels, strict=True)]
    strict, corrected = np.array(places).T
    hits = strict <= 1
    for one, expected in ((found, strict), (found["tie_corrected"], corrected)):
        assert one["top1"] == pytest.approx(np.mean(expected <= 1))
        assert one["top5"] == pytest.approx(np.mean(expected <= 5))
    each = {names[label]: np.mean(hits[labels == label]) for label in sorted(set(labels))}
    assert found["by_class"] == pytest.approx(each)
    assert found["mean_class_accuracy"] == pytest.approx(np.mean(list(each.values())))


def test_templates_are_averaged(tmp_path):
    file = tmp_path / "templates.txt"
    file.write_text("a {}\n\na video of {}.\n")
    templates = read_templates(file)
    assert templates == ("a {}", "a video of {}.") and read_templates(None) == ("{}",)
    vectors = {"a cat": [3.0, 0], "a video of cat.": [0, 0.5], "a dog": [1, 0], "a video of dog.": [5, 0]}
    found = class_vectors(["cat", "dog"], templates, lambda texts: torch.tensor([vectors[text] for text in texts]))
    torch.testing.assert_close(found, torch.tensor([[0.5**0.5, 0.5**0.5], [1, 0]]))


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot be read"), ("a photo\n", "each line must hold {} once"), ("\n", "no template")],
)
def test_bad_templates(tmp_path, content, message):
    file = tmp_path / "templates.txt"
    if content is not None:
        file.write_text(content)
    with pytest.raises(CommandError, match=message):
        read_templates(file)
