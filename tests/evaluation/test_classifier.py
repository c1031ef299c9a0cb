"""nearkin.load: what a prediction says, computed again from the files of the run."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file, save_file
from tests.digests import as_saved
from tests.evaluation.evidence_run import some_digits, trained, write_digits
from tests.pictures import write_classes, write_image

import nearkin
from nearkin.data.dataset import load_dataset
from nearkin.errors import ConfigError, DataError, ModelError
from nearkin.evaluation.model import load_bundle

KIN = "kin.safetensors"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("classifier") / "run")


@pytest.fixture(scope="module")
def model(run):
    return nearkin.load(run)


@pytest.fixture(scope="module")
def outputs(run):
    """Embeddings and logits of the first test images, from the network alone."""
    network = load_bundle(run, torch.device("cpu")).network
    pixels = torch.from_numpy(np.stack(some_digits(30)[0])).permute(0, 3, 1, 2)
    with torch.inference_mode():
        return network(pixels)


def without_kin(run, to):
    shutil.copytree(run, to)
    (to / KIN).unlink()
    return to


def test_the_probabilities_are_scaled_by_the_stored_temperature(run, model, outputs):
    temperature = json.loads((run / "model.json").read_text())["temperature"]
    assert abs(temperature - 1) > 0.01, "otherwise this test tells nothing"
    wanted = (outputs.logits / temperature).softmax(1)
    for one, row in zip(model(some_digits(30)[0]), wanted, strict=True):
        assert one.probability == pytest.approx(float(row.max()), abs=1e-5)
        assert one.label == one.guess == one.top5[0][0] == str(int(row.argmax()))
        assert one.set is None
        values = [value for _, value in one.top5]
        assert values == pytest.approx(sorted(row.tolist(), reverse=True)[:5], abs=1e-5)


def test_the_kin_are_the_nearest_rows_of_the_file(run, model, outputs):
    kin = load_file(run / KIN)
    names = json.loads(kin["names"].tobytes())
    keys = kin["embeddings"].astype(np.float64)
    assert len(names) == 200
    for one, query in zip(model(some_digits(30)[0]), outputs.embedding.numpy(), strict=True):
        cosines = keys @ query / np.linalg.norm(query)
        order = np.argsort(-cosines)
        assert [near.path for near in one.kin] == [names[k] for k in order[:3]]
        assert [near.label for near in one.kin] == [str(kin["labels"][k]) for k in order[:3]]
        assert [near.similarity for near in one.kin] == pytest.approx(cosines[order[:3]], abs=1e-4)
        far = 1 - cosines[order[:5]].mean()
        share = (kin["typical"] < far).mean()
        assert one.unlike == pytest.approx(share, abs=1.01 / len(kin["typical"]))


def test_the_validation_images_are_as_unlike_as_their_rank(run):
    images = load_dataset("digits", images_per_class=20).splits["val"].images
    arrays = [images.read(row).permute(1, 2, 0).numpy() for row in range(len(images))]
    found = nearkin.load(run, reject=0.1)(arrays)
    ranks = sorted(round(one.unlike * len(arrays)) for one in found)
    assert np.abs(np.array(ranks) - np.arange(len(arrays))).max() <= 2  # ties and rounding
    rejected = [one for one in found if one.label == "unknown"]
    assert len(rejected) == pytest.approx(0.1 * len(arrays), abs=2)
    assert all(one.unlike >= 0.9 - 1e-6 for one in rejected)
    assert all(one.guess == one.top5[0][0] != "unknown" for one in rejected)
    assert all(one.label == one.guess for one in found if one.label != "unknown")


def test_noise_is_farther_than_digits(run):
    noise = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 1), dtype=np.uint8)
    model = nearkin.load(run, kin=0)
    shares = [[one.unlike for one in model(list(part))] for part in (noise, some_digits(20)[0])]
    assert np.mean(shares[0]) > np.mean(shares[1]) + 0.2
    assert model(noise[0]).kin == ()


def test_one_image_in_every_form(model, tmp_path):
    array = some_digits(1)[0][0]
    grey, path = Image.fromarray(array[..., 0]), tmp_path / "new.png"
    grey.save(path)
    forms = [
        path,
        str(path),
        grey,
        array,
        array[..., 0],
        np.repeat(array, 3, 2),
        grey.convert("RGB"),
    ]
    found = [model(form) for form in forms]
    assert all(isinstance(one, nearkin.Prediction) for one in found)
    assert len({(one.label, one.kin, one.top5) for one in found}) == 1
    assert [one.path for one in found] == [str(path)] * 2 + ["image 0"] * 5
    listed = model([tmp_path, array, str(tmp_path / "*.png")])
    assert [one.path for one in listed] == [str(path), "image 1", str(path)]
    assert model([]) == []


def test_a_pillow_image_is_upright_and_on_white(tmp_path):
    """As the same image from a file."""
    write_classes(tmp_path / "photos", each=6)
    options = {"epochs": 0, "model": "test_resnet", "image_size": 16, "threads": 1, "workers": 0}
    run = nearkin.train(tmp_path / "photos", "ce", out=tmp_path / "r", batch_size=8, **options).run
    model = nearkin.load(run)
    image = Image.open(write_image(tmp_path / "plain.png", 1))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    clear = image.convert("RGBA")
    clear.putalpha(Image.fromarray(np.tile(np.uint8([0, 255]), (16, 10))))
    clear.save(tmp_path / "clear.png")
    for name in ("turned.jpg", "clear.png"):
        ours = model(Image.open(tmp_path / name))
        assert ours.top5 == model(tmp_path / name).top5
        assert ours.top5 != model(image).top5
    with pytest.raises(DataError, match=r"float64 .* 8 x 3"):
        model(np.zeros((8, 8, 3)))
    odd = model(Image.new("F", (8, 8)))
    assert "floating-point" in odd.error


@pytest.mark.parametrize(
    "odd",
    [np.zeros((3, 8, 8), np.uint8), np.zeros((0, 8, 3), np.uint8), np.zeros(8, np.uint8), 7, None],
    ids=str,
)
def test_what_is_no_image_is_refused(model, odd):
    with pytest.raises(DataError, match=r"uint8"):
        model(odd)


def test_missing_paths_and_folders(model, tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        model("nowhere.png")
    with pytest.raises(DataError, match="is a folder"):
        model(tmp_path)
    write_digits(tmp_path, 2)
    with pytest.raises(DataError, match="does not exist"):
        model(str(tmp_path / "*.png"))
    with pytest.raises(DataError, match="does not exist"):
        model([str(tmp_path / "nowhere.png")])


def test_order_is_kept_and_bad_files_have_rows(run, model, tmp_path):
    folder = write_digits(tmp_path / "many", 60)
    files = sorted(map(str, folder.iterdir()))
    files = [file for pair in zip(files, reversed(files), strict=True) for file in pair]
    (tmp_path / "bad.png").write_bytes(b"no image")
    for place in (0, 7, 63, 64, 100):
        files.insert(place, str(tmp_path / "bad.png"))
    found = list(nearkin.predict(run, files))
    assert [one.path for one in found] == files
    alone = {file: model(file) for file in set(files[1:12])}
    for one in found:
        assert (one.error is not None) == one.path.endswith("bad.png")
        if one.path in alone and one.error is None:
            assert one.label == alone[one.path].label
            assert one.kin[0].path == alone[one.path].kin[0].path
    assert len(list(nearkin.predict(run, [tmp_path / "bad.png"]))) == 1


def test_the_sets_of_the_test_split_give_the_measured_coverage(run):
    arrays, labels = some_digits()
    model = nearkin.load(run, sets=0.8)
    found = model(arrays)
    held = [label in one.set for one, label in zip(found, labels, strict=True)]
    coverage = model.coverage()
    assert coverage.images == len(arrays)
    assert coverage.share == pytest.approx(np.mean(held), abs=1e-9)
    assert coverage.classes == pytest.approx(np.mean([len(one.set) for one in found]))
    assert model.coverage() == coverage, "from the kept probabilities"
    with pytest.MonkeyPatch.context() as patch:  # two processes with the same share
        patch.setattr("nearkin.evaluation.sets.Runtime.collect", lambda _, value: [value, value])
        assert model.coverage() == coverage._replace(
            share=2 * coverage.share, classes=2 * coverage.classes
        )
    assert (run / "cache").is_dir()
    assert coverage.share == pytest.approx(0.8, abs=0.1)  # 2.5 deviations of 143 and 360 images
    scores = load_file(run / KIN)["scores"]
    for one in found:
        assert one.set[0] == one.guess
        known = [name for name, _ in one.top5 if name in one.set]
        assert list(one.set[: len(known)]) == known, "most probable first"
        ranks = [(name, 1 + (scores >= 1 - value).sum()) for name, value in one.top5[1:]]
        inside = [name for name, rank in ranks if rank / (len(scores) + 1) >= 0.2]
        assert known == [one.guess, *inside], "those with a p-value of at least 0.2"
    assert nearkin.load(run).coverage() is None


def test_without_kin_there_is_a_note_and_no_evidence(run, tmp_path):
    bare = without_kin(run, tmp_path / "bare")
    model = nearkin.load(bare)
    (note,) = model.notes
    assert KIN in note
    one = model(some_digits(1)[0][0])
    assert (one.unlike, one.kin, one.set) == (None, (), None)
    assert one.probability == pytest.approx(nearkin.load(run)(some_digits(1)[0][0]).probability)
    for option in ({"reject": 0.1}, {"sets": 0.9}):
        with pytest.raises(ModelError, match=f"--{next(iter(option))} needs {KIN}"):
            nearkin.load(bare, **option)
    assert nearkin.load(run).notes == ()
    (tmp_path / "bundle").mkdir()
    for name in ("model.json", "model.safetensors"):
        shutil.copy(run / name, tmp_path / "bundle")
    assert nearkin.load(tmp_path / "bundle")(some_digits(1)[0][0]) == one


def test_a_run_without_validation_images(run, tmp_path):
    shutil.copytree(run, tmp_path / "r")
    kin = load_file(run / KIN)
    empty = np.empty(0, np.float32)
    save_file(kin | {"typical": empty, "scores": empty}, tmp_path / "r" / KIN)
    with pytest.raises(ModelError, match="kin.safetensors is not the file that was saved"):
        nearkin.load(tmp_path / "r")
    as_saved(tmp_path / "r")
    one = nearkin.load(tmp_path / "r")(some_digits(1)[0][0])
    assert (one.unlike, len(one.kin)) == (None, 3)
    with pytest.raises(ModelError, match="--reject needs validation images"):
        nearkin.load(tmp_path / "r", reject=0.1)
    with pytest.raises(ModelError, match="--sets needs validation images"):
        nearkin.load(tmp_path / "r", sets=0.9)
    few = {"typical": kin["typical"][:9], "scores": kin["scores"][:9]}
    save_file(kin | few, tmp_path / "r" / KIN)
    as_saved(tmp_path / "r")
    notes = nearkin.load(tmp_path / "r", reject=0.01, sets=0.95).notes
    assert "farther than all of them" in notes[0]
    assert "hold every class" in notes[1]


def test_kin_of_another_model_are_refused(run, tmp_path):
    shutil.copytree(run, tmp_path / "r")
    kin = load_file(run / KIN)
    narrow = np.ascontiguousarray(kin["embeddings"][:, :5])
    save_file(kin | {"embeddings": narrow}, tmp_path / "r" / KIN)
    as_saved(tmp_path / "r")
    with pytest.raises(ModelError, match="does not fit"):
        nearkin.load(tmp_path / "r")(some_digits(1)[0][0])


def test_views_keep_the_class_of_evaluate_and_say_nothing_of_distances(run, outputs):
    arrays = some_digits(30)[0]
    found = nearkin.load(run, tta="flip")(arrays)
    network = load_bundle(run, torch.device("cpu")).network
    mirrored = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).flip(-1)
    with torch.inference_mode():
        second = network(mirrored)
    mean = (outputs.logits.softmax(1) + second.logits.softmax(1)) / 2
    assert [one.label for one in found] == [str(k) for k in mean.argmax(1).tolist()]
    assert all(one.unlike is None and len(one.kin) == 3 for one in found)
    with pytest.raises(ConfigError, match="--tta flip"):
        nearkin.load(run, tta="flip", reject=0.1)


@pytest.mark.parametrize("option", [{"reject": 0.0}, {"reject": 1.0}, {"sets": 95}, {"kin": -1}])
def test_options_out_of_range(run, option):
    with pytest.raises(ConfigError, match=f"--{next(iter(option))}"):
        nearkin.load(run, **option)


def test_embed_gives_what_the_classifier_reads(model, outputs):
    rows = model.embed(some_digits(30)[0])
    assert rows.dtype == np.float32
    assert np.allclose(rows, outputs.embedding.numpy(), atol=1e-5)
    (one,) = model.embed(some_digits(1)[0][0])
    assert np.allclose(one, rows[0], atol=1e-5)
    with pytest.raises(DataError, match="floating-point"):
        model.embed([some_digits(1)[0][0], Image.new("F", (8, 8))])


def test_embed_takes_a_path_for_one_image(model, tmp_path):
    """A str is a sequence of characters, of which "/" is a folder."""
    write_digits(tmp_path, 2)
    path = sorted(tmp_path.iterdir())[0]
    assert np.array_equal(model.embed(str(path)), model.embed([path]))
    assert np.array_equal(model.embed(path), model.embed([path]))


def test_a_class_that_is_called_unknown_is_told(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    described = json.loads((run / "model.json").read_text())
    described["spec"]["classes"][3] = "unknown"
    (tmp_path / "run" / "model.json").write_text(json.dumps(described))
    assert any("class unknown" in note for note in nearkin.load(tmp_path / "run", reject=0.5).notes)
    assert nearkin.load(tmp_path / "run").notes == ()
