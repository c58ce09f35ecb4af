"""Sources: what each layout holds, what is skipped, what is refused; rows in memory and on demand are the same rows."""

import gzip
import json
import struct
import tarfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_decode import png_header

from smalti.config import from_json, to_json
from smalti.data.decode import decode_picture
from smalti.data.digits import load_digits
from smalti.data.listing import held_out_by_key
from smalti.data.on_demand import PicturesOnDemand
from smalti.data.opening import open_rows
from smalti.data.rows import PicturesInMemory, to_signed_unit
from smalti.data.sources import DigitsData, FolderData, HubData, IdxData, TarData, list_pictures, source_of
from smalti.errors import UserError

FASHION_MNIST = Path(IdxData().path)


def picture(number, size=(24, 16)):
    """A PIL picture that its number tells apart from others."""
    rng = np.random.default_rng(number)
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def png(number, size=(24, 16)):
    buffer = BytesIO()
    picture(number, size).save(buffer, "PNG")
    return buffer.getvalue()


def folder_of(path, count, size=(24, 16)):
    path.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        (path / f"{i}.png").write_bytes(png(i, size))
    return path


def write_metadata(folder, rows):
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def pictures_by_content(opened):
    """Every row of both parts: the picture's bytes -> captions."""
    found = {}
    for rows in (opened.training, opened.held_out):
        if len(rows):
            read = rows.read(torch.arange(len(rows)))
            captions = rows.captions or [()] * len(rows)
            found |= {read[i].numpy().tobytes(): captions[i] for i in range(len(rows))}
    return found


def expected(number, size=(24, 16)):
    return to_signed_unit(decode_picture(png(number, size), 3)).numpy().tobytes()


@pytest.mark.parametrize(
    "config",
    [
        DigitsData(), IdxData("x"), FolderData("x", "pad", 0.2), HubData("a/b", text_column="words"), TarData("x.tar"),
    ],
)  # fmt: skip
def test_configs_survive_json(config):
    assert from_json(type(config), {k: v for k, v in to_json(config).items() if k != "kind"}) == config
    assert to_json(config)["kind"] == config.kind


def test_digits_are_the_bundled_rows():
    opened = open_rows(DigitsData(), 1, (28, 28))
    for rows, bundled in zip((opened.training, opened.held_out), load_digits(), strict=True):
        assert torch.equal(rows.images, bundled.images)
        assert torch.equal(rows.class_labels, bundled.class_labels)
    assert opened.class_names[3] == "3"
    three = opened.training.class_labels.tolist().index(3)
    assert opened.training.captions[three] == ("the digit three", "a handwritten 3")
    listing = list_pictures(DigitsData())
    assert torch.equal(decode_picture(listing.read_bytes(7, None), 1), load_digits()[0].images[7])


# --- IDX files


def idx_bytes(array, magic=None):
    magic = 0x0800 + array.ndim if magic is None else magic
    return struct.pack(f">{1 + array.ndim}I", magic, *array.shape) + array.tobytes()


def idx_folder(path, training=6, test=3, size=(8, 9)):
    path.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for part, count in (("train", training), ("t10k", test)):
        if count:
            images = rng.integers(0, 256, (count, *size), dtype=np.uint8)
            (path / f"{part}-images-idx3-ubyte").write_bytes(idx_bytes(images))
            labels = (np.arange(count) % 3).astype(np.uint8)
            (path / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx_bytes(labels)))
    return path


def test_idx_files_packed_and_not(tmp_path):
    opened = open_rows(IdxData(str(idx_folder(tmp_path))), 1, (8, 9))
    assert (len(opened.training), len(opened.held_out), opened.class_names) == (6, 3, ("0", "1", "2"))
    raw = np.frombuffer((tmp_path / "train-images-idx3-ubyte").read_bytes(), np.uint8, offset=16)
    assert np.array_equal(opened.training.images.numpy().ravel(), raw)
    assert opened.training.class_labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert opened.training.captions is None
    assert open_rows(IdxData(str(tmp_path)), 3, (16, 16)).training.shape == (3, 16, 16)


def test_idx_without_a_test_part_holds_out_some(tmp_path):
    opened = open_rows(IdxData(str(idx_folder(tmp_path, training=50, test=0))), 1, (8, 9))
    assert len(opened.training) + len(opened.held_out) == 50
    assert 0 < len(opened.held_out) < 20


def damage_length(path):
    path.write_bytes(path.read_bytes()[:-1])


def damage_magic(path):
    path.write_bytes(b"\0\0\x0d\x03" + path.read_bytes()[4:])


def damage_count(path):
    path.write_bytes(idx_bytes(np.zeros((5, 8, 9), np.uint8)))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (damage_length, "should have 448 bytes; it has 447"),
        (damage_magic, "begins with 0x00000d03; an IDX file of bytes in 3 dimensions begins with 0x00000803"),
        (damage_count, "has 5 pictures and .* 6 labels"),
        (lambda path: path.write_bytes(b"\0"), "shorter than its header"),
        (lambda path: path.unlink(), "holds no training pictures"),
        (lambda path: (path.parent / "letters-train-images-idx3-ubyte").write_bytes(b""), "several sets"),
        (lambda path: (path.parent / "t10k-labels-idx1-ubyte.gz").write_bytes(b"\x1f\x8b rubbish"), "cannot be read"),
        (lambda path: (path.parent / "t10k-labels-idx1-ubyte.gz").unlink(), "differ in their pictures' size or labels"),
    ],
)
def test_damaged_idx_files(tmp_path, damage, says):
    damage(idx_folder(tmp_path) / "train-images-idx3-ubyte")
    with pytest.raises(UserError, match=says):
        open_rows(IdxData(str(tmp_path)), 1, (8, 9))


@pytest.mark.skipif(not FASHION_MNIST.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_fashion_mnist():
    opened = open_rows(IdxData(), 1, (28, 28), needs_captions=True)
    assert (len(opened.training), len(opened.held_out)) == (60_000, 10_000)
    assert opened.class_names[9] == "ankle boot"
    assert opened.training.class_labels[0] == 9
    assert opened.training.captions[0] == ("an ankle boot", "a boot")


# --- folders


def test_metadata_with_one_or_several_captions(tmp_path):
    folder_of(tmp_path / "deep", 3)
    rows = [
        {"file_name": "deep/0.png", "text": ["a  cat\n", "a kitten"]},
        {"file_name": "deep/1.png", "text": "a dog"},
        {"file_name": "deep/2.png"},
    ]
    write_metadata(tmp_path, [*rows, {"file_name": "deep/1.png", "text": "a hound"}])
    found = pictures_by_content(open_rows(FolderData(str(tmp_path)), 3, (16, 24), needs_captions=True))
    assert found == {expected(0): ("a cat", "a kitten"), expected(1): ("a dog", "a hound"), expected(2): ()}


def test_metadata_csv_and_labels(tmp_path):
    folder_of(tmp_path, 2)
    (tmp_path / "metadata.csv").write_text('file_name,text,label\n0.png,"a cat, asleep",cats\n1.png,a dog,dogs\n')
    opened = open_rows(FolderData(str(tmp_path), held_out=0), 3, (16, 24), needs_labels=True)
    assert opened.training.captions == [("a cat, asleep",), ("a dog",)]
    assert (opened.class_names, opened.training.class_labels.tolist()) == (("cats", "dogs"), [0, 1])


def test_class_folders(tmp_path):
    for i, name in enumerate(["tabby_cat", "beagle"]):
        folder_of(tmp_path / name, 2, size=(24, 16 + i))
    (tmp_path / "beagle" / "1.txt").write_text("a beagle\nin the rain\n")
    (tmp_path / "beagle" / "notes.md").write_text("not a picture")
    opened = open_rows(FolderData(str(tmp_path), held_out=0), 3, (16, 16))
    assert opened.class_names == ("beagle", "tabby_cat")
    assert opened.training.class_labels.tolist() == [0, 0, 1, 1]
    assert opened.training.captions == [("beagle",), ("a beagle in the rain",), ("tabby cat",), ("tabby cat",)]
    assert opened.sizes.tolist() == [[17, 24], [17, 24], [16, 24], [16, 24]]


def test_pictures_alone_and_one_sub_folder_are_no_classes(tmp_path):
    folder_of(tmp_path / "holiday", 3)
    opened = open_rows(FolderData(str(tmp_path), held_out=0), 1, (16, 16))
    assert (len(opened.training), opened.class_names) == (3, ())
    assert opened.training.class_labels is opened.training.captions is None


def test_train_and_test_folders_are_the_two_parts(tmp_path):
    for part, count in (("train", 4), ("test", 2)):
        for name in ("cats", "dogs"):
            folder_of(tmp_path / part / name, count)
    opened = open_rows(FolderData(str(tmp_path)), 3, (16, 16))
    assert (len(opened.training), len(opened.held_out), opened.class_names) == (8, 4, ("cats", "dogs"))


def test_corrupt_files_are_skipped_counted_and_listed(tmp_path):
    folder_of(tmp_path, 6)
    (tmp_path / "1.png").write_bytes(png(1)[:200])
    (tmp_path / "2.png").write_bytes(b"")
    (tmp_path / "pixel.png").write_bytes(png(0, (1, 1)))
    (tmp_path / "poster.png").write_bytes(png_header(10_000, 10_000))
    (tmp_path / "text.jpg").write_text("not a picture")
    calls = []
    opened = open_rows(
        FolderData(str(tmp_path)), 3, (16, 24), progress=lambda done, total: calls.append((done, total))
    )  # fmt: skip
    reasons = dict(opened.skipped)
    assert reasons.keys() == {"1.png", "2.png", "pixel.png", "poster.png", "text.jpg"}
    assert "empty file" in reasons["2.png"]
    assert "1 x 1" in reasons["pixel.png"]
    assert "megapixels" in reasons["poster.png"]
    assert "no picture format" in reasons["text.jpg"]
    assert set(pictures_by_content(opened)) == {expected(i) for i in (0, 3, 4, 5)}
    assert (calls[0], calls[-1]) == ((9, 9), (5, 5))  # headers; what then seems readable


@pytest.mark.parametrize(
    ("make", "options", "says"),
    [
        (lambda p: None, {}, "holds no pictures"),
        (lambda p: (p / "a.png").write_bytes(b"x"), {}, "none of 1 pictures can be read; a.png: no picture format"),
        (lambda p: folder_of(p, 2), {"needs_captions": True}, "has no captions.*metadata.jsonl"),
        (lambda p: folder_of(p, 2), {"needs_labels": True}, "has no classes"),
        (lambda p: folder_of(p, 2), {"channels": 4}, "in_channels=4"),
        (lambda p: write_metadata(p, [{"file_name": f"{i}.png"} for i in range(5)]), {},
         r"names 5 of 5 pictures that are not there: 0.png, 1.png, 2.png \.\.\."),
        (lambda p: write_metadata(p, [{"text": "a cat"}]), {}, "line 1: file_name is missing; it has text"),
        (lambda p: write_metadata(folder_of(p, 1), [{"file_name": "0.png", "text": 3}]), {}, "line 1: text must be"),
        (lambda p: write_metadata(folder_of(p, 1), [{"file_name": "0.png", "label": 0.5}]), {}, "label must be"),
        (lambda p: (p / "metadata.jsonl").write_text('{"file_name": "a.png"}\n{oh'), {}, "line 2: not JSON"),
        (lambda p: (p / "metadata.jsonl").write_text("[]"), {}, "line 1: an object is needed"),
        (lambda p: (p / "metadata.jsonl").write_bytes(b"\xff\xfe"), {}, "not UTF-8"),
        (lambda p: (p / "metadata.csv").write_text("name,text\na.png,x\n"), {}, "file_name is missing"),
    ],
)  # fmt: skip
def test_mistakes_in_folders(tmp_path, make, options, says):
    make(tmp_path)
    with pytest.raises(UserError, match=says):
        open_rows(FolderData(str(tmp_path)), options.pop("channels", 3), (16, 16), **options)


@pytest.mark.parametrize("config", [FolderData(), TarData(), HubData()])
def test_an_empty_path_says_what_to_give(config):
    with pytest.raises(UserError, match="is empty: give"):
        open_rows(config, 3, (16, 16))


@pytest.mark.parametrize("config", [FolderData("/nowhere"), TarData("/nowhere"), IdxData("/nowhere")])
def test_a_path_that_is_not_there(config):
    with pytest.raises(UserError, match="/nowhere"):
        open_rows(config, 3, (16, 16))


def test_held_out_share_is_checked():
    with pytest.raises(UserError, match=r"data.held_out=1.5 must lie in"):
        FolderData("x", held_out=1.5)


# --- the held-out split


@settings(max_examples=30, deadline=None)
@given(keys=st.sets(st.integers(0, 9999), min_size=40, max_size=60), more=st.sets(st.integers(0, 9999)))
def test_rows_that_come_move_no_other(keys, more):
    """From twenty rows at one in three: the exceptions for tiny sets do not come in."""
    before, after = (sorted(f"{i}.png" for i in numbers) for numbers in (keys, keys | more))
    held_out = dict(zip(after, held_out_by_key(after, 0.33).tolist(), strict=True))
    assert [held_out[key] for key in before] == held_out_by_key(before, 0.33).tolist()


def test_held_out_share_and_its_edges():
    keys = [f"{i}.png" for i in range(4000)]
    assert 0.09 < held_out_by_key(keys, 0.1).double().mean() < 0.11
    assert not held_out_by_key(keys, 0).any()
    assert held_out_by_key(keys[:2], 1e-9).sum() == 1
    assert held_out_by_key(keys[:2], 0.9).sum() == 1
    assert held_out_by_key(keys[:1], 0.9).tolist() == [False]
    assert held_out_by_key([], 0.5).shape == (0,)


# --- rows on demand


def test_rows_on_demand_are_those_in_memory(tmp_path):
    folder_of(tmp_path, 30, size=(40, 30))
    (tmp_path / "7.png").write_text("not a picture")
    write_metadata(tmp_path, [{"file_name": f"{i}.png", "text": f"number {i}", "label": i % 4} for i in range(30)])
    config = FolderData(str(tmp_path), held_out=0.2)
    kept, lazy = (open_rows(config, 3, (16, 16), memory_limit=limit) for limit in (2**30, 0))
    assert isinstance(kept.training, PicturesInMemory)
    assert isinstance(lazy.training, PicturesOnDemand)
    assert lazy.skipped == kept.skipped != ()
    assert torch.equal(lazy.sizes, kept.sizes)
    for one, other in ((kept.training, lazy.training), (kept.held_out, lazy.held_out)):
        assert one.shape == other.shape == (3, 16, 16)
        assert len(one) == len(other) > 0
        assert one.captions == other.captions
        assert torch.equal(one.class_labels, other.class_labels)
        order = torch.randperm(len(one), generator=torch.Generator().manual_seed(0))
        assert torch.equal(one.read(order), other.read(order))


def test_a_picture_corrupted_later_gives_way_to_the_next(tmp_path):
    folder_of(tmp_path, 5)
    rows = open_rows(FolderData(str(tmp_path), held_out=0), 3, (16, 24), memory_limit=0).training
    before = rows.read(torch.arange(5))
    (tmp_path / "2.png").write_bytes(png(2)[:100])
    (tmp_path / "4.png").unlink()
    for _ in range(2):
        assert torch.equal(rows.read(torch.arange(5)), before[[0, 1, 3, 3, 0]])
    assert rows.replaced.keys() == {"2.png", "4.png"}
    for i in range(5):
        (tmp_path / f"{i}.png").unlink(missing_ok=True)
    with pytest.raises(UserError, match="5 pictures in a row cannot be read"):
        rows.read(torch.tensor([1]))


def test_a_header_behind_long_metadata(tmp_path):
    exif = Image.Exif()
    exif[0x010E] = "x" * 60_000
    picture(0).save(tmp_path / "a.jpg", exif=exif, icc_profile=b"y" * 100_000)
    opened = open_rows(FolderData(str(tmp_path)), 3, (16, 16), memory_limit=0)
    assert opened.sizes.tolist() == [[16, 24]]


# --- tar shards


def write_shard(path, samples):
    import webdataset

    with webdataset.TarWriter(str(path)) as writer:
        for sample in samples:
            writer.write(sample)


def samples(numbers):
    for i in numbers:
        yield {"__key__": f"{i:04}", "png": png(i), "txt": f"number {i}\n", "cls": i % 3}


def test_shards_hold_what_the_library_reads_from_them(tmp_path):
    import webdataset

    write_shard(tmp_path / "a-000.tar", samples(range(5)))
    write_shard(tmp_path / "a-001.tar", samples(range(5, 9)))
    pattern = str(tmp_path / "a-{000..001}.tar")
    theirs = {}
    for sample in webdataset.WebDataset(pattern, shardshuffle=False):
        theirs[to_signed_unit(decode_picture(sample["png"], 3)).numpy().tobytes()] = (sample["txt"].decode().strip(),)
    assert len(theirs) == 9
    for path in (pattern, str(tmp_path), str(tmp_path / "a-*.tar")):
        for limit in (0, 2**30):
            opened = open_rows(TarData(path, held_out=0.3), 3, (16, 24), memory_limit=limit)
            assert pictures_by_content(opened) == theirs
            assert opened.class_names == ("0", "1", "2")
            assert len(opened.held_out) > 0


def test_json_captions_several_suffixes_and_skipped_samples(tmp_path):
    write_shard(
        tmp_path / "a.tar",
        [
            {"__key__": "x/one", "jpg": png(0), "json": {"caption": ["a", "b"], "label": "cats"}},
            {"__key__": "x/two", "mask.png": png(9), "png": png(1), "json": {"text": "c", "label": "dogs"}},
            {"__key__": "x/three", "txt": "no picture"},
            {"__key__": "x/four", "png": png(3), "json": b"{oh"},
            {"__key__": "x/five", "png": png(4)[:99]},
        ],
    )
    opened = open_rows(TarData(str(tmp_path / "a.tar"), held_out=0), 3, (16, 24))
    assert pictures_by_content(opened) == {expected(0): ("a", "b"), expected(1): ("c",)}
    reasons = dict(opened.skipped)
    assert reasons.keys() == {"a.tar/x/three", "a.tar/x/four", "a.tar/x/five"}
    assert "no picture among its members: txt" in reasons["a.tar/x/three"]
    assert "text cannot be read" in reasons["a.tar/x/four"]


@pytest.mark.parametrize("cut", [28_900, 30_720, 32_000])
def test_a_truncated_shard_gives_what_is_whole(tmp_path, cut):
    """30,720: between two members of one sample."""
    write_shard(tmp_path / "a.tar", samples(range(10)))
    data = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(data[:cut])
    opened = open_rows(TarData(str(tmp_path), held_out=0), 3, (16, 24))
    assert len(opened.training) == (3 if cut == 28_900 else 4)
    assert "damaged in the sample" in opened.skipped[0][1]
    assert pictures_by_content(opened) == {expected(i): (f"number {i}",) for i in range(len(opened.training))}


def test_mistakes_with_shards(tmp_path):
    with pytest.raises(UserError, match=r"holds no \.tar files"):
        open_rows(TarData(str(tmp_path)), 3, (16, 16))
    write_shard(tmp_path / "a.tar", samples(range(2)))
    with pytest.raises(UserError, match=r"1 of 2 shards are not there: .*b.tar"):
        open_rows(TarData(str(tmp_path / "{a,b}.tar")), 3, (16, 16))
    (tmp_path / "c.tar").write_bytes(gzip.compress((tmp_path / "a.tar").read_bytes()))
    with pytest.raises(UserError, match=r"c.tar is no uncompressed tar file.*unpack it first"):
        open_rows(TarData(str(tmp_path / "c.tar")), 3, (16, 16))
    with tarfile.open(tmp_path / "d.tar", "w"):
        pass
    with pytest.raises(UserError, match="hold no sample with a picture"):
        open_rows(TarData(str(tmp_path / "d.tar")), 3, (16, 16))


# --- Hugging Face datasets


@pytest.fixture(scope="module")
def saved_dataset(tmp_path_factory):
    """A DatasetDict on disk: pictures as bytes, captions, class labels, words."""
    import datasets

    features = datasets.Features(
        image=datasets.Image(), text=datasets.Value("string"), label=datasets.ClassLabel(names=["cat", "dog"]),
        words=datasets.Sequence(datasets.Value("string")), number=datasets.Value("int64"),
    )  # fmt: skip

    def rows(numbers):
        return {
            "image": [{"bytes": png(i) if i != 3 else b"broken", "path": None} for i in numbers],
            "text": [f"number {i}" for i in numbers],
            "label": [i % 2 for i in numbers],
            "words": [[f"n{i}", f"m{i}"] for i in numbers],
            "number": list(numbers),
        }

    path = tmp_path_factory.mktemp("dataset")
    parts = {name: datasets.Dataset.from_dict(rows(n), features) for name, n in (("train", range(8)), ("test", [9]))}
    datasets.DatasetDict(parts).save_to_disk(path / "both")
    parts["train"].save_to_disk(path / "one")
    return path


@pytest.mark.parametrize("name", ["both", "one"])
@pytest.mark.parametrize("limit", [0, 2**30])
def test_a_dataset_saved_to_disk(saved_dataset, name, limit):
    opened = open_rows(HubData(str(saved_dataset / name), held_out=0.2), 3, (16, 24), memory_limit=limit)
    assert pictures_by_content(opened) == {expected(i): (f"number {i}",) for i in range(8) if i != 3}
    assert opened.class_names == ("cat", "dog")
    assert [key for key, _ in opened.skipped] == ["train/00000003"]


def test_columns_and_splits_of_a_dataset(saved_dataset):
    config = HubData(str(saved_dataset / "both"), split="test", text_column="words", held_out=0)
    opened = open_rows(config, 3, (16, 24))
    assert pictures_by_content(opened) == {expected(9): ("n9", "m9")}


def test_a_folder_of_pictures_through_datasets(tmp_path, monkeypatch):
    """load_dataset's own road, here to its imagefolder builder, with files in place of bytes."""
    folder_of(tmp_path / "pictures", 3)
    write_metadata(tmp_path / "pictures", [{"file_name": f"{i}.png", "text": f"number {i}"} for i in range(3)])
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    opened = open_rows(HubData(str(tmp_path / "pictures")), 3, (16, 24))
    assert pictures_by_content(opened) == {expected(i): (f"number {i}",) for i in range(3)}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"split": "tran"}, "unknown data.split 'tran': did you mean 'train'"),
        ({"image_column": "images"}, "unknown data.image_column 'images': did you mean 'image'"),
        ({"text_column": "txt"}, "unknown data.text_column 'txt'"),
        ({"image_column": "text"}, "no pictures; columns: image, text"),
        ({"text_column": "number"}, "data.text_column='number' must hold a text or a list"),
    ],
)
def test_mistakes_with_datasets(saved_dataset, options, says):
    with pytest.raises(UserError, match=says):
        open_rows(HubData(str(saved_dataset / "both"), **options), 3, (16, 16))


def test_a_dataset_that_cannot_be_reached():
    with pytest.raises(UserError, match=r"data.name='nobody/nothing' cannot be loaded.*save_to_disk"):
        open_rows(HubData("nobody/nothing"), 3, (16, 16))


# --- which source a path means


def test_source_of_a_path(tmp_path, saved_dataset):
    folder_of(tmp_path / "pictures", 1)
    idx_folder(tmp_path / "idx")
    (tmp_path / "shards").mkdir()
    write_shard(tmp_path / "shards" / "a.tar", samples([0]))
    assert source_of("digits") == DigitsData()
    assert source_of("hf://owner/name") == HubData("owner/name")
    kinds = {
        tmp_path / "pictures": FolderData, tmp_path / "idx": IdxData, tmp_path / "shards": TarData,
        tmp_path / "shards" / "a.tar": TarData, tmp_path / "shards" / "{a,b}.tar": TarData,
        saved_dataset / "one": HubData, tmp_path / "missing": FolderData,
    }  # fmt: skip
    for path, kind in kinds.items():
        assert isinstance(source_of(str(path)), kind)
